"""What `max_length` leaves of the tags of words, for training and for measuring."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.own.joined import Joined
from hf_bilb.data.own.labels import TaskLabels
from hf_bilb.data.own.options import OwnDataOptions
from hf_bilb.data.splits import PARTS
from hf_bilb.data.text.rows import TokenRows
from hf_bilb.errors import OptionError
from hf_bilb.losses.class_weights import balanced_weights_of_counts
from hf_bilb.losses.task_types import TAG_LABELS

logger = logging.getLogger(__name__)


def with_tags_that_are_left(joined: Joined, parts: Mapping[str, TokenRows], options: OwnDataOptions) -> Joined:
    """The tasks with balanced class weights of the tags that are left in the training part; says what is cut off.

    Args:
        joined: the tasks, with all their tags.
        parts: their rows as tokens.
        options: say which weights are balanced.

    Raises:
        OptionError: no tag is left in the training part, or none of a class whose weight shall be balanced.
    """
    tasks = dict(joined.tasks)
    for place, name in enumerate(joined.tagged):
        for part in PARTS:
            _warn_of_cut(joined, name, part, parts[part].columns[TAG_LABELS][:, place], parts[part].lengths, options)
        tasks[name] = _reweighted(joined, name, parts["train"].columns[TAG_LABELS][:, place], options)
    return dataclasses.replace(joined, tasks=tasks)


def _warn_of_cut(
    joined: Joined, name: str, part: str, left: NDArray[np.integer], lengths: NDArray[np.int64], options: OwnDataOptions
) -> None:
    before, number = joined.tag_counts(name, part), len(lengths)
    row_of = np.repeat(np.arange(number), lengths)
    after = np.bincount(row_of[left >= 0], minlength=number)
    cut = before - after
    if cut.any():
        logger.warning(
            "data.tasks.%s: %d of %d tags, in %d of %d rows of the %s part, are cut off by data.max_length, %d tokens, "
            "or are of words without a token; they are neither trained nor measured",
            name, cut.sum(), before.sum(), (cut > 0).sum(), (before > 0).sum(), part, options.max_length,
        )  # fmt: skip


def _reweighted(joined: Joined, name: str, left: NDArray[np.integer], options: OwnDataOptions) -> TaskLabels:
    task = joined.tasks[name]
    counts = np.bincount(left[left >= 0], minlength=task.type.size).tolist()
    if not any(counts):
        column, file = options.tasks[name].label_columns(name)[0], joined.sources[joined.source_of[name]].tables[0].name
        raise OptionError(
            f"data: {file}: no tag of column {column!r} in the training part is left: its words have no token, or are "
            f"cut off by data.max_length ({options.max_length})"
        )
    if options.tasks[name].class_weights != "balanced":
        _warn_of_lost(joined, name, counts, options)
        return task
    try:
        weights = balanced_weights_of_counts(counts, task.type.names)
    except OptionError as error:
        raise OptionError(f"data.tasks.{name}.{error} (after data.max_length, {options.max_length} tokens)") from None
    return dataclasses.replace(task, type=dataclasses.replace(task.type, class_weights=weights))


def _warn_of_lost(joined: Joined, name: str, counts: Sequence[int], options: OwnDataOptions) -> None:
    task, number = joined.tasks[name], joined.source_of[name]
    assert task.tags is not None
    known = task.tags.counts(joined.rows["train"][number], task.type.size)
    lost = [word for word, before, after in zip(task.type.names, known, counts, strict=True) if before and not after]
    if lost:
        logger.warning(
            "data.tasks.%s: data.max_length (%d tokens) leaves no tag of the class %s in the training part",
            name, options.max_length, ", ".join(map(repr, lost)),
        )  # fmt: skip

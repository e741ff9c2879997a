"""Data of one's own: columns of files become inputs and tasks.

    data:
      name: table
      files: {train: reviews/train-*.jsonl, test: reviews/test.csv}
      inputs: {text: [title, body]}
      tasks:
        stars: {type: regression, unit: stars}
        topic: {type: classification}

A row may have labels of some of the tasks; a row without any is left out of the training part. Or every task has rows
of its own (`files` or `hub` in it): then they are joined into one set, each row with the labels of its task, and
`task_ids` says which one that is, for `trainer.task_sampling`.

A batch has the columns `input_ids`, `attention_mask` (and `token_type_ids`) of texts, `pixel_values` of images, or
`numeric` and `categorical` of tables; and `labels`, `tag_labels` and a column for each task of pixels, as
`hf_bilb.losses.task_types` has them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import InputKind, LabelColumns
from hf_bilb.data.own.cut_tags import with_tags_that_are_left
from hf_bilb.data.own.image_rows import OwnImageRows
from hf_bilb.data.own.inputs import Inputs, image_inputs, table_inputs, text_inputs
from hf_bilb.data.own.joined import Joined, join_sources
from hf_bilb.data.own.options import OwnDataOptions
from hf_bilb.data.own.pixels import means_and_stds
from hf_bilb.data.own.summary import summary
from hf_bilb.data.task_data import DataSetSpec, TaskData
from hf_bilb.data.text.rows import TokenRows
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import LABELS, TAG_LABELS, TaskType
from hf_bilb.metrics.mixed import MixedMetrics, constant_metrics, constant_outputs, trivial_metrics

logger = logging.getLogger(__name__)


def load_own_data(options: OwnDataOptions) -> TaskData:
    """The tables with their inputs and labels; says in `summary` how many labels each task has in each part.

    Raises:
        OptionError: what is wrong in the files, in one line with file, row (the first one is 1) and column.
        MissingPackageError: the tokenizer's package is not installed.

    Cost: reading by `datasets`, the first time a second for some 500,000 rows of text files, later ones from its
    cache. Texts are tokenized at every start, about 20,000 a second; images are decoded once (`prepare_images`).
    """
    joined = join_sources(options)
    _warn_of_unmeasured(joined)
    inputs = _inputs(joined, options)
    if joined.tagged:
        parts = {part: rows for part, rows in inputs.parts.items() if isinstance(rows, TokenRows)}
        joined = with_tags_that_are_left(joined, parts, options)
    return _task_data(joined, inputs, options)


def _inputs(joined: Joined, options: OwnDataOptions) -> Inputs:
    if options.kind == "text":
        return text_inputs(joined, options.tokenizer, options.max_length)
    if options.kind == "image":
        return image_inputs(joined, options.image_size, options.cache_dir)
    return table_inputs(joined)


def _warn_of_unmeasured(joined: Joined) -> None:
    for name, part in itertools.product(joined.tasks, ("validation", "test")):
        if not joined.num_labelled(name, part):
            logger.warning("data.tasks.%s: no row of the %s part has a label; it is not measured there", name, part)


# --- what the Trainer needs ---------------------------------------------------------------------------------------


def _task_data(joined: Joined, inputs: Inputs, options: OwnDataOptions) -> TaskData:
    types = joined.types
    chosen = {name: task.metrics for name, task in options.tasks.items() if task.metrics is not None}
    names = (*([LABELS] if joined.width else []), *([TAG_LABELS] if joined.tagged else []), *joined.of_pixels)
    metrics = MixedMetrics(types, chosen, names)
    losses = MixedLosses(types)
    return TaskData(
        train=inputs.parts["train"],
        validation=inputs.parts["validation"],
        test=inputs.parts["test"],
        task_names=tuple(types),
        label_names=names,
        data_collator=inputs.collator,
        compute_metrics=metrics,
        metrics=metrics.infos,
        trivial_metrics=_trivial(joined, inputs, chosen),
        model_arguments={"tasks": types, **inputs.model_arguments},
        task_item_counts=losses.count,
        metrics_by_batch=True,
        trivial_predictor="constant predictor",
        processing_class=inputs.processing_class,
        task_loss_func=losses,
        format=_format(types, inputs.kind, options),
        summary=summary(joined),
    )


def _format(types: Mapping[str, TaskType], kind: InputKind, options: OwnDataOptions) -> DataFormat:
    places = {
        name: LabelColumns(
            task.label_columns(name),
            task.metrics,
            task.class_words,
            task.ignore_index if task.type == "segmentation" else None,
            task.missing,
        )
        for name, task in options.tasks.items()
    }
    csv = next((task.csv for task in options.tasks.values() if task.csv is not None), options.csv)
    return DataFormat(kind, types, places, csv)


def _trivial(joined: Joined, inputs: Inputs, chosen: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The metrics of the constant predictor on the test part."""
    of_pixels = isinstance(inputs.parts["test"], OwnImageRows) and joined.of_pixels
    return (_trivial_of_pixels if of_pixels else _trivial_of_rows)(joined, inputs, chosen)


def _trivial_of_pixels(joined: Joined, inputs: Inputs, chosen: Mapping[str, Sequence[str]]) -> dict[str, float]:
    test = inputs.parts["test"]
    assert isinstance(test, OwnImageRows)
    rows = {name: task for name, task in joined.types.items() if task.items == "rows"}
    outputs = constant_outputs(rows, {LABELS: torch.from_numpy(joined.labels("train"))}) if rows else {}
    for name in joined.of_pixels:
        outputs[name] = _constant_of_pixels(joined, name)
    names = (*([LABELS] if rows else []), *joined.of_pixels)
    return constant_metrics(joined.types, outputs, names, test.label_batches(), chosen)


def _constant_of_pixels(joined: Joined, name: str) -> Tensor:
    """`[C]`, the logarithms of the classes' shares in the training part; or `[D]`, the mean numbers."""
    labels, number = joined.tasks[name], joined.source_of[name]
    assert labels.pixels is not None
    facts = labels.pixels.facts_of(joined.rows["train"][number])
    if labels.type.type == "segmentation":
        counts = torch.from_numpy(facts.sum(axis=0))
        return (counts / counts.sum()).log()
    means, _ = means_and_stds(facts)
    return torch.zeros(labels.type.size) if labels.type.means else torch.from_numpy(means)


def _trivial_of_rows(joined: Joined, inputs: Inputs, chosen: Mapping[str, Sequence[str]]) -> dict[str, float]:
    of_train, of_test = (joined.labels(part) if joined.width else None for part in ("train", "test"))
    train, test = inputs.parts["train"], inputs.parts["test"]
    tags: tuple[Any, Any] = (None, None)
    if isinstance(train, TokenRows) and isinstance(test, TokenRows) and joined.tagged:
        # Of the training part the order of the tokens does not matter: as one row, they need no padding.
        tags = (train.columns[TAG_LABELS][None], test.padded_tag_labels())
    return trivial_metrics(joined.types, of_train, of_test, *tags, chosen)


def _tokenizer_of_model(options: Mapping[str, Any]) -> dict[str, str]:
    """Texts alone need a tokenizer."""
    asked = [options["inputs"], *(task["inputs"] for task in options["tasks"].values())]
    return {"tokenizer": "encoder"} if any(inputs and inputs["text"] for inputs in asked) else {}


SPEC = DataSetSpec(options=OwnDataOptions, load=load_own_data, from_model=_tokenizer_of_model)

"""Warnings of rows and groups that are in the training part of one source and in another part of the same or another
one: what is measured there was seen in training."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.own import columns
from hf_bilb.data.own.source import Source

logger = logging.getLogger(__name__)

_MEASURED = ("validation", "test")


def warn_of_leaks(sources: Sequence[Source]) -> None:
    """Say what is in the training part of one source and the validation or test part of one."""
    for one, other in itertools.product(sources, repeat=2):
        if one.options.split.group_by is not None and other.options.split.group_by is not None:
            _warn_of_groups(one, other)
        if one is not other:
            _warn_of_rows(one, other)


def _warn_of_groups(one: Source, other: Source) -> None:
    trained = _groups(one, "train")
    for part in _MEASURED:
        both = trained & _groups(other, part)
        if both:
            logger.warning(
                "%s.split.group_by: %d values of %r are in the training part and in the %s part%s, such as %r",
                one.options.path, len(both), one.options.split.group_by, part, _owner(one, other), min(both),
            )  # fmt: skip


def _groups(source: Source, part: str) -> set[str]:
    """Those of a part; files of the validation and test part need not have the column."""
    column = str(source.options.split.group_by)
    found: set[str] = set()
    for table, rows in zip(source.tables, _rows_by_table(source, part), strict=True):
        if column in table.features:
            found |= set(columns.words(table, column).used(rows))
    return found


def _warn_of_rows(one: Source, other: Source) -> None:
    """The same file may be one of both."""
    trained = _rows_by_file(one, "train")
    for part in _MEASURED:
        for file, rows in _rows_by_file(other, part).items():
            both = trained.get(file, set()) & rows
            if both:
                logger.warning(
                    "%s: %d rows of %s are in the training part and in the %s part%s",
                    one.options.path, len(both), file, part, _owner(one, other),
                )  # fmt: skip


def _owner(one: Source, other: Source) -> str:
    return "" if one is other else f" of {other.options.path}"


def _rows_by_file(source: Source, part: str) -> dict[str, set[int]]:
    found: dict[str, set[int]] = defaultdict(set)
    for table, rows in zip(source.tables, _rows_by_table(source, part), strict=True):
        file = Path(table.name)
        found[str(file.resolve()) if file.exists() else table.name] |= set(rows.tolist())
    return found


def _rows_by_table(source: Source, part: str) -> list[NDArray[np.int64]]:
    """Of each table its rows in the part, numbered from 0."""
    chosen = np.zeros(len(source), bool)
    chosen[getattr(source.split, part)] = True
    stops = np.cumsum([len(table.rows) for table in source.tables])
    return [np.flatnonzero(of_table) for of_table in np.split(chosen, stops[:-1])]

"""Labels of tasks that are known already: for measuring a trained model on rows that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import nearest, shown
from hf_bilb.data.inputs.given import check_column
from hf_bilb.data.inputs.kinds import LabelColumns
from hf_bilb.data.own import columns
from hf_bilb.data.own.columns import Words
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.labels import Tags
from hf_bilb.errors import OptionError
from hf_bilb.losses.masked import MISSING_INTEGER
from hf_bilb.losses.task_types import TaskType

_LISTED = 12  # classes that a message lists


@dataclass(frozen=True)
class Labels:
    """The labels of N rows, as a batch has them (`hf_bilb.losses.task_types`).

    Attributes:
        values: `[N, W]` float32, standardised where the task is, NaN where missing.
        tags: task of tokens -> its tags.
    """

    values: NDArray[np.float32]
    tags: Mapping[str, Tags]


def read_known_labels(table: Table, tasks: Mapping[str, TaskType], places: Mapping[str, LabelColumns]) -> Labels:
    """The labels of all tasks whose columns the table has.

    Raises:
        OptionError: no column of any task; a value that is no label of its task: names file, row and column.
    """
    known = [name for name in tasks if all(column in table.rows.column_names for column in places[name].columns)]
    if not known:
        first = next(iter(tasks))
        for column in places[first].columns:
            check_column(table, column)
    values, tags = [], {}
    for name, task in tasks.items():
        if task.type == "token_classification":
            tags[name] = _tags(table, task, places[name]) if name in known else _no_tags(len(table.rows))
        elif name in known:
            values.append(_values(table, task, places[name]))
        else:
            values.append(np.full((len(table.rows), task.label_width), np.nan))
    joined = np.concatenate(values, axis=1) if values else np.empty((len(table.rows), 0))
    return Labels(joined.astype(np.float32), tags)


def _values(table: Table, task: TaskType, place: LabelColumns) -> NDArray[np.float64]:
    names = place.columns
    if task.type == "regression":
        numbers = np.stack([columns.numbers(table, name) for name in names], axis=1)
        return (numbers - np.array(task.means)) / np.array(task.stds) if task.means else numbers
    if task.type == "classification":
        classes = _classes(task, place)
        codes = _codes(table, columns.words(table, names[0], classes), np.arange(len(table.rows)), classes, names[0])
        return np.where(codes < 0, np.nan, codes)[:, None]
    if len(names) == 1 and columns.has_lists(table, names[0]):
        return _of_lists(table, task, place)
    return np.stack([columns.bits(table, name) for name in names], axis=1)


def _of_lists(table: Table, task: TaskType, place: LabelColumns) -> NDArray[np.float64]:
    lengths, codes, rows = _listed(table, task, place)
    values = np.zeros((len(lengths), task.size))
    values[rows[codes >= 0], codes[codes >= 0]] = 1.0
    values[lengths < 0] = np.nan
    return values


def _tags(table: Table, task: TaskType, place: LabelColumns) -> Tags:
    lengths, codes, _ = _listed(table, task, place)
    return Tags(lengths, np.where(codes < 0, MISSING_INTEGER, codes))


def _no_tags(num_rows: int) -> Tags:
    return Tags(np.full(num_rows, -1, np.int64), np.empty(0, np.int64))


def _listed(
    table: Table, task: TaskType, place: LabelColumns
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of lists of words: the lengths `[N]`, and of each word its class and its row."""
    column, classes = place.columns[0], _classes(task, place)
    lists = columns.lists(table, column)
    rows = np.repeat(np.arange(len(lists.lengths)), np.maximum(lists.lengths, 0))
    found = columns.words_of(lists.values, lists.feature, table.missing - set(classes))
    return lists.lengths, _codes(table, found, rows, classes, column), rows


def _classes(task: TaskType, place: LabelColumns) -> dict[str, int]:
    """Word -> number of the class that it means."""
    groups = place.class_words or {name: (name,) for name in task.names}
    return {word: number for number, words in enumerate(groups.values()) for word in words}


def _codes(
    table: Table, found: Words, rows: NDArray[np.int64], classes: Mapping[str, int], column: str
) -> NDArray[np.int64]:
    found = found.without({str(MISSING_INTEGER)} - classes.keys())  # as in training
    codes = found.numbered(classes, unknown=-2)
    wrong = np.flatnonzero(codes == -2)
    if wrong.size:
        word = found.known[found.codes[wrong[0]]]
        hint = nearest(word, classes) or f" (classes: {', '.join(list(classes)[:_LISTED])})"
        raise OptionError(
            f"{table.place(int(rows[wrong[0]]))}: column {column!r} is {shown(word)}, which is no class of the "
            f"model{hint}"
        )
    return codes

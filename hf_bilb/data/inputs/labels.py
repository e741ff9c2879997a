"""Labels of tasks that are known already: for measuring a trained model on rows that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.inputs.given import check_column
from hf_bilb.data.inputs.kinds import LabelColumns
from hf_bilb.data.own import columns
from hf_bilb.data.own.columns import Words
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.labels import Tags, multi_hot, rows_of, unknown_class
from hf_bilb.data.task_data import Standardizer
from hf_bilb.losses.masked import MISSING_INTEGER
from hf_bilb.losses.task_types import TaskType


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
    """The labels of all tasks of rows and tokens whose columns the table has.

    Raises:
        OptionError: no column of any task, of pixels ones neither; a value that is no label of its task: names file,
            row and column.
    """
    known = [name for name in tasks if all(column in table.rows.column_names for column in places[name].columns)]
    if not known:
        first = next(iter(tasks))
        for column in places[first].columns:
            check_column(column, table.features, table.name)
    values, tags = [], {}
    for name, task in tasks.items():
        if task.items == "pixels":
            continue
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
        return Standardizer(np.array(task.means), np.array(task.stds)).standardize(numbers) if task.means else numbers
    if task.type == "classification":
        classes = _classes(task, place)
        codes = _codes(table, columns.words(table, names[0], classes), np.arange(len(table.rows)), classes, names[0])
        return np.where(codes < 0, np.nan, codes)[:, None]
    if len(names) == 1 and (task.size > 1 or columns.has_lists(table, names[0])):
        return multi_hot(*_listed(table, task, place), task.size)
    return np.stack([columns.bits(table, name) for name in names], axis=1)


def _tags(table: Table, task: TaskType, place: LabelColumns) -> Tags:
    lengths, codes = _listed(table, task, place)
    return Tags(lengths, np.where(codes < 0, MISSING_INTEGER, codes))


def _no_tags(num_rows: int) -> Tags:
    return Tags(np.full(num_rows, -1, np.int64), np.empty(0, np.int64))


def _listed(table: Table, task: TaskType, place: LabelColumns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of lists of words: the lengths `[N]`, and of each word its class."""
    column, classes = place.columns[0], _classes(task, place)
    lists = columns.lists(table, column)
    found = columns.words_of(lists.values, lists.feature, table, classes)
    return lists.lengths, _codes(table, found, rows_of(lists.lengths), classes, column)


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
        word, row = found.known[found.codes[wrong[0]]], int(rows[wrong[0]])
        raise unknown_class(table.place(row), column, word, "is no class of the model", list(classes))
    return codes

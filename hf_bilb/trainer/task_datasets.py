"""Several training sets, one task each: what `train_dataset={"sst2": ds1, "stsb": ds2}` becomes.

The sets stay as they are, each with its own columns. A sampler draws from them as from one set; the rows of a batch are
prepared as those of their set (columns removed, missing labels filled in), one collator makes the batch, and the column
`task_ids` `[B]` int64 is added to it: the position in `task_names` of each row's task.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_utils import has_length

from hf_bilb.config.options import nearest, unknown_name
from hf_bilb.errors import OptionError
from hf_bilb.trainer.collation import holds_floats
from hf_bilb.trainer.epochs import EpochDataset

#: The column of a batch that says which task each row is of.
TASK_IDS = "task_ids"
#: What the parts of one data set are called.
_PARTS = {"train", "training", "validation", "valid", "dev", "test"}

Rows = list[Any]


class TaskRow(NamedTuple):
    """A row as its data set gives it, and the number of its task."""

    task: int
    row: Any


class TaskDatasets(Dataset[TaskRow]):
    """The rows of data sets of one task each, one set after the other.

    Args:
        datasets: task -> data set with a length and an index: of `datasets`, of torch, or a list.
        task_names: the K tasks; `datasets` may have fewer.
        name: of the argument that it comes from, for messages.

    Attributes:
        datasets: task -> data set, in the order of `task_names`.

    Raises:
        OptionError: a key that is no task, an empty set, or one without a length or an index.
    """

    def __init__(self, datasets: Mapping[str, Any], task_names: Sequence[str], name: str) -> None:
        for task, dataset in datasets.items():
            if task not in task_names:
                raise unknown_name(name, task, task_names)
            _check_set(dataset, f"{name}[{task!r}]")
        self.datasets = {task: datasets[task] for task in task_names if task in datasets}
        self._sets = list(self.datasets.values())
        self._tasks = [list(task_names).index(task) for task in self.datasets]
        self._ends = list(accumulate(len(dataset) for dataset in self._sets))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> TaskRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[TaskRow]:
        """The rows of a batch; those of one set are asked for together."""
        numbers = [bisect_right(self._ends, index) for index in indices]
        rows: dict[int, TaskRow] = {}
        for number, places in _places(numbers).items():
            start = self._ends[number] - len(self._sets[number])
            found = _fetch(self._sets[number], [indices[place] - start for place in places])
            rows.update((place, TaskRow(self._tasks[number], row)) for place, row in zip(places, found, strict=True))
        return [rows[place] for place in range(len(indices))]

    @property
    def task_ids(self) -> NDArray[np.int64]:
        """`[N]`: the number of each row's task."""
        return np.repeat(np.array(self._tasks, dtype=np.int64), [len(dataset) for dataset in self._sets])

    @property
    def only_task(self) -> str | None:
        """The task of all rows, where there is one set."""
        return next(iter(self.datasets)) if len(self.datasets) == 1 else None

    def set_epoch(self, epoch: int) -> None:
        """Tell it to those sets that are others in every epoch."""
        for dataset in self._sets:
            if isinstance(dataset, EpochDataset):
                dataset.set_epoch(epoch)


class TaskCollator:
    """Makes a batch of rows of `TaskDatasets` by the collator of a single set, and adds `task_ids` `[B]`.

    Args:
        collate: makes a batch of the rows of any set.
        prepare: number of a task -> what is done to the rows of its set before that.
    """

    def __init__(self, collate: Callable[[Rows], Any], prepare: Mapping[int, Callable[[Rows], Rows]]) -> None:
        self._collate = collate
        self._prepare = dict(prepare)

    def __call__(self, rows: list[TaskRow]) -> Any:
        tasks = [row.task for row in rows]
        ready: dict[int, Any] = {}
        for task, places in _places(tasks).items():
            ready.update(zip(places, self._prepare[task]([rows[place].row for place in places]), strict=True))
        batch = self._collate([ready[place] for place in range(len(rows))])
        if isinstance(batch, MutableMapping):  # of anything else, the Trainer says what it expects
            batch[TASK_IDS] = torch.tensor(tasks)
        return batch


def sets_of(dataset: Any) -> Mapping[str, Any] | None:
    """Task -> data set of a `train_dataset` that is several; None: it is one."""
    if isinstance(dataset, TaskDatasets):
        return dataset.datasets
    return dataset if isinstance(dataset, Mapping) else None


def check_names(datasets: Mapping[str, Any], task_names: Sequence[str] | None, name: str) -> None:
    """Raise `OptionError` unless `datasets` has one set for each of the tasks; None: its keys become the tasks.

    Args:
        datasets: task -> data set.
        task_names: the K tasks.
        name: of the argument that it comes from, for messages.
    """
    keys = [str(key) for key in datasets]
    if not keys:
        raise OptionError(f"{name}: is an empty mapping, expected task -> data set")
    parts = _PARTS.intersection(keys)
    if len(parts) > 1 and not parts.intersection(task_names or ()):
        raise OptionError(
            f"{name}: {', '.join(keys)} are the parts of one data set, expected one of them, or a mapping task -> data "
            "set"
        )
    if task_names is None:
        return
    for key in keys:
        if key not in task_names:
            raise OptionError(f"{name}: {key!r} is no task{nearest(key, task_names)}; tasks: {', '.join(task_names)}")
    missing = [task for task in task_names if task not in keys]
    if missing:
        raise OptionError(
            f"{name}: has no data set of task {missing[0]!r}, expected one of each: {', '.join(task_names)}"
        )


def check_alike(sets: TaskDatasets, keeps: Callable[[str], bool], label_names: Sequence[str], why: str) -> None:
    """Raise `OptionError` unless rows of all sets can stand in one batch: the same columns, labels of the same type.

    Args:
        sets: the training sets, of each of which the first row is looked at.
        keeps: whether a column reaches the batch.
        label_names: columns in which whole numbers and floats are different things.
        why: the setting that puts rows of several sets into one batch.
    """
    rows = {task: _fetch(dataset, [0])[0] for task, dataset in sets.datasets.items()}
    known = {task: row for task, row in rows.items() if isinstance(row, Mapping)}
    columns = {task: {name for name in row if keeps(name)} for task, row in known.items()}
    first = next(iter(known), "")
    for task, row in known.items():
        if columns[task] != columns[first]:
            raise OptionError(
                f"{why} puts rows of several training sets into one batch, which need the same columns; {first!r} has "
                f"{', '.join(sorted(columns[first]))}, {task!r} has {', '.join(sorted(columns[task]))}"
            )
        for name in columns[task].intersection(label_names):
            ours, other = known[first][name], row[name]
            if ours is not None and other is not None and holds_floats(ours) != holds_floats(other):
                held = ["floats" if holds_floats(value) else "whole numbers" for value in (ours, other)]
                raise OptionError(
                    f"{why} puts rows of several training sets into one batch, whose column {name!r} has one type; it "
                    f"holds {held[0]} in {first!r} and {held[1]} in {task!r} (Dataset.cast_column changes it)"
                )


def _check_set(dataset: Any, name: str) -> None:
    if isinstance(dataset, Mapping):
        raise OptionError(f"{name}: is a mapping ({', '.join(map(str, dataset))}), expected one data set")
    if isinstance(dataset, IterableDataset):  # of torch, which that of `datasets` becomes a subclass of, too
        raise OptionError(
            f"{name}: {type(dataset).__name__} has no index per example that a sampler could choose; join streams with "
            "datasets.interleave_datasets(..., probabilities=...) instead, and give that as train_dataset"
        )
    if not has_length(dataset) or not hasattr(dataset, "__getitem__") or isinstance(dataset, (str, bytes)):
        raise OptionError(f"{name}: got a {type(dataset).__name__}, expected a data set with __len__ and __getitem__")
    if len(dataset) == 0:
        raise OptionError(f"{name}: is empty, expected at least one example")
    if TASK_IDS in (getattr(dataset, "column_names", None) or ()):
        raise OptionError(
            f"{name}: has a column {TASK_IDS!r}, which says the task where sets are joined; here its key does: "
            f"remove_columns({TASK_IDS!r})"
        )


def _places(numbers: Sequence[int]) -> dict[int, list[int]]:
    """Number -> its places in `numbers`."""
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number, []).append(place)
    return places


def _fetch(dataset: Any, indices: list[int]) -> Rows:
    """Rows, as torch's DataLoader asks for them."""
    together = getattr(dataset, "__getitems__", None)
    return list(together(indices)) if callable(together) else [dataset[index] for index in indices]

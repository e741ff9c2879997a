"""Rows of a data set, and how a batch of them is made.

Every data set of ours is `Rows`. Those whose rows have a fixed shape, or can be padded, are `BatchedRows`: a DataLoader
asks for a batch at once (`__getitems__`) and gets it by a few array operations, because nothing is done per example.
Measured on one core, batches of 512 rows of 34 + 11 numbers, shuffled: 2 million rows a second, against 0.06 million
through `datasets.Dataset` (formats torch, numpy, python).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset


class Rows(Dataset[dict[str, Any]], ABC):
    """A map-style data set: `rows[i]` is a dict of columns.

    `i` counts from the end where it is negative; one beyond either end raises `IndexError`.

    Attributes:
        task_ids: `[N]` int64, the task of each row, of a set that is joined from one set of each task: an attribute, so
            that a task sampler can read it without loading rows. None: rows are of no single task.
    """

    task_ids: NDArray[np.int64] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _row(self, place: int) -> dict[str, Any]:
        """The row at a place from 0 to N - 1."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._row(range(len(self))[index])


class BatchedRows(Rows):
    """Rows that are made a batch at a time, by `_batch`; a single one is a batch of one.

    `rows[2:5]` and `rows[[4, 0]]` are batches.
    """

    @abstractmethod
    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Any]:
        """The rows at these places (0 to N - 1), each column `[B, ...]`."""

    def _row(self, place: int) -> dict[str, Any]:
        return {name: column[0] for name, column in self._batch([place]).items()}

    def __getitem__(self, index: int | slice | Sequence[int]) -> dict[str, Any]:
        if isinstance(index, slice | Sequence) or np.ndim(index):  # the latter: an array
            return self._batch(np.ascontiguousarray(np.arange(len(self))[index]))
        return super().__getitem__(index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        # A list of ONE batch: the Trainer's RemoveColumnsCollator passes over each element of what comes from here.
        return [self._batch(indices)]


class VectorRows(BatchedRows):
    """Rows in memory whose columns are matrices `[N, D]`: `rows[i]` is a dict of vectors `[D]`.

    Use `collate_vectors` with it.

    Raises:
        ValueError: when a column is no matrix, or the columns differ in length.
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        for name, column in columns.items():
            if column.dim() != 2:
                raise ValueError(f"column {name!r}: got shape {tuple(column.shape)}, expected [N, D]")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of different length: {lengths}")
        self.columns = dict(columns)
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        rows = torch.as_tensor(places)
        return {name: column.index_select(0, rows) for name, column in self.columns.items()}


class MappedRows(BatchedRows):
    """Some rows of memory-mapped files.

    The files are opened again where this is unpickled (workers that are spawned): pickling costs nothing of them.

    Args:
        files: column -> `.npy` file, `[M, ...]`.
        rows: `[N]`, which of the M, in the order of this set.
    """

    def __init__(self, files: Mapping[str, Path], rows: NDArray[np.int64]) -> None:
        self.files = dict(files)
        self.rows = rows
        self._arrays = self._open()

    def _open(self) -> dict[str, NDArray[Any]]:
        # A plain array over the mapping: np.memmap's own class makes every slice dear.
        return {name: np.load(file, mmap_mode="r").view(np.ndarray) for name, file in self.files.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._arrays = self._open()

    def __len__(self) -> int:
        return len(self.rows)


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JoinRows:
    """Collator: joins rows and batches of `BatchedRows`, in any mixture, to one batch.

    Attributes:
        dimensions: of a column in a row; in a batch it has one more, by which the two are told apart.
        column: which; None: any of them.
    """

    dimensions: int
    column: str | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch: the columns of the first row, in its order."""
        batches = [self._as_batch(row) for row in rows]
        return dict(batches[0]) if len(batches) == 1 else self._join(batches)

    def _as_batch(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        told_by = row[next(iter(row)) if self.column is None else self.column]
        if told_by.dim() > self.dimensions:
            return row
        return {name: self._batch_of_one(value) for name, value in row.items()}

    def _batch_of_one(self, value: Any) -> Any:
        return value[None]

    def _join(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


#: Of rows whose columns are vectors.
collate_vectors = JoinRows(1)
#: Of rows with `pixel_values [3, H, W]`.
collate_images = JoinRows(3, "pixel_values")

"""Images with labels of rows and of pixels, served a batch at a time.

A batch has the columns `pixel_values [B, 3, H, W]` (float32 in [0, 1], RGB), `labels [B, W]` where a task has row
labels, and a column for each task of pixels, as `hf_bilb.losses.task_types` has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.rows import MappedRows
from hf_bilb.data.task_data import Standardizer
from hf_bilb.losses.masked import MISSING_INTEGER
from hf_bilb.losses.task_types import LABELS, TaskType

_PIXELS = "pixel_values"
_AT_ONCE = 64  # rows of a batch of labels


@dataclass(frozen=True)
class PixelColumn:
    """The labels of one task of pixels.

    Attributes:
        task: its type.
        file: see `hf_bilb.data.own.pixels.PixelLabels`.
        rows: `[N]`, which label of the file each row has; -1: none.
    """

    task: TaskType
    file: Path
    rows: NDArray[np.int64]


def pixel_column(task: TaskType, values: NDArray[np.generic], missing: NDArray[np.bool_]) -> Tensor:
    """Labels of pixels as a column of a batch.

    Args:
        task: their type.
        values: B of them, as `hf_bilb.data.own.pixels.PixelLabels` holds them.
        missing: `[B]`: of no row.
    """
    if task.type == "segmentation":
        classes = values.astype(np.int64)
        classes[missing] = MISSING_INTEGER
        return torch.from_numpy(classes)
    numbers = values.astype(np.float64)
    if task.means:
        scale = Standardizer(*(np.array(of)[:, None, None] for of in (task.means, task.stds)))
        numbers = scale.standardize(numbers)
    numbers[missing] = np.nan
    return torch.from_numpy(numbers).float()


class OwnImageRows(MappedRows):
    """Images and labels of pixels in memory-mapped files, and labels of rows in memory.

    `rows[i]` is a dict of the columns above without B. Use `collate_images` with it.

    Args:
        file: `.npy`, uint8 `[M, 3, H, W]`.
        rows: `[N]`, which of the M images, in the order of this set.
        labels: `[N, W]` float32; W may be 0.
        pixels: task -> its labels.

    Raises:
        ValueError: when rows and labels differ in length.
    """

    def __init__(
        self,
        file: Path,
        rows: NDArray[np.int64],
        labels: NDArray[np.float32],
        pixels: Mapping[str, PixelColumn],
    ) -> None:
        for found in (len(labels), *(len(column.rows) for column in pixels.values())):
            if found != len(rows):
                raise ValueError(f"{len(rows)} rows, {found} labels")
        super().__init__({_PIXELS: file, **{name: column.file for name, column in pixels.items()}}, rows)
        self.labels = labels
        self.pixels = dict(pixels)

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        chosen = np.asarray(places)
        images = torch.from_numpy(self._arrays[_PIXELS][self.rows[chosen]])
        return {_PIXELS: images.float().div_(255), **self._labels(chosen)}

    def _labels(self, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        columns = {LABELS: torch.from_numpy(self.labels[chosen])} if self.labels.shape[1] else {}
        for name, column in self.pixels.items():
            found = column.rows[chosen]
            columns[name] = pixel_column(column.task, self._arrays[name][np.maximum(found, 0)], found < 0)
        return columns

    def label_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The columns of the labels alone, in order, of some rows after the other."""
        for start in range(0, len(self), _AT_ONCE):
            yield tuple(self._labels(np.arange(start, min(start + _AT_ONCE, len(self)))).values())

"""Images of one size and their labels, served a batch at a time.

A batch has the columns `pixel_values [B, 3, H, W]` (float32 in [0, 1], RGB) and `labels [B, K]` (float32, NaN where
missing).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.rows import MappedRows


class ImageRows(MappedRows):
    """Images in a memory-mapped file, and their labels in memory.

    `rows[i]` is a dict of `pixel_values [3, H, W]` and `labels [K]`. Use `collate_images` with it.

    Args:
        file: `.npy`, uint8 `[M, 3, H, W]`.
        rows: `[N]`, which of the M images, in the order of this set.
        labels: `[N, K]` float32.

    Raises:
        ValueError: when rows and labels differ in length.
    """

    def __init__(self, file: Path, rows: NDArray[np.int64], labels: NDArray[np.float32]) -> None:
        if len(rows) != len(labels):
            raise ValueError(f"{len(rows)} rows, {len(labels)} labels")
        super().__init__({"pixel_values": file}, rows)
        self.labels = labels

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        chosen = np.asarray(places)
        pixels = torch.from_numpy(self._arrays["pixel_values"][self.rows[chosen]])
        return {"pixel_values": pixels.float().div_(255), "labels": torch.from_numpy(self.labels[chosen])}

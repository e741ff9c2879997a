"""Rows of numbers and categories as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.rows import BatchedRows


class OneHotRows(BatchedRows):
    """Rows in memory: `features [F]` of numbers and one-hot categories, and `labels [K]`.

    Use `collate_vectors` with it.

    Args:
        numbers: `[N, D]`.
        codes: `[N, C]`, the category of each of C columns; -1 where it is none of them.
        sizes: categories of each column; F = D + their sum.
        labels: `[N, K]`; None: there is no such column.
    """

    def __init__(self, numbers: Tensor, codes: Tensor, sizes: Sequence[int], labels: Tensor | None) -> None:
        self.numbers, self.codes, self.labels = numbers, codes, labels
        self.num_categories = sum(sizes)
        self._starts = torch.tensor([0, *np.cumsum(sizes)[:-1]], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        rows = torch.as_tensor(places)
        numbers, codes = self.numbers[rows], self.codes[rows].long()
        # One column more than there are, for the codes that are none.
        columns = torch.where(codes < 0, self.num_categories, codes + self._starts)
        one_hot = numbers.new_zeros(*numbers.shape[:-1], self.num_categories + 1).scatter_(-1, columns, 1.0)
        batch = {"features": torch.cat([numbers, one_hot[..., :-1]], dim=-1)}
        return batch if self.labels is None else {**batch, "labels": self.labels[rows]}

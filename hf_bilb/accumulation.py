"""Gradient accumulation: each micro-batch's exact share of its window's items.

The window's item counts must be known before its first backward pass. They come from `task_item_counts(batch)`, from
label columns (-100 or NaN = missing), or, where neither says anything, from the batch sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_bilb import distributed
from hf_bilb.decision import WindowShare
from hf_bilb.task_losses import valid_labels


@dataclass(frozen=True)
class AccumulationWindow:
    """Counts of a window of M micro-batches: on this rank and over all ranks, `[M, K]` each."""

    local: Tensor
    everywhere: Tensor

    @classmethod
    def count(cls, counts: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> AccumulationWindow:
        """From this rank's counts `[K]` of each micro-batch, with shares in `dtype` (the balancer's).

        Cost: one all-reduce of M K numbers per update.
        """
        local = torch.stack([count.to(dtype) for count in counts]).to(device)
        return cls(local, distributed.all_reduce_sum(local))

    def share(self, micro_batch: int) -> WindowShare:
        """The share of micro-batch number `micro_batch`."""
        totals = self.everywhere.sum(dim=0).clamp(min=1)
        everywhere = self.everywhere[micro_batch]
        fraction = everywhere.sum() / self.everywhere.sum().clamp(min=1)
        return WindowShare(self.local[micro_batch] / totals, everywhere / totals, fraction, len(self.local))


def label_counts(batch: Mapping[str, Any], label_names: Sequence[str], num_tasks: int) -> Tensor | None:
    """Valid labels per task `[K]`, or None when the columns do not say which label belongs to which task.

    One column `[B, K]` holds all tasks; K columns hold one task each, in the order of `label_names`.
    """
    columns = [batch.get(name) for name in label_names]
    if not columns or not all(isinstance(column, Tensor) for column in columns):
        return None
    tensors = [column for column in columns if isinstance(column, Tensor)]
    if len(tensors) == 1 and tensors[0].ndim == 2 and tensors[0].shape[1] == num_tasks:
        return valid_labels(tensors[0]).sum(dim=0)
    if len(tensors) == num_tasks:
        return torch.stack([valid_labels(column).sum() for column in tensors])
    return None

"""Gradient accumulation: each micro-batch's exact share of its window's items.

Under `balance_over: window` the counts come with the losses of a first pass. Under `micro_batch` the window's item
counts must be known before its first backward pass. They come from `task_item_counts(batch)`, from label columns (-100
or NaN = missing), or, where neither says anything, from the batch sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from hf_bilb import distributed
from hf_bilb.decision import WindowShare
from hf_bilb.errors import TaskLossError
from hf_bilb.task_losses import TaskLosses, valid_labels

logger = logging.getLogger(__name__)


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
        return WindowShare(self.local[micro_batch] / totals, everywhere / totals, fraction, fraction, len(self.local))


class ItemCounter:
    """How many items each task has in a batch, known before its forward pass.

    Args:
        given: the user's `task_item_counts(batch) -> [K]`, or None.
        label_names: label columns, the second source.
        task_names: the K tasks.
    """

    def __init__(
        self, given: Callable[[Mapping[str, Any]], Tensor] | None, label_names: Sequence[str], task_names: Sequence[str]
    ) -> None:
        self._given = given
        self._label_names = label_names
        self._task_names = task_names
        self._said = False

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Counts `[K]`; raises `TaskLossError` when `task_item_counts` returns something else."""
        num_tasks = len(self._task_names)
        if self._given is not None:
            counts: object = self._given(batch)
            if not isinstance(counts, Tensor) or counts.shape != (num_tasks,):
                raise TaskLossError(f"task_item_counts: returned {counts!r}, expected a tensor [{num_tasks}]")
            return counts
        of_labels = label_counts(batch, self._label_names, self._task_names)
        return torch.full((num_tasks,), batch_size(batch)) if of_labels is None else of_labels

    def check(self, batch: Mapping[str, Any], losses: TaskLosses) -> None:
        """Say once that batch sizes stand in for counts that differ from those of `losses`."""
        if self._said or self._given is not None or (losses.complete and not losses.counted):
            return
        self._said = True
        if not losses.complete or label_counts(batch, self._label_names, self._task_names) is None:
            logger.warning(
                "gradient accumulation, but the label columns %s do not tell how many items each task has in a whole "
                "window: micro-batches are weighted by size; give the Trainer task_item_counts(batch) -> [K]",
                self._label_names,
            )


def batch_size(batch: Mapping[str, Any]) -> float:
    """The number of examples of a batch, 1 where nothing in it tells."""
    return float(find_batch_size(batch) or 1)


def label_counts(batch: Mapping[str, Any], label_names: Sequence[str], task_names: Sequence[str]) -> Tensor | None:
    """Valid labels per task `[K]`, or None when the columns do not say which label belongs to which task.

    One column `[B, K]` holds all tasks; K columns hold one task each: that of their name where columns and tasks are
    called alike, else in the order of `label_names`.
    """
    num_tasks = len(task_names)
    names = task_names if set(label_names) == set(task_names) else label_names
    columns = [batch.get(name) for name in names]
    if not columns or not all(isinstance(column, Tensor) for column in columns):
        return None
    tensors = [column for column in columns if isinstance(column, Tensor)]
    if len(tensors) == 1 and tensors[0].ndim == 2 and tensors[0].shape[1] == num_tasks:
        return valid_labels(tensors[0]).sum(dim=0)
    if len(tensors) == num_tasks:
        return torch.stack([valid_labels(column).sum() for column in tensors])
    return None

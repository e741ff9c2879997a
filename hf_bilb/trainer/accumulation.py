"""Gradient accumulation: each micro-batch's exact share of its window's items.

Under `balance_over: window` the counts come with the losses of a first pass. Under `micro_batch` the window's item
counts must be known before its first backward pass: they are read from the batches (`hf_bilb.trainer.item_counts`). The
losses may come with counts of their own that say otherwise (labels coded -1, tasks left out of a dict): those count. So
the first window of a run is looked at by a forward pass without gradients; where the two differ, every window's counts
are taken from such a pass. Later windows are compared on the device, and a difference is read when the Trainer logs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_bilb.engine import reduction
from hf_bilb.engine.weighting import WindowShare
from hf_bilb.losses.contract import TaskLosses, short_names
from hf_bilb.trainer.item_counts import ItemCounter, tasks_have

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
        local = _stack(counts, device, dtype)
        return cls(local, reduction.all_reduce_sum(local))

    def share(self, micro_batch: int) -> WindowShare:
        """The share of micro-batch number `micro_batch`."""
        totals = self.everywhere.sum(dim=0).clamp(min=1)
        everywhere = self.everywhere[micro_batch]
        fraction = everywhere.sum() / self.everywhere.sum().clamp(min=1)
        local = self.local[micro_batch] / totals
        return WindowShare(local, everywhere / totals, fraction, fraction, len(self.local), micro_batch)


def _stack(counts: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.stack([count.to(device=device, dtype=dtype) for count in counts])


class WindowCounter:
    """Counts the windows of one run, and finds out whether the losses' own counts agree.

    Args:
        counter: counts of a batch, from the batch alone.
        task_names: the K tasks.
        device, dtype: of the shares, the balancer's.

    State, on every rank alike: whether windows are counted by a forward pass of their own. Not saved: a resumed run
    looks at its first window again.
    """

    def __init__(
        self, counter: ItemCounter, task_names: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._counter = counter
        self._task_names = list(task_names)
        self._device, self._dtype = device, dtype
        self._checked = self._by_pass = False
        # Tasks whose counts differed: on this rank since the last window, and on all ranks before it.
        self._differs = torch.zeros(len(self._task_names), dtype=torch.bool, device=self._device)
        self._differed: Tensor | None = None

    def window(
        self, batches: Sequence[Mapping[str, Any]], first_pass: Callable[[], list[TaskLosses]] | None
    ) -> AccumulationWindow:
        """The counts of the window that comes.

        Args:
            batches: its micro-batches on this rank.
            first_pass: runs the model on each without gradients; None where it cannot yet.

        Cost: one all-reduce of (M + 1) K numbers; in the first window of a run, or where counts differ in every one, a
        forward pass of each micro-batch.
        """
        if self._by_pass and first_pass is not None:
            return self._of(first_pass())
        counted = [self._counter.count(batch) for batch in batches]
        # The flags travel with the counts.
        local = _stack([*(each.num_items for each in counted), self._differs], self._device, self._dtype)
        total = reduction.all_reduce_sum(local)
        window, self._differed = AccumulationWindow(local[:-1], total[:-1]), total[-1]
        if self._checked or first_pass is None:
            return window
        self._checked = True
        return self._check_first(window, first_pass(), {task for each in counted for task in each.assumed})

    def _check_first(
        self, window: AccumulationWindow, losses: list[TaskLosses], assumed: set[str]
    ) -> AccumulationWindow:
        own = self._of(losses)
        # Where batch sizes stand in for counts that the losses have, agreement in one window says little.
        told = torch.tensor([bool(assumed) and any(each.counted for each in losses)], device=self._device)
        doubt = torch.tensor([task in assumed for task in self._task_names], device=self._device) & told
        differs = (own.local != window.local).any(dim=0) | doubt
        tasks = self._named(reduction.all_reduce_sum(differs.to(self._dtype)))
        if not tasks:
            return window
        self._by_pass = True
        logger.warning(
            "gradient accumulation: the batches do not tell how many items %s in a whole window, as num_items of the "
            "losses do; %s",
            tasks_have(tasks),
            _BY_PASS,
        )
        return own

    def _of(self, losses: Sequence[TaskLosses]) -> AccumulationWindow:
        return AccumulationWindow.count([each.num_items for each in losses], self._device, self._dtype)

    def compare(self, window: AccumulationWindow, micro_batch: int, losses: TaskLosses) -> None:
        """Take in the losses of a micro-batch of `window`. No device synchronisation: `due_message` reads."""
        if not self._by_pass:
            self._differs |= losses.num_items.to(self._dtype) != window.local[micro_batch]

    def due_message(self) -> str | None:
        """What is to be said when the Trainer logs; from then on windows are counted by a pass. Reads K numbers."""
        if self._by_pass or self._differed is None:
            return None
        tasks = self._named(self._differed)
        if not tasks:
            return None
        self._by_pass = True
        return (
            f"gradient accumulation: since the last log the batches told other counts than num_items of the losses for "
            f"{short_names(tasks)}, and the micro-batches were weighted by the former; from now on {_BY_PASS}"
        )

    def _named(self, flags: Tensor) -> list[str]:
        return [task for task, flag in zip(self._task_names, flags.tolist(), strict=True) if flag]


_BY_PASS = (
    "counts are taken from a forward pass without gradients over each window; give the Trainer task_item_counts(batch) "
    "-> [K] that agrees with num_items to spare it"
)

"""Exact evaluation losses: sums and counts per task over the whole set, every example counted once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_bilb.engine import reduction
from hf_bilb.losses.contract import TaskLosses, short_names
from hf_bilb.metrics.perplexity import LossMetrics
from hf_bilb.trainer.item_counts import tasks_have


class EvaluationLosses:
    """Sums S_k and counts N_k of an evaluation, on the device until `metrics` is asked for.

    Args:
        task_names: the K tasks.
        device: of the losses.
        only: the task of all rows, where the set is one of several: `<prefix>_loss` is its loss.
    """

    def __init__(self, task_names: Sequence[str], device: torch.device, only: str | None = None) -> None:
        self._task_names = tuple(task_names)
        self._only = only
        #: Batches of this rank, and whether batch sizes stand in for counts of some task in one of them.
        self.num_batches, self.assumed = 0, False
        num_tasks = len(self._task_names)
        self._sums = torch.zeros(
            2, num_tasks, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
        )

    def add(self, batch: TaskLosses) -> None:
        """Take in one batch of this rank."""
        self.num_batches += 1
        self.assumed |= not batch.counted
        here = batch.num_items > 0
        sums = torch.where(
            here, batch.losses.detach().to(self._sums.dtype) * batch.num_items, torch.zeros_like(batch.num_items)
        )
        self._sums += torch.stack([sums.to(self._sums.dtype), batch.num_items.to(self._sums.dtype)])

    def losses(self) -> dict[str, float]:
        """Task -> exact loss, of the tasks that have a label. Cost: one all-reduce of 2 K numbers and one host read."""
        sums, counts = reduction.all_reduce_sum(self._sums).tolist()
        found = {name: s / n for name, s, n in zip(self._task_names, sums, counts, strict=True) if n > 0}
        return found if self._only is None else {name: loss for name, loss in found.items() if name == self._only}

    def metrics(
        self, losses: Mapping[str, float], prefix: str, of_losses: LossMetrics | None = None
    ) -> dict[str, float]:
        """`<prefix>_loss` (unweighted mean of `losses`), `<prefix>_loss_<task>`, and those of `of_losses`."""
        if self._only is not None:
            return {f"{prefix}_loss": loss for loss in losses.values()}
        if not losses:
            return {}
        found = {"loss": sum(losses.values()) / len(losses), **{f"loss_{name}": loss for name, loss in losses.items()}}
        if of_losses is not None:
            found.update(of_losses.of_losses(losses))
        return {f"{prefix}_{key}": value for key, value in found.items()}

    def remarks(self, losses: Mapping[str, float], prefix: str) -> list[str]:
        """What a reader of `metrics` must know: tasks that are missing in it, and losses that are NaN."""
        expected = self._task_names if self._only is None else (self._only,)
        if not losses:
            missing = f"all labels of {short_names(expected)} are missing (NaN or -100)"
            return [f"{prefix}: {missing}; there is no {prefix}_loss"]
        found = []
        without = [name for name in expected if name not in losses]
        if without:
            found.append(
                f"{prefix}: {tasks_have(without)} no label here; {prefix}_loss is the mean of "
                f"{len(losses)} of {len(self._task_names)} tasks"
            )
        nan = [name for name, loss in losses.items() if math.isnan(loss)]
        if nan:
            found.append(
                f"{prefix}: the loss of {short_names(nan)} is nan; NaN labels stand for missing ones: leave them out "
                "before the mean (masked_mse, masked_l1, masked_bce_with_logits of hf_bilb.losses.masked do)"
            )
        return found


def own_part(
    inputs: Mapping[str, Any], batch_size: int, rank: int, remainder: int
) -> tuple[int, dict[str, Any] | None]:
    """The part of a rank's last evaluation batch that is no repetition to fill the batch up.

    The last global batch holds `remainder` examples in rank order, then repetitions (accelerate's BatchSamplerShard).

    Returns:
        how many examples are this rank's own (possibly none), and a batch of them, of one example at least, so that
        every rank runs the same forward passes (sharded models communicate in them); None for the batch when some
        tensor's first dimension is not the examples, so that it cannot be cut.
    """
    own = max(0, min(batch_size, remainder - rank * batch_size))
    part: dict[str, Any] = {}
    for name, value in inputs.items():
        length = (
            value.shape[0]
            if isinstance(value, Tensor) and value.ndim > 0
            else len(value)
            if isinstance(value, (list, tuple))
            else -1
        )
        if length != batch_size:
            return own, None
        part[name] = value[: max(own, 1)]
    return own, part

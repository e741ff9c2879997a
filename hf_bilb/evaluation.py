"""Exact evaluation losses: sums and counts per task over the whole set, every example counted once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_bilb import distributed
from hf_bilb.task_losses import TaskLosses


class EvaluationLosses:
    """Sums S_k and counts N_k of an evaluation, on the device until `metrics` is asked for."""

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, num_tasks, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)

    def add(self, batch: TaskLosses) -> None:
        """Take in one batch of this rank."""
        here = batch.num_items > 0
        sums = torch.where(here, batch.losses.detach().to(self._sums.dtype) * batch.num_items, torch.zeros_like(batch.num_items))
        self._sums += torch.stack([sums.to(self._sums.dtype), batch.num_items.to(self._sums.dtype)])

    def metrics(self, task_names: tuple[str, ...], prefix: str) -> dict[str, float]:
        """`<prefix>_loss` (unweighted mean of the tasks that have labels) and `<prefix>_loss_<task>`.

        Cost: one all-reduce of 2 K numbers and one host read. Tasks without a label get no entry.
        """
        sums, counts = distributed.all_reduce_sum(self._sums).tolist()
        losses = {name: s / n for name, s, n in zip(task_names, sums, counts) if n > 0}
        if not losses:
            return {}
        mean = sum(losses.values()) / len(losses)
        return {f"{prefix}_loss": mean, **{f"{prefix}_loss_{name}": loss for name, loss in losses.items()}}


def own_examples(batch_size: int, rank: int, remainder: int) -> int:
    """How many examples of a rank's last evaluation batch are no repetition that fills the batch up.

    The last global batch holds `remainder` examples in rank order, then repetitions (accelerate's BatchSamplerShard).
    """
    return max(0, min(batch_size, remainder - rank * batch_size))


def first_examples(inputs: Mapping[str, Any], batch_size: int, count: int) -> dict[str, Any] | None:
    """The first `count` examples of a batch, or None when some tensor's first dimension is not the batch."""
    cut: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.ndim == 0 or value.shape[0] != batch_size:
                return None
            cut[name] = value[:count]
        elif isinstance(value, (list, tuple)) and len(value) == batch_size:
            cut[name] = value[:count]
        else:
            return None
    return cut

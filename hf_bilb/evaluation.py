"""Exact evaluation losses: sums and counts per task over the whole set, every example counted once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_bilb import distributed
from hf_bilb.metrics.perplexity import LossMetrics
from hf_bilb.task_losses import TaskLosses


class EvaluationLosses:
    """Sums S_k and counts N_k of an evaluation, on the device until `metrics` is asked for."""

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self._sums = torch.zeros(
            2, num_tasks, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
        )

    def add(self, batch: TaskLosses) -> None:
        """Take in one batch of this rank."""
        here = batch.num_items > 0
        sums = torch.where(
            here, batch.losses.detach().to(self._sums.dtype) * batch.num_items, torch.zeros_like(batch.num_items)
        )
        self._sums += torch.stack([sums.to(self._sums.dtype), batch.num_items.to(self._sums.dtype)])

    def metrics(
        self, task_names: tuple[str, ...], prefix: str, of_losses: LossMetrics | None = None
    ) -> dict[str, float]:
        """`<prefix>_loss` (unweighted mean of the tasks that have labels), `<prefix>_loss_<task>`, and `of_losses`'.

        Cost: one all-reduce of 2 K numbers and one host read. Tasks without a label get no entry.
        """
        sums, counts = distributed.all_reduce_sum(self._sums).tolist()
        losses = {name: s / n for name, s, n in zip(task_names, sums, counts, strict=True) if n > 0}
        if not losses:
            return {}
        found = {"loss": sum(losses.values()) / len(losses), **{f"loss_{name}": loss for name, loss in losses.items()}}
        if of_losses is not None:
            found.update(of_losses.of_losses(losses))
        return {f"{prefix}_{key}": value for key, value in found.items()}


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

"""Which task's gradient is not finite, found when training has to stop: a loss can be finite and its slope not.

`sqrt` at 0 has a finite value and an infinite slope; a mean over no items, masked afterwards, has no slope at all. In
one backward pass it spreads: zero times infinity is NaN, so the gradient of every other task that shares an operation
with it is NaN, too. The slope of each loss along one direction in parameter space, a Jacobian-vector product, tells the
tasks apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_bilb.engine import reduction
from hf_bilb.losses.contract import TaskLosses


def tasks_with_nonfinite_slope(
    runs: Sequence[Callable[[], TaskLosses]], parameters: Sequence[Tensor], task_names: Sequence[str]
) -> list[str]:
    """Names of the tasks whose loss has an infinite or undefined slope in `parameters`, on any rank.

    Args:
        runs: one function for each micro-batch of this rank, which runs the model on it once more.
        parameters: the trainable ones, whole.
        task_names: the K tasks.

    Returns:
        the names; empty where none is found, or where an operation of the model has no second derivative.

    Cost: a forward pass and two backward passes of each micro-batch; one all-reduce of K numbers, one host read.
    """
    bad = torch.zeros(len(task_names), device=parameters[0].device)
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator).to(device=p.device, dtype=p.dtype) for p in parameters]
    for run in runs:
        with torch.enable_grad():
            slopes = _slopes(run().losses, parameters, direction)
        if slopes is not None:
            bad += ~slopes.isfinite()
    return [name for name, count in zip(task_names, reduction.all_reduce_sum(bad).tolist(), strict=True) if count]


def _slopes(losses: Tensor, parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor | None:
    """The K directional derivatives: of <J^T v, u> with respect to v, which is J u."""
    weights = torch.ones_like(losses, requires_grad=True)
    try:
        found = torch.autograd.grad(losses, parameters, weights, create_graph=True, allow_unused=True)
        parts = [(g * u).sum() for g, u in zip(found, direction, strict=True) if g is not None]
        total = torch.stack([part.to(losses.dtype) for part in parts]).sum()
        (slopes,) = torch.autograd.grad(total, weights)
    except RuntimeError:  # no second derivative (a fused kernel), or a graph that can be walked only once
        return None
    return slopes.detach()

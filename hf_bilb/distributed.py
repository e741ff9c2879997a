"""Exact data parallelism: what is reduced over ranks, and how every head is reached on every rank.

Balancing decisions are nonlinear in the losses, so they are taken on the global batch: sums and counts travel
(2K + 1 numbers), never means. Each rank then backpropagates its exact share, multiplied with the number of ranks
because `DistributedDataParallel`, FSDP and DeepSpeed average gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def data_parallel_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in `group` (None: the default group), 1 without an initialised process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `values` over the ranks of `group`; returns a new tensor. Cost: one all-reduce, none on a single rank."""
    if data_parallel_size(group) == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def reduce_losses(
    losses: Tensor, num_items: Tensor, auxiliary_loss: Tensor | None, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Global losses from each rank's local ones.

    Args:
        losses: `[K]` local losses S_k / max(N_k, 1); entries with N_k = 0 are ignored, NaN included.
        num_items: `[K]` local counts N_k.
        auxiliary_loss: scalar or None; averaged over the ranks as data parallelism averages its gradient.

    Returns:
        global losses `[K]` (zero where the global count is zero), global counts `[K]`, mean auxiliary loss `[]`;
        all detached, in float32 at least.

    Cost: one all-reduce of 2K + 1 numbers.
    """
    items = num_items.detach()
    here = items > 0
    local = torch.where(here, losses.detach().to(items.dtype), 0.0)
    extra = items.new_zeros(()) if auxiliary_loss is None else auxiliary_loss.detach().to(items.dtype).reshape(())
    ranks = data_parallel_size(group)
    if ranks == 1:
        # Sum and count need no detour: the loss itself, to the last bit.
        return local, items, extra
    num_tasks = items.numel()
    total = all_reduce_sum(torch.cat([local * items, items, extra.reshape(1)]), group)
    global_items = total[num_tasks : 2 * num_tasks]
    return total[:num_tasks] / global_items.clamp(min=1), global_items, total[-1] / ranks


class _Reach(torch.autograd.Function):
    """A scalar zero that depends on all its inputs and gives each of them a zero gradient (never 0 * inf = NaN)."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros((), dtype=d, device=v).expand(s) for s, d, v in ctx.like)


def reach(tensors: Iterable[Tensor]) -> Tensor | None:
    """Return a zero that makes the backward pass reach every tensor that needs a gradient, with zero gradients.

    A head whose task is absent on this rank but not on another must take part in the gradient reduction; otherwise
    `DistributedDataParallel` fails with "Expected to have finished reduction". Cost: one zero per tensor, no copy.
    Returns None when nothing needs a gradient.
    """
    needed = [tensor for tensor in tensors if tensor.requires_grad]
    return _Reach.apply(*needed) if needed else None

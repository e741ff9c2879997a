"""Exact data parallelism: what is reduced over ranks, and how every head is reached on every rank.

Balancing decisions are nonlinear in the losses, so they are taken on the global batch: sums and counts travel
(2K + 1 numbers), never means. Each rank then backpropagates its exact share, multiplied with the number of ranks
because `DistributedDataParallel`, FSDP and DeepSpeed average gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hf_bilb.engine.constants import zero
from hf_bilb.losses.contract import TaskLosses, at_least_float32


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


class GlobalBatch(NamedTuple):
    """The losses of the global batch, over all ranks and micro-batches; detached, in float32 at least.

    Attributes:
        losses: `[K]`, zero where the count is zero.
        num_items: `[K]`.
        present: bool `[K]`, where the count is not zero.
        auxiliary_loss: scalar, mean over ranks and micro-batches; zero where this rank has none.
        features: `[D]`, mean over all rows, or None.
        num_rows: scalar, how many rows stand behind `features`; zero without them.
        ranks: how many ranks it is over.
        has_auxiliary: whether this rank's losses bring an auxiliary one.
        single: whether it is one micro-batch of one rank.
    """

    losses: Tensor
    num_items: Tensor
    present: Tensor
    auxiliary_loss: Tensor
    features: Tensor | None
    num_rows: Tensor
    ranks: int = 1
    has_auxiliary: bool = False
    single: bool = False


@torch.no_grad()
def reduce_losses(
    micro_batches: Sequence[TaskLosses],
    with_features: bool = False,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> GlobalBatch:
    """Global losses from the local ones of each rank and micro-batch.

    Args:
        micro_batches: this rank's part of the global batch, one or more; losses S_k / max(N_k, 1), where entries with
            N_k = 0 are ignored, NaN included.
        with_features: take `router_features` `[B, D]` along, which every micro-batch then has.
        group: the ranks.
        alone: leave the other ranks out, which then need not call it; of one micro-batch.

    Cost: one all-reduce of 2K + 1 numbers, and D + 1 more with features.
    """
    ranks = 1 if alone else data_parallel_size(group)
    # At least as precise as the losses, whatever the type of the counts.
    items = [batch.num_items.to(at_least_float32(batch.losses.dtype)) for batch in micro_batches]
    nothing = zero(items[0].dtype, items[0].device)
    here = [count > 0 for count in items]
    local = [
        torch.where(present, batch.losses.to(count.dtype), zero(count.dtype, count.device))
        for batch, count, present in zip(micro_batches, items, here, strict=True)
    ]
    auxiliary_losses = [batch.auxiliary_loss for batch in micro_batches if batch.auxiliary_loss is not None]
    has_auxiliary = len(auxiliary_losses) > 0
    # A copy: a model may hand over what it writes into in the next step.
    auxiliary = _sum([x.to(nothing.dtype, copy=True).reshape(()) for x in auxiliary_losses] or [nothing])
    rows = [features.to(nothing.dtype) for features in _features(micro_batches)] if with_features else []
    features = [_sum([part.sum(dim=0) for part in rows]), nothing + sum(len(part) for part in rows)] if rows else []
    if ranks == 1 and len(micro_batches) == 1:
        # Sum and count need no detour: the loss itself, to the last bit.
        mean, num_rows = (features[0] / features[1].clamp(min=1), features[1]) if features else (None, nothing)
        return GlobalBatch(local[0], items[0], here[0], auxiliary, mean, num_rows, ranks, has_auxiliary, single=True)
    num_tasks = items[0].numel()
    sums = _sum([loss * count for loss, count in zip(local, items, strict=True)])
    numbers = [sums, _sum(items), auxiliary.reshape(1)]
    total = all_reduce_sum(torch.cat([*numbers, *(part.reshape(-1) for part in features)]), group)
    sums, counts, auxiliary, rest = total.split([num_tasks, num_tasks, 1, len(total) - 2 * num_tasks - 1])
    mean, num_rows = (rest[:-1] / rest[-1].clamp(min=1), rest[-1]) if features else (None, nothing)
    auxiliary = auxiliary.reshape(()) / (ranks * len(micro_batches))
    losses = sums / counts.clamp(min=1)
    return GlobalBatch(losses, counts, counts > 0, auxiliary, mean, num_rows, ranks, has_auxiliary)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum; a single one as it is, to the last bit."""
    return functools.reduce(torch.add, tensors)


def _features(micro_batches: Sequence[TaskLosses]) -> list[Tensor]:
    return [batch.router_features for batch in micro_batches if batch.router_features is not None]


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


class _ReachRest(torch.autograd.Function):
    """A loss as it is, with a backward pass that ends in zero gradients for the parameters it has not reached."""

    #: Number of the last backward pass that came here.
    pass_under_way = -1

    @staticmethod
    def forward(ctx: Any, loss: Tensor, parameters: list[Tensor]) -> Tensor:
        ctx.parameters = parameters
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # The first node of the pass: from here on every accumulated gradient is seen. Of several losses that are added
        # up, one node sees to all of them.
        task = torch._C._current_graph_task_id()
        if task == _ReachRest.pass_under_way:
            return gradients[0], None
        _ReachRest.pass_under_way = task
        parameters: list[Tensor] = ctx.parameters
        reached: set[int] = set()
        nodes = [get_gradient_edge(parameter).node for parameter in parameters]
        hooks = [node.register_hook(functools.partial(_note, reached, i)) for i, node in enumerate(nodes)]

        def reach_the_rest() -> None:
            for hook in hooks:
                hook.remove()
            with torch.enable_grad():
                zero = reach(parameter for i, parameter in enumerate(parameters) if i not in reached)
                if zero is not None:
                    zero.backward()

        # After the pass, inner ones included: those of reentrant checkpointing run within it.
        torch.autograd.Variable._execution_engine.queue_callback(reach_the_rest)
        return gradients[0], None


def _note(reached: set[int], number: int, *gradients: Any) -> None:
    reached.add(number)


def reach_rest(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Return `loss`; a backward pass through it gives a zero gradient to those of `parameters` that it does not reach.

    As `reach`, for `DistributedDataParallel` without `find_unused_parameters`, which waits for every parameter and
    takes none twice. Which ones are reached is seen in the backward pass itself: nothing before it tells, where
    reentrant checkpointing hides a part of the graph. Cost: a hook per parameter, and that of `reach` for the rest.
    """
    return _ReachRest.apply(loss, [parameter for parameter in parameters if parameter.requires_grad])

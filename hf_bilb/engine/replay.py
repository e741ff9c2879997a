"""Passes of the model over an update's micro-batches beside the one that counts: nothing of them stays behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_bilb.engine import reduction
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import TaskLosses

#: Runs the model on one micro-batch at its current parameters.
MicroBatch = Callable[[], TaskLosses]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever forward passes inside do to the buffers of `model` (BatchNorm), they are as before afterwards; and so is
    whether `DistributedDataParallel` will send them to all ranks at its next forward pass."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    # A forward pass without gradients takes them for sent: the ranks' buffers would part.
    wrapper = model if isinstance(model, DistributedDataParallel) else None
    due = wrapper is not None and wrapper.require_forward_param_sync
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                buffer.copy_(value)
                # A forward pass may have put another tensor in its place.
                setattr(module, name, buffer)
        if wrapper is not None:
            wrapper.require_forward_param_sync = due


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of `DistributedDataParallel`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def whole_parameters(model: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """The trainable parameters of `model` by name; raises `OptionError` for `what` where they are sharded."""
    named = {name: p for name, p in bare(model).named_parameters() if p.requires_grad}
    if _is_sharded(model):
        raise OptionError(f"{what} needs whole parameters, which FSDP has sharded")
    return named


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP holds parameters of `model`. Its modules take a third of a second to import: where nobody has
    imported them, nothing is sharded."""
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    wrapped = fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())
    return wrapped or (tensor is not None and any(isinstance(p, tensor.DTensor) for p in model.parameters()))


@contextmanager
def same_random_numbers(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Draws inside leave torch's generators alone, so that each such pass has the same dropout masks."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        yield


def evaluate(micro_batches: Sequence[MicroBatch], parameters: Iterable[Tensor]) -> list[TaskLosses]:
    """The losses of every micro-batch, without gradients."""
    with torch.no_grad(), same_random_numbers(parameters):
        return [run() for run in micro_batches]


def summed_gradients(
    parameters: Sequence[Tensor],
    parts: Iterable[TaskLosses],
    scalars: Sequence[Callable[[TaskLosses], Tensor]],
) -> list[list[Tensor | None]]:
    """For each of `scalars` its gradients, summed over `parts`; None where no part reaches the parameter.

    Args:
        parts: this rank's micro-batches, attached to the graph; taken one after the other.
        scalars: of one part each, its share.
    """
    totals: list[list[Tensor | None]] = [[None] * len(parameters) for _ in scalars]
    for part in parts:
        for number, (scalar, total) in enumerate(zip(scalars, totals, strict=True)):
            value = scalar(part)
            if not value.requires_grad:
                continue
            more = number + 1 < len(scalars)
            found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=more)
            for i, new in enumerate(found):
                old = total[i]
                total[i] = old if new is None else new if old is None else old + new
    return totals


def summed_over_ranks(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], group: dist.ProcessGroup | None
) -> list[Tensor | None]:
    """The sum over ranks; with several ranks None counts as zero, for what one does not reach another one may."""
    if reduction.data_parallel_size(group) == 1:
        return list(gradients)
    sums: list[Tensor | None] = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        total = torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
        dist.all_reduce(total, group=group)
        sums.append(total)
    return sums

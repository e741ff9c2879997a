"""Running an update's micro-batches again, and putting back what that has changed: the one place for both.

A pass of the model, or a step that is tried, can change random generators, buffers (BatchNorm), parameters, their
gradients and the optimizer. `unchanged` brings all of it back bit for bit; `RandomState` makes a pass draw as an
earlier one did.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_bilb.engine import reduction
from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.contract import TaskLosses, as_task_losses

#: Runs the model on one micro-batch at its current parameters.
MicroBatch = Callable[[], TaskLosses]
#: What a caller gives `step(reevaluate=...)`: the model on the same batch again.
Reevaluation = Callable[[], TaskLosses | Tensor | Mapping[str, Tensor]]


# --- putting back ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomState:
    """States of the generators that a model's forward pass may draw from: torch's (CPU and the run's device), Python's
    and numpy's default ones. Restored before a pass, it has the same dropout masks again."""

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any
    on: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """The present state; about 30 microseconds, no device synchronisation."""
        # The run's device is its process's current one. Without an index: not every kind of device takes it.
        of_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
        numpy = sys.modules.get("numpy")  # where nobody has imported it, nobody draws from it
        of_numpy = None if numpy is None else numpy.random.get_state()
        return cls(torch.get_rng_state(), of_device, random.getstate(), of_numpy, device)

    def restore(self) -> None:
        """Bring it back."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(self.on).set_rng_state(self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def run_as_before(state: RandomState, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, drawing from `state` on; the generators are left alone."""
    now = RandomState.capture(state.on)
    state.restore()
    try:
        return function(*arguments)
    finally:
        now.restore()


@contextmanager
def same_random_numbers(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Draws inside leave torch's generators alone, so that each such pass has the same dropout masks."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        yield


class Snapshot:
    """What passes and steps can change, as it is now; `restore` brings it back bit for bit, as often as wanted.

    Args:
        model: its buffers; and whether `DistributedDataParallel` will send them to all ranks at its next forward pass.
        parameters: their values, and which gradients they have.
        optimizer: everything that it remembers, in its state and in its groups.

    Memory: a copy of all of it, but for the gradients.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        parameters: Sequence[Tensor] = (),
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._buffers = [
            (module, name, buffer, (buffer.detach() if buffer.requires_grad else buffer).clone())
            for module in (() if model is None else model.modules())
            for name, buffer in module.named_buffers(recurse=False)
        ]
        # A forward pass without gradients takes them for sent: the ranks' buffers would part.
        self._wrapper = model if isinstance(model, DistributedDataParallel) else None
        self._due = self._wrapper is not None and self._wrapper.require_forward_param_sync
        self._parameters = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in parameters]
        self._optimizer = optimizer
        if optimizer is not None:
            self._state = {key: _copied(entries) for key, entries in optimizer.state.items()}
            # Some optimizers count, and remember, in their groups.
            self._groups = [_copied(_settings(group)) for group in optimizer.param_groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring it back."""
        for module, name, buffer, value in self._buffers:
            buffer.copy_(value)
            # A forward pass may have put another tensor in its place.
            setattr(module, name, buffer)
        if self._wrapper is not None:
            self._wrapper.require_forward_param_sync = self._due
        for parameter, value, gradient in self._parameters:
            parameter.copy_(value)
            parameter.grad = gradient
        if self._optimizer is not None:
            self._restore_optimizer(self._optimizer)

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        for key in list(optimizer.state):
            if key in self._state:
                _bring_back(optimizer.state[key], self._state[key])
            else:  # allocated by the step
                del optimizer.state[key]
        for group, saved in zip(optimizer.param_groups, self._groups, strict=True):
            parameters = group["params"]
            _bring_back(group, saved | {"params": parameters})


@contextmanager
def unchanged(
    model: nn.Module | None = None,
    parameters: Sequence[Tensor] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[None]:
    """Whatever happens inside to what a `Snapshot` of these holds, it is as before afterwards."""
    snapshot = Snapshot(model, parameters, optimizer)
    try:
        yield
    finally:
        snapshot.restore()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _copied(entries: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in entries.items()
    }


def _bring_back(entries: dict[str, Any], saved: dict[str, Any]) -> None:
    """Make `entries` what `saved` says, in place where a tensor can stay where it is."""
    for key in [key for key in entries if key not in saved]:
        del entries[key]
    for key, value in saved.items():
        now = entries.get(key)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and now.shape == value.shape:
            now.copy_(value)
        else:
            entries[key] = value


# --- running again ---------------------------------------------------------------------------------------------------


def as_micro_batches(
    runs: Reevaluation | Sequence[Reevaluation],
    task_names: Sequence[str],
    counted: bool,
    check: Callable[[TaskLosses], None] | None,
) -> list[MicroBatch]:
    """`runs` with their losses brought to `TaskLosses`.

    Args:
        counted: whether `backward` had counts; losses without them are then refused.
        check: raises for losses that the balancer cannot take; None: nothing is to be checked.

    Raises:
        TaskLossError: when one of them is called and does not fit.
    """

    def run(reevaluate: Reevaluation) -> TaskLosses:
        losses = reevaluate()
        if counted and not isinstance(losses, TaskLosses):
            raise TaskLossError(
                "reevaluate: returned losses without counts, though backward() had num_items; expected "
                "hf_bilb.losses.contract.TaskLosses(losses, num_items)"
            )
        batch = losses if isinstance(losses, TaskLosses) else as_task_losses(losses, None, task_names)
        if check is not None:
            check(batch)
        return batch

    return [functools.partial(run, one) for one in ([runs] if callable(runs) else runs)]


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of `DistributedDataParallel`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def whole_parameters(model: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """The trainable parameters of `model` by name; raises `OptionError` for `what` where they are sharded."""
    named = {name: p for name, p in bare(model).named_parameters() if p.requires_grad}
    if _is_sharded(model, named.values()):
        raise OptionError(f"{what} needs whole parameters, which FSDP has sharded")
    return named


def _is_sharded(model: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Whether FSDP holds `parameters` of `model`. Its modules take a third of a second to import: where nobody has
    imported them, nothing is sharded."""
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    wrapped = fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())
    return wrapped or (tensor is not None and any(isinstance(p, tensor.DTensor) for p in parameters))


def run_all(micro_batches: Sequence[MicroBatch]) -> list[TaskLosses]:
    """The losses of every micro-batch."""
    return [run() for run in micro_batches]


def evaluate(micro_batches: Sequence[MicroBatch], parameters: Iterable[Tensor]) -> list[TaskLosses]:
    """The losses of every micro-batch, without gradients."""
    with torch.no_grad(), same_random_numbers(parameters):
        return run_all(micro_batches)


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

"""The contract of losses: what a model, or a user's function, hands over for K tasks.

`losses[k] = S_k / max(N_k, 1)`: the sum over the task's valid items divided by their number, **masked before the
reduction**. A NaN label that reaches the graph poisons the backward pass whatever is done to the mean afterwards
(`nan_to_num`, `where`, multiplying with zero); `hf_bilb.losses.masked` replaces masked entries before any arithmetic. A
task without valid items has loss 0, count 0, and stays connected to the graph with zero gradients: its head is
"reached", which `DistributedDataParallel` needs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_bilb.config.options import nearest
from hf_bilb.errors import OptionError, TaskLossError


@dataclass(frozen=True)
class TaskLosses:
    """What one batch on one rank gives.

    Attributes:
        losses: `[K]`, in the order of `task_names`, attached to the graph.
        num_items: `[K]`, valid items behind each loss, detached; zero = the task is absent here.
        router_features: `[B, D]` or None.
        auxiliary_loss: scalar that is added to the objective as it is, or None.
        complete: False when tasks of a dict were missing or constant: their heads are not connected to `losses`.
        counted: False where `num_items` was not known for some task and the batch size stands in.
        shared_features: what the heads are given, attached to the graph, for gradient methods with `gradients:
            features`; one tensor or several, the examples of the batch along the first dimension.
    """

    losses: Tensor
    num_items: Tensor
    router_features: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    complete: bool = True
    counted: bool = True
    shared_features: tuple[Tensor, ...] = ()

    def detach(self) -> TaskLosses:
        """The same numbers without their graph."""
        features, auxiliary = self.router_features, self.auxiliary_loss
        return replace(
            self,
            losses=self.losses.detach(),
            router_features=None if features is None else features.detach(),
            auxiliary_loss=None if auxiliary is None else auxiliary.detach(),
            shared_features=(),
        )


def as_task_losses(
    losses: Tensor | Mapping[str, Tensor],
    num_items: Tensor | Mapping[str, Tensor | float] | None,
    task_names: Sequence[str],
    *,
    default_items: float = 1.0,
    router_features: Tensor | None = None,
    auxiliary_loss: Tensor | None = None,
    shared_features: Tensor | Sequence[Tensor] | None = None,
) -> TaskLosses:
    """Bring losses and counts of either form to vectors `[K]`.

    Args:
        losses: tensor `[K]` (fast) or dict task -> scalar; a task missing from the dict is absent.
        num_items: tensor `[K]`, dict, or None, which stands for `default_items` items of every task in `losses`.
        task_names: the K names, in order.
        default_items: the batch size, where `num_items` is None.

    Raises:
        TaskLossError: wrong shape, a name that is no task, a dict with no tasks, or a loss that is no scalar.

    Cost: no device synchronisation; a dict costs one `stack` of K scalars (a vector is faster from K of about 40).
    """
    names = list(task_names)
    complete = True
    if isinstance(losses, Mapping):
        _check_names("losses", losses, names)
        vector = _stack(losses, names)
        # A constant (zero for an absent task) connects its head as little as no entry does.
        complete = len(losses) == len(names) and all(loss.requires_grad for loss in losses.values())
    else:
        vector = losses
        if not isinstance(vector, Tensor) or vector.shape != (len(names),):
            got = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
            raise TaskLossError(
                f"losses: got {got}, expected a tensor [{len(names)}] or a dict, one loss for each of "
                f"{short_names(names)}"
            )
    counts = _as_counts(num_items, losses, vector, names, default_items)
    if not vector.is_floating_point():
        raise TaskLossError(f"losses: got dtype {vector.dtype}, expected a floating point tensor")
    if auxiliary_loss is not None and auxiliary_loss.numel() != 1:
        raise TaskLossError(f"auxiliary_loss: got shape {tuple(auxiliary_loss.shape)}, expected a scalar")
    features = [shared_features] if isinstance(shared_features, Tensor) else shared_features or ()
    return TaskLosses(vector, counts, router_features, auxiliary_loss, complete, num_items is not None, tuple(features))


def _as_counts(
    num_items: Tensor | Mapping[str, Tensor | float] | None,
    losses: Tensor | Mapping[str, Tensor],
    vector: Tensor,
    names: list[str],
    default_items: float,
) -> Tensor:
    dtype = at_least_float32(vector.dtype)
    if num_items is None:
        counts = torch.full((len(names),), default_items, dtype=dtype, device=vector.device)
    elif isinstance(num_items, Mapping):
        _check_names("num_items", num_items, names)
        missing = [name for name in (losses if isinstance(losses, Mapping) else names) if name not in num_items]
        if missing:
            raise TaskLossError(f"num_items: no count for task {missing[0]!r}, which has a loss")
        values = [torch.as_tensor(num_items.get(name, 0.0), dtype=dtype, device=vector.device) for name in names]
        counts = torch.stack([value.detach().reshape(()) for value in values])
    elif isinstance(num_items, Tensor) and num_items.shape == (len(names),):
        # A copy: a model may hand over what it writes into in the next step.
        counts = num_items.detach() if num_items.requires_grad else num_items
        counts = counts.to(device=vector.device, dtype=dtype, copy=True)
    else:
        got = f"shape {tuple(num_items.shape)}" if isinstance(num_items, Tensor) else type(num_items).__name__
        raise TaskLossError(f"num_items: got {got}, expected a tensor [{len(names)}], one count for each task")
    if isinstance(losses, Mapping) and len(losses) < len(names):
        # Whatever its count says: a task without a loss is absent.
        counts = counts * torch.tensor([name in losses for name in names], device=vector.device)
    return counts


@functools.cache
def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type for sums and counts of losses of `dtype`: those of pixels overflow half precision."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.promote_types(dtype, torch.float32)


def _stack(losses: Mapping[str, Tensor], names: list[str]) -> Tensor:
    if not losses:
        raise TaskLossError(f"losses: the dict is empty, expected at least one of the tasks {short_names(names)}")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TaskLossError(f"losses: task {name!r} has {got}, expected a scalar tensor")
    zero = next(iter(losses.values())).new_zeros(())
    return torch.stack([losses[name].reshape(()) if name in losses else zero for name in names])


def _check_names(what: str, given: Mapping[str, object], names: list[str]) -> None:
    for name in given.keys() - set(names):
        raise TaskLossError(f"{what}: {name!r} is no task{nearest(str(name), names)}; tasks: {short_names(names)}")


def short_names(names: Sequence[str]) -> str:
    """The names for a message, the first twelve where there are more."""
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown}, ... ({len(names)} in all)"


def check_task_names(task_names: Sequence[str], path: str = "task_names") -> tuple[str, ...]:
    """Return the names as a tuple; raise `OptionError` when there is none, one is not a string, empty or repeated."""
    names = tuple(task_names)
    if not names:
        raise OptionError(f"{path}: is empty, expected at least one name")
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise OptionError(f"{path}: {name!r} is not valid, expected a non-empty string")
        if name in seen:
            raise OptionError(f"{path}: {name!r} stands twice, expected K different names")
        seen.add(name)
    return names

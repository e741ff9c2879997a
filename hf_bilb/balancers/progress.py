"""The step of a method whose own parameters follow how far the losses have come (`ProgressObjective`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_bilb import distributed
from hf_bilb.balancers.optimizer import OwnOptimizer
from hf_bilb.distributed import GlobalBatch
from hf_bilb.lower_level import MicroBatch, buffers_kept
from hf_bilb.objective import Derivatives, ProgressObjective, Scalar
from hf_bilb.options import OptionError


class Progress(nn.Module):
    """The losses of the last update, until those of the next one are known.

    State: `losses [K]`; `active [K]`, the tasks that F ran over; whether they are still to be compared.
    """

    losses: Tensor
    active: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("losses", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("active", torch.zeros(num_tasks, dtype=torch.bool))
        # On the host: whether an update has ended since the last comparison is known without looking at a loss.
        self.due = False

    @torch.no_grad()
    def remember(self, losses: Tensor, active: Tensor) -> None:
        """An update has ended with these losses."""
        self.losses.copy_(losses)
        self.active.copy_(active)
        self.due = True

    def get_extra_state(self) -> Tensor:
        """`due`, as a part of the state."""
        return torch.tensor(self.due)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore `due`."""
        self.due = bool(state)


class Follower:
    """Steps the parameters of a `ProgressObjective` by dP/dtheta before the model's step minus dP/dtheta after it.

    Args:
        objective: the method.
        num_tasks: K.
        differentiate: differentiates a scalar of the objective's at global losses, over the active tasks.
        optimizer: of the objective's parameters.

    Attributes:
        progress: the state of `next_batch`; None for `same_batch`.
        model: what `same_batch` runs, where it is known: its buffers (BatchNorm) are then kept.
    """

    def __init__(
        self,
        objective: ProgressObjective,
        num_tasks: int,
        differentiate: Callable[[GlobalBatch, Tensor, Scalar], Derivatives],
        optimizer: OwnOptimizer,
    ) -> None:
        self._objective = objective
        self._differentiate = differentiate
        self._optimizer = optimizer
        self.progress = Progress(num_tasks) if objective.reevaluate == "next_batch" else None
        self.model: nn.Module | None = None

    def begin(self, whole: GlobalBatch, active: Tensor) -> None:
        """Before F is evaluated: compare the last update with this one (of several micro-batches: the first)."""
        progress = self.progress
        if progress is not None and progress.due:
            last = whole._replace(losses=progress.losses, present=progress.active)
            self._step(last, whole, active & progress.active)
            progress.due = False

    def end(
        self,
        whole: GlobalBatch,
        active: Tensor,
        last_losses: Tensor,
        micro_batches: Sequence[MicroBatch] | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        """After the model's step: compare with the same batch, or remember this update's losses for the next one.

        Args:
            whole: the update's losses. active: the tasks that F ran over. last_losses: known ones `[K]` of every task.
            micro_batches: this rank's part of the update; each call runs the model.

        Raises:
            OptionError: `same_batch` without `micro_batches`.
        """
        self._optimizer.discard()  # dF/dtheta, which is zero
        if self.progress is not None:
            self.progress.remember(last_losses, active)
            return
        if micro_batches is None:
            raise OptionError(
                "reevaluate: 'same_batch' needs balancer.step(reevaluate=lambda: model(batch)), 'next_batch' does not"
            )
        with torch.no_grad(), nullcontext() if self.model is None else buffers_kept(self.model):
            again = distributed.reduce_losses([run() for run in micro_batches], False, group)
        self._step(whole, again, active)

    def _step(self, before: GlobalBatch, after: GlobalBatch, active: Tensor) -> None:
        slopes = [self._differentiate(losses, active, self._objective.progress) for losses in (before, after)]
        first, second = (slope.parameter_gradients for slope in slopes)
        self._optimizer.accumulate([b - a for b, a in zip(first, second, strict=True)], after.num_items)
        self._optimizer.step()

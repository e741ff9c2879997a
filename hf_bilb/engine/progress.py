"""The step of a method whose own parameters follow how far the losses have come (`ProgressObjective`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_bilb.engine import reduction
from hf_bilb.engine.checks import LossChecks
from hf_bilb.engine.constants import one
from hf_bilb.engine.monitor import Monitor
from hf_bilb.engine.objective import ProgressObjective, StepProgress, progress_gradients
from hf_bilb.engine.optimizer import OwnOptimizer
from hf_bilb.engine.records import Normalization
from hf_bilb.engine.reduction import GlobalBatch
from hf_bilb.engine.replay import MicroBatch, run_all, unchanged
from hf_bilb.errors import OptionError


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
    """Steps the parameters of a `ProgressObjective` by what a step of the model has done to the losses.

    Args:
        objective: the method.
        num_tasks: K.
        normalization: of the losses.
        optimizer: of the objective's parameters.
        checks: says which losses the method can take.
        known_losses: global losses `[K]` in which the last known ones stand for those of absent tasks.
        monitor: is told whether a step could be taken.

    Attributes:
        progress: the state of `next_batch`; None for the others.
        model: what `same_batch` runs, where it is known: its buffers (BatchNorm) are then kept.
    """

    def __init__(
        self,
        objective: ProgressObjective,
        num_tasks: int,
        normalization: Normalization,
        optimizer: OwnOptimizer,
        checks: LossChecks,
        known_losses: Callable[[GlobalBatch], Tensor],
        monitor: Monitor,
    ) -> None:
        self._objective = objective
        self._normalization = normalization
        self._optimizer = optimizer
        self._checks = checks
        self._known_losses = known_losses
        self._monitor = monitor
        self.progress = Progress(num_tasks) if objective.reevaluate == "next_batch" else None
        self.model: nn.Module | None = None

    def begin(self, whole: GlobalBatch, active: Tensor) -> None:
        """Before F is evaluated: compare the last update with this one (of several micro-batches: the first)."""
        progress = self.progress
        if progress is not None and progress.due:
            compared = active & progress.active
            step = StepProgress(progress.losses, self._known_losses(whole), progress.active, compared)
            self._step(step, whole.num_items)
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
            NonFiniteLossError: a loss after the step is none that the method can take.
        """
        if self._objective.reevaluate == "look_ahead":
            return
        if self.progress is not None:
            self.progress.remember(last_losses, active)
            return
        if micro_batches is None:
            name_of = self._objective.name_of
            raise OptionError(
                f"{name_of('same_batch')} needs balancer.step(reevaluate=lambda: model(batch)), "
                f"{name_of('next_batch')} does not"
            )
        with torch.no_grad(), unchanged(self.model):
            again = reduction.reduce_losses(run_all(micro_batches), False, group)
        self.learn(last_losses, whole.num_items, [again], active, " after the model's step")

    def learn(
        self, before: Tensor, num_items: Tensor, after: Sequence[GlobalBatch], active: Tensor, where: str
    ) -> None:
        """Compare one batch's losses before a step, `[K]` with the last known ones of absent tasks, and after it, or
        after two opposite ones.

        Losses that are not finite teach nothing. One host read for each of `after`.

        Raises:
            NonFiniteLossError: a loss is finite, but none that the method can take; the message says `where`.
        """
        known = [self._known_losses(losses) for losses in after]
        if not all(self._checks.check_after(*losses, where) for losses in zip(after, known, strict=True)):
            return
        first, *rest = known
        self._step(StepProgress(before, first, active, active, rest[0] if rest else None), num_items)

    def _step(self, step: StepProgress, num_items: Tensor) -> None:
        # Finite under every normalization.
        placeholder = one(step.after.dtype, step.after.device)
        after = torch.where(step.compared, step.after, placeholder)
        before = torch.where(step.active, step.before, placeholder)
        opposite = None if step.opposite is None else torch.where(step.compared, step.opposite, placeholder)
        step = step._replace(before=before, after=after, opposite=opposite)
        gradients = progress_gradients(self._objective, self._normalization, step)
        self._optimizer.accumulate(gradients, num_items, torch.dot(after, after) + torch.dot(before, before))
        taken = self._optimizer.step()
        if taken is not None:
            self._monitor.learn(taken, after, before)

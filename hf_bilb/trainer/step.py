"""One step of the model's optimizer: the micro-batches before it, what is decided on them, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_bilb.engine.balancer import LossBalancer
from hf_bilb.engine.gradient_balancer import GradientBalancer
from hf_bilb.engine.replay import RandomState, Snapshot, run_as_before, unchanged
from hf_bilb.engine.weighting import Weighting, WindowShare
from hf_bilb.losses.contract import TaskLosses
from hf_bilb.trainer.accumulation import AccumulationWindow

#: What stands for the task where losses are finite and their gradient is not.
GRADIENT = "gradient"

Forward = Callable[[nn.Module, Mapping[str, Any]], TaskLosses]


class Problem(NamedTuple):
    """Why a step cannot be taken.

    Attributes:
        message: one line.
        task: whose loss it is, `auxiliary_loss`, or `gradient`.
        refused: whether the value is finite, but none that the method can take: no dropped step mends it.
    """

    message: str
    task: str
    refused: bool


class Part(NamedTuple):
    """What a micro-batch, or a window as a whole, adds to the step's logs.

    Attributes:
        weighting: of the tasks.
        value: its part of F, detached.
        share: of the window; None for all of it.
    """

    weighting: Weighting
    value: Tensor
    share: WindowShare | None


class OptimizerStep:
    """What lies between two steps of the optimizer on this rank.

    The micro-batches can be run more than once, with the same dropout masks and with the buffers as before.

    Args:
        batches: the inputs of each micro-batch.
        forward: a weak reference to what runs a model on one of them and returns its losses: the Trainer's, which holds
            this step.
        device: whose random generator the model draws from.
        replayed: remember the random states, so that `runs` can be called after the pass that counts.

    Attributes:
        number: of the micro-batch under way; -1 before the first.
        calls: of `compute_loss` in the micro-batch under way; None between two.
        begun: whether the first micro-batch has begun and the optimizer has not stepped yet.
        window: counts of the micro-batches, each of which is balanced on its own; None where there is one.
        weighting: that of the whole window (`balance_over: window`); None: each micro-batch has its own.
        parts: what has been decided so far.
        gradient_norm: of the whole gradient, once it is known and where it is to be looked at.
    """

    def __init__(
        self, batches: Sequence[Mapping[str, Any]], forward: WeakMethod[Forward], device: torch.device, replayed: bool
    ) -> None:
        self.batches = batches
        self.number = -1
        self.calls: int | None = None
        self.begun = False
        self.window: AccumulationWindow | None = None
        self.weighting: Weighting | None = None
        self.parts: list[Part] = []
        self.gradient_norm: Tensor | None = None
        self._weak_forward = forward
        self._device = device
        self._replayed = replayed
        self._random_states: list[RandomState] = []
        self._balancer: LossBalancer | None = None
        self._before: dict[str, Tensor] | None = None
        self._buffers: Snapshot | None = None

    # --- its micro-batches ---------------------------------------------------------------------------------------

    def begin(self, balancer: LossBalancer, model: nn.Module, undoable: bool) -> None:
        """Before its first micro-batch.

        Args:
            balancer: the balancer at work.
            model: the model; its buffers (BatchNorm) are kept when `undoable`.
            undoable: keep what `undo` needs (`nonfinite_loss: skip`): copies of the balancer's state and the buffers.
        """
        self._balancer = balancer
        self.parts, self.weighting, self.gradient_norm = [], None, None
        self._before = balancer.snapshot() if undoable else None
        self._buffers = Snapshot(model) if undoable else None
        self.begun = True

    def next(self) -> None:
        """The pass that counts of the next micro-batch begins: draw as its first pass did, or remember how it draws."""
        if self.number < len(self._random_states):
            self._random_states[self.number].restore()
        elif self._replayed:
            self._random_states.append(RandomState.capture(self._device))
        self.calls = 0

    def window_losses(self, model: nn.Module) -> list[TaskLosses]:
        """The losses of the window's micro-batches, by a first pass; a gradient method takes in their gradients."""
        balancer = self._balancer
        if not isinstance(balancer, GradientBalancer) or not balancer.needs_gradients:
            return self.first_pass(model)
        losses = self.first_pass(model, balancer.gather)
        if balancer.gathers_again:
            balancer.forget_gathered()
            losses = self.first_pass(model, balancer.gather)
        return losses

    def first_pass(self, model: nn.Module, look: Callable[[TaskLosses], None] | None = None) -> list[TaskLosses]:
        """Run every micro-batch; the passes that follow draw the same random numbers.

        Args:
            model: the model, wrapped or not.
            look: is given the losses of each with their graph; without it there is none.

        Cost: one forward pass of each; a copy of the model's buffers.
        """
        losses = []
        # What comes back here is no pass that DistributedDataParallel should wait for.
        quiet = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
        with torch.set_grad_enabled(look is not None), unchanged(model), quiet:
            for number, batch in enumerate(self.batches):
                if number < len(self._random_states):
                    self._random_states[number].restore()  # run once more
                else:
                    self._random_states.append(RandomState.capture(self._device))
                found = self._forward(model, batch)
                if look is not None:
                    look(found)
                losses.append(found.detach())
        return losses

    def runs(self, model: nn.Module) -> list[Callable[[], TaskLosses]]:
        """For each micro-batch a function that runs `model` on it once more, drawing as the pass that counts does, and
        leaves the random generators alone. Before that pass: a single micro-batch, or after `first_pass`."""
        if not self._random_states and len(self.batches) == 1:
            self._random_states.append(RandomState.capture(self._device))
        parts = zip(self._random_states, self.batches, strict=True)
        return [partial(run_as_before, state, self._forward, model, batch) for state, batch in parts]

    def again(self, model: nn.Module) -> list[Callable[[], TaskLosses]]:
        """As `runs`; where the random states were not remembered, with random numbers of its own."""
        if len(self._random_states) == len(self.batches):
            return self.runs(model)
        return [partial(self._forward, model, batch) for batch in self.batches]

    def _forward(self, model: nn.Module, batch: Mapping[str, Any]) -> TaskLosses:
        forward = self._weak_forward()
        if forward is None:
            raise RuntimeError("the Trainer of this step is gone")
        return forward(model, batch)

    # --- what is decided -----------------------------------------------------------------------------------------

    def problem(self, step: int) -> Problem | None:
        """What is wrong with the losses or the gradient; None when nothing is, or nothing was decided. One host read.

        Args:
            step: its number, for the message.
        """
        if not self.parts or self._balancer is None:
            return None
        norms = [] if self.gradient_norm is None else [self.gradient_norm]
        refused, numbers = self._balancer.refused([part.weighting for part in self.parts], *norms)
        if refused is not None:
            return Problem(*self._balancer.describe_invalid(refused, step))
        if not all(map(math.isfinite, numbers)):
            return Problem(f"the gradient is not finite at step {step}, though all losses are", GRADIENT, False)
        return None

    def largest_loss(self) -> tuple[str, float]:
        """The task with the largest loss of the step, by size, and that loss; "" where there is none. Reads the
        device."""
        if not self.parts or self._balancer is None:
            return "", 0.0
        losses = torch.stack([part.weighting.losses.abs() for part in self.parts]).amax(dim=0)
        k = int(losses.argmax())
        return self._balancer.task_names[k], float(losses[k])

    # --- its end -------------------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Bring the balancer and the model's buffers back to where they were (parameters have not moved yet)."""
        if self._before is None or self._buffers is None or self._balancer is None:
            raise RuntimeError("this step was not begun as undoable")
        self._balancer.rollback(self._before)
        self._buffers.restore()
        self.begun = False

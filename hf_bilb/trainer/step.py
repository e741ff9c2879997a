"""One update of the model: were its losses valid, and what was there before it?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_bilb.engine.balancer import LossBalancer
from hf_bilb.engine.weighting import Weighting

#: What stands for the task where losses are finite and their gradient is not.
GRADIENT = "gradient"


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


class Update:
    """The micro-batches between two optimizer steps.

    Args:
        balancer: the balancer at work.
        model: the model; its buffers (BatchNorm) are kept when `undoable`.
        undoable: keep what `undo` needs (`nonfinite_loss: skip`): copies of the balancer's state and the buffers.
    """

    def __init__(self, balancer: LossBalancer, model: nn.Module, undoable: bool) -> None:
        self._balancer = balancer
        self._model = model
        self._decisions: list[Weighting] = []
        self._state = balancer.snapshot() if undoable else None
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()} if undoable else {}

    @property
    def empty(self) -> bool:
        """Whether no decision has been taken (an ordinary model with one task)."""
        return not self._decisions

    def add(self, decision: Weighting) -> None:
        """Take in one micro-batch's decision (K numbers, detached)."""
        self._decisions.append(decision)

    def problem(self, step: int, gradient_norm: Tensor | None = None) -> Problem | None:
        """What is wrong with the losses, or with the gradient of this norm; None when nothing is. One host read."""
        if self.empty:
            return None
        # Read as they are, and looked at here: fewer operations on the device than an answer of yes or no.
        flags = [decision.valid for decision in self._decisions]
        dtype = torch.float32 if gradient_norm is None else gradient_norm.dtype
        norms = [] if gradient_norm is None else [gradient_norm.detach().to(flags[0].device)]
        numbers = torch.stack([*(flag.to(dtype) for flag in flags), *norms]).tolist()
        valid, norm = numbers[: len(flags)], numbers[len(flags) :]
        if not all(valid):
            return Problem(*self._balancer.describe_invalid(self._decisions[valid.index(0.0)], step))
        if not all(map(math.isfinite, norm)):
            return Problem(f"the gradient is not finite at step {step}, though all losses are", GRADIENT, False)
        return None

    def largest_loss(self) -> tuple[str, float]:
        """The task with the largest loss of the update, by size, and that loss. Reads the device."""
        losses = torch.stack([decision.losses.abs() for decision in self._decisions]).amax(dim=0)
        k = int(losses.argmax())
        return self._balancer.task_names[k], float(losses[k])

    def undo(self) -> None:
        """Bring the balancer and the model's buffers back to where they were (parameters have not moved yet)."""
        if self._state is None:
            raise RuntimeError("this update was not begun as undoable")
        self._balancer.rollback(self._state)
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                buffer.copy_(self._buffers[name])

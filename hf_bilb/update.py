"""One update of the model: were its losses valid, and what was there before it?"""

from __future__ import annotations

import torch
from torch import nn

from hf_bilb.balancers.base import LossBalancer
from hf_bilb.decision import Decision


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
        self._decisions: list[Decision] = []
        self._state = balancer.snapshot() if undoable else None
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()} if undoable else {}

    @property
    def empty(self) -> bool:
        """Whether no decision has been taken (an ordinary model with one task)."""
        return not self._decisions

    def add(self, decision: Decision) -> None:
        """Take in one micro-batch's decision (K numbers, detached)."""
        self._decisions.append(decision)

    def problem(self, step: int) -> tuple[str, str, bool] | None:
        """None when all losses are valid, else (message, task, whether a logarithm cannot take it). One host read."""
        if self.empty or bool(torch.stack([decision.valid for decision in self._decisions]).all()):
            return None
        first = next(decision for decision in self._decisions if not bool(decision.valid))
        return self._balancer.describe_invalid(first, step)

    def undo(self) -> None:
        """Bring the balancer and the model's buffers back to where they were (parameters have not moved yet)."""
        if self._state is None:
            raise RuntimeError("this update was not begun as undoable")
        self._balancer.rollback(self._state)
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                buffer.copy_(self._buffers[name])

"""One update of the model: were its losses valid, and what was there before it?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        self._codes: Tensor | None = None
        self._losses: Tensor | None = None
        self._state = balancer.state_dict() if undoable else None
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()} if undoable else {}

    @property
    def empty(self) -> bool:
        """Whether no decision has been taken (an ordinary model with one task)."""
        return self._codes is None

    def add(self, decision: Decision) -> None:
        """Take in one micro-batch's decision, without reading the device."""
        if self._codes is None or self._losses is None:
            self._codes, self._losses = decision.invalid, decision.losses
            return
        fresh = decision.invalid[:-1] > self._codes[:-1]
        self._losses = torch.where(fresh, decision.losses, self._losses)
        self._codes = torch.maximum(self._codes, decision.invalid)

    def problem(self, step: int) -> tuple[str, str, bool] | None:
        """None when all losses are valid, else (message, task, whether a logarithm cannot take it). One host read."""
        if self._codes is None or self._losses is None or not bool(self._codes.any()):
            return None
        worst = int(self._codes.argmax())
        message = self._balancer.describe_invalid(self._codes, self._losses, step)
        return message, [*self._balancer.task_names, "auxiliary_loss"][worst], bool(self._codes[worst] == 2)

    def undo(self) -> None:
        """Bring the balancer and the model's buffers back to where they were (parameters have not moved yet)."""
        if self._state is None:
            raise RuntimeError("this update was not begun as undoable")
        self._balancer.load_state_dict(self._state)
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                buffer.copy_(self._buffers[name])

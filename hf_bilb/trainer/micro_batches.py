"""The micro-batches of one update, which can be run more than once: same dropout masks, buffers as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_bilb.engine.replay import RandomState, unchanged
from hf_bilb.losses.contract import TaskLosses

Forward = Callable[[nn.Module, Mapping[str, Any]], TaskLosses]


class MicroBatches:
    """What lies between two optimizer steps on this rank.

    Args:
        batches: the inputs of each micro-batch.
        forward: runs a model on one of them and returns its losses.
        device: whose random generator the model draws from.
        replayed: remember the random states, so that `runs` can be called after the pass that counts.
    """

    def __init__(
        self, batches: Sequence[Mapping[str, Any]], forward: Forward, device: torch.device, replayed: bool
    ) -> None:
        self.batches = batches
        self._forward = forward
        self._device = device
        self._replayed = replayed
        self._states: list[RandomState] = []

    def __len__(self) -> int:
        return len(self.batches)

    def first_pass(self, model: nn.Module) -> list[TaskLosses]:
        """Run every micro-batch without gradients; the passes that follow draw the same random numbers.

        Cost: one forward pass of each; a copy of the model's buffers.
        """
        losses = []
        with torch.no_grad(), unchanged(model):
            for batch in self.batches:
                self._states.append(RandomState.capture(self._device))
                losses.append(self._forward(model, batch))
        return losses

    def begin(self, number: int) -> None:
        """The pass that counts of micro-batch `number` begins: draw as its first pass did, or remember how it draws."""
        if number < len(self._states):
            self._states[number].restore()
        elif self._replayed:
            self._states.append(RandomState.capture(self._device))

    def runs(self, model: nn.Module) -> list[Callable[[], TaskLosses]]:
        """For each micro-batch a function that runs `model` on it once more, drawing as the pass that counts does, and
        leaves the random generators alone. Before that pass: a single micro-batch, or after `first_pass`."""
        if not self._states and len(self.batches) == 1:
            self._states.append(RandomState.capture(self._device))
        return [partial(self._run, model, i) for i in range(len(self.batches))]

    def again(self, model: nn.Module) -> list[Callable[[], TaskLosses]]:
        """As `runs`; where the random states were not remembered, with random numbers of its own."""
        if len(self._states) == len(self.batches):
            return self.runs(model)
        return [partial(self._forward, model, batch) for batch in self.batches]

    def _run(self, model: nn.Module, number: int) -> TaskLosses:
        now = RandomState.capture(self._device)
        self._states[number].restore()
        try:
            return self._forward(model, self.batches[number])
        finally:
            now.restore()

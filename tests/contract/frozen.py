"""Finite differences of a function that contains `detach()`: the detached parts are held at their values.

`detach()` says "treat this as a constant", so the derivative that autograd returns is that of the function in which
every detached tensor is the constant it was at the point. `Frozen` records them once and plays them back.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor


class Frozen:
    """Calls `function`, whose detached tensors keep the values they had in the first call."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self._function = function
        self._constants: list[Tensor] = []
        original = torch.Tensor.detach

        def record(tensor: Tensor) -> Tensor:
            self._constants.append(original(tensor).clone())
            return self._constants[-1]

        with mock.patch.object(torch.Tensor, "detach", record):
            function()

    def __call__(self) -> Tensor:
        constants = iter(self._constants)

        def play_back(tensor: Tensor) -> Tensor:
            return next(constants)

        with mock.patch.object(torch.Tensor, "detach", play_back):
            return self._function()


def central_differences(function: Callable[[], Tensor], point: Tensor, step: float) -> Tensor:
    """d function / d point, entry by entry; `point` is changed in place and put back."""
    result = torch.zeros_like(point)
    flat, out = point.data.view(-1), result.view(-1)
    for i in range(flat.numel()):
        old = float(flat[i])
        width = step * max(abs(old), 1e-2)
        flat[i] = old + width
        above = function()
        flat[i] = old - width
        below = function()
        flat[i] = old
        out[i] = (above - below) / (2 * width)
    return result

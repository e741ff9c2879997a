"""Routers: what gives the task weights sigma(W) of a bilevel method.

The parameter router of BiLB4MTL (arXiv 2502.08585): one logit per task, sigma = activation(logits), optionally
clamped (without renormalisation, as in the authors' code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_bilb.options import OptionError

Activation = Literal["softmax", "sigmoid", "sigmoid_relu"]


@dataclass(frozen=True)
class UniformLogits:
    """`initial_logits: {uniform: [a, b], seed: s}`: independent draws from U[a, b) with a private generator."""

    uniform: tuple[float, float]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.uniform[0] < self.uniform[1]:
            raise OptionError(f"uniform: {list(self.uniform)} is not valid, expected [low, high] with low < high")


def initial_values(initial: float | list[float] | UniformLogits, num_tasks: int, option: str) -> Tensor:
    """The initial values `[K]` of a parameter per task, float64.

    Raises:
        OptionError: when a list does not have K entries; the message begins with the name of the `option`.
    """
    if isinstance(initial, UniformLogits):
        generator = torch.Generator().manual_seed(initial.seed)
        low, high = initial.uniform
        return low + (high - low) * torch.rand(num_tasks, dtype=torch.float64, generator=generator)
    if isinstance(initial, list):
        if len(initial) != num_tasks:
            raise OptionError(f"{option}: got {len(initial)} values, expected one for each of the {num_tasks} tasks")
        return torch.tensor(initial, dtype=torch.float64)
    return torch.full((num_tasks,), float(initial), dtype=torch.float64)


class ParameterRouter(nn.Module):
    """sigma = clamp(activation(W)) with W in R^K.

    `softmax` gives weights on the simplex; `sigmoid` weights in (0, 1), independent of each other; `sigmoid_relu` is
    sigmoid(max(W, 0)), weights in [0.5, 1), whose gradient is zero for W <= 0. A clamped coordinate has no gradient.

    State: `logits [K]`, trainable. Cost: K numbers.
    """

    def __init__(
        self,
        num_tasks: int,
        activation: Activation,
        initial_logits: float | list[float] | UniformLogits,
        clamp: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.clamp = clamp
        self.logits = nn.Parameter(initial_values(initial_logits, num_tasks, "initial_logits"))

    def forward(self) -> Tensor:
        """The weights sigma `[K]`."""
        if self.activation == "softmax":
            weights = torch.softmax(self.logits, dim=0)
        elif self.activation == "sigmoid":
            weights = torch.sigmoid(self.logits)
        else:
            weights = torch.sigmoid(torch.relu(self.logits))
        return weights if self.clamp is None else weights.clamp(*self.clamp)

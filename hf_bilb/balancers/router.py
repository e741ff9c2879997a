"""Routers: what gives the task weights sigma(W) of a bilevel method.

    parameter router   sigma = clamp(activation(w)),  w in R^K                       (LDC-MTL's CelebA and QM9 trainers)
    feature router     sigma = clamp(activation(A z + b)),  z = global batch mean    (its Cityscapes and NYUv2 trainers)

BiLB4MTL (arXiv 2502.08585). The clamp does not renormalise, as in the authors' code; a clamped coordinate has no
gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_bilb.errors import OptionError

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


class Router(nn.Module, ABC):
    """Gives the weights sigma `[K]`: logits, an activation, an optional clamp.

    `softmax` gives weights on the simplex; `sigmoid` weights in (0, 1), independent of each other; `sigmoid_relu` is
    sigmoid(max(logit, 0)), weights in [0.5, 1), whose gradient is zero for logits <= 0.
    """

    def __init__(self, activation: Activation, clamp: tuple[float, float] | None) -> None:
        super().__init__()
        self.activation = activation
        self.clamp = clamp

    @abstractmethod
    def compute_logits(self, features: Tensor | None) -> Tensor:
        """Logits `[K]`, from the features `[D]` of the global batch where the router looks at them."""

    def forward(self, features: Tensor | None = None) -> Tensor:
        """The weights sigma `[K]`."""
        logits = self.compute_logits(features)
        if self.activation == "softmax":
            weights = torch.softmax(logits, dim=0)
        elif self.activation == "sigmoid":
            weights = torch.sigmoid(logits)
        else:
            weights = torch.sigmoid(torch.relu(logits))
        return weights if self.clamp is None else weights.clamp(*self.clamp)

    def clamped_share(self, weights: Tensor) -> Tensor:
        """Scalar, the share of `weights [K]` that lie at a bound of the clamp (0 without one)."""
        if self.clamp is None:
            return weights.new_zeros(())
        low, high = self.clamp
        return ((weights <= low) | (weights >= high)).to(weights.dtype).mean()


class ParameterRouter(Router):
    """One logit per task. State: `logits [K]`, trainable. Cost: K numbers."""

    def __init__(
        self,
        num_tasks: int,
        activation: Activation,
        initial_logits: float | list[float] | UniformLogits,
        clamp: tuple[float, float] | None,
    ) -> None:
        super().__init__(activation, clamp)
        self.logits = nn.Parameter(initial_values(initial_logits, num_tasks, "initial_logits"))

    def compute_logits(self, features: Tensor | None) -> Tensor:
        """The parameter itself."""
        return self.logits


class FeatureRouter(Router):
    """A linear layer on the mean features of the global batch, over all items and ranks.

    The weight starts as `torch.nn.Linear` does, uniform in +-1/sqrt(D), drawn with a private generator so that every
    rank has the same; so does the bias, unless `initial_logits` says what it shall be.

    State: `weight [K, D]`, `bias [K]`, trainable. Cost: K D numbers, and D more in the reduction over ranks.
    """

    def __init__(
        self,
        num_tasks: int,
        num_features: int,
        activation: Activation,
        initial_logits: float | list[float] | UniformLogits | None,
        clamp: tuple[float, float] | None,
    ) -> None:
        super().__init__(activation, clamp)
        seed = initial_logits.seed if isinstance(initial_logits, UniformLogits) else 0
        generator = torch.Generator().manual_seed(seed)
        bound = num_features**-0.5
        weight, bias = (
            bound * (2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1)
            for shape in ((num_tasks, num_features), (num_tasks,))
        )
        if initial_logits is not None:
            bias = initial_values(initial_logits, num_tasks, "initial_logits")
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def compute_logits(self, features: Tensor | None) -> Tensor:
        """A z + b with `features` z `[D]`."""
        assert features is not None  # the balancer has refused a batch without them
        return torch.mv(self.weight, features) + self.bias

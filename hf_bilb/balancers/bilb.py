"""BiLB4MTL, now LDC-MTL: bilevel loss balancing with a router. Xiao, Dong, Zou, Ji, arXiv 2502.08585, equations 1-2.

    upper level   min_W  f(W, x*) = sum_i | tau_i l_i - tau_{i+1} l_{i+1} |
    lower level   x*(W) = argmin_x g(W, x) = sum_i sigma_i(W) l_i / denominator
    single loop (Algorithm 1)   F = g + lambda f, descended by x and W together: one backward pass

    W -> router.logits, sigma -> weights, l_i -> losses (after `normalization`), lambda -> discrepancy_weight,
    tau -> `tau` (one | weights), denominator -> `weight_denominator`, f -> discrepancy

Where the official code differs between its trainers, `preset` names the trainer: `celeba` and `qm9` are its objective
to the letter (optimizer, schedule and clipping are the recipe's). In the code lambda multiplies f, as here; in the
paper's penalty form it multiplies g. What the single loop really does: in g the router DEscends sum sigma_i l_i, so it
moves weight towards smaller losses; balance comes from f. `router_gradient: upper` lets it descend f alone.

Without a preset the defaults are ours and provisional (power normalization, all pairs, lambda at 0.4 of its edge).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_bilb.balancers.options import BalancerOptions, LearningRate
from hf_bilb.balancers.registry import register_balancer
from hf_bilb.discrepancy import Pairs, discrepancy, largest_slopes
from hf_bilb.normalization import MeanOf, NormalizationKind, ReferenceKind
from hf_bilb.objective import Objective, ObjectiveValue
from hf_bilb.options import OptionError
from hf_bilb.router import Activation, ParameterRouter, UniformLogits


@dataclass(frozen=True)
class EdgeFraction:
    """`discrepancy_weight: {edge_fraction: a}`: lambda = a * edge, beyond which a coefficient can turn negative."""

    edge_fraction: float

    def __post_init__(self) -> None:
        if self.edge_fraction < 0:
            raise OptionError(f"edge_fraction: {self.edge_fraction} is not valid, expected a number >= 0")


_OFFICIAL = {"router": "parameter", "tau": "weights", "weight_denominator": "detached_sum", "pairs": "adjacent"}
PRESETS: dict[str, Mapping[str, Any]] = {
    # LDC-MTL experiments/celeba/trainer.py:113-117, models.py:56,77
    "celeba": {
        **_OFFICIAL,
        "activation": "sigmoid",
        "initial_logits": 1.0,
        "normalization": "none",
        "discrepancy_weight": 0.01,
    },
    # LDC-MTL experiments/qm9/trainer.py:155-161, models.py:90-92,118
    "qm9": {
        **_OFFICIAL,
        "activation": "sigmoid_relu",
        "initial_logits": {"uniform": [0.2, 1.0]},
        "normalization": "log",
        "reference": "every_epoch",
        "discrepancy_weight": 0.05,
    },
}


@dataclass(frozen=True, kw_only=True)
class BilbOptions(BalancerOptions):
    """Options of `bilb`; see the module's docstring for the symbols.

    Attributes:
        preset: `celeba` | `qm9`; options given beside it override it.
        router: `parameter`, one logit per task.
        activation: of the router; `softmax` weights sum to one.
        initial_logits: a number, one per task, or `{uniform: [a, b], seed: s}`.
        clamp: `[low, high]` of the weights, not renormalised.
        tau: what multiplies the losses in f, `weights` or `one`.
        weight_denominator: g is divided by nothing, by sum sigma, or by its detached value.
        discrepancy_weight: lambda, a number, or `{edge_fraction: a}` of the value beyond which a coefficient can turn
            negative.
        pairs: f over `adjacent` tasks (the paper) or `all` pairs.
        smoothing: gamma in sqrt(d^2 + gamma); 0 is |d|.
        router_gradient: `both` (W descends g + lambda f, the official single loop) or `upper` (lambda f only).
    """

    normalization: NormalizationKind = "power"
    reference: ReferenceKind | MeanOf = "first_step"
    learning_rate: LearningRate = 1e-3
    preset: Literal["celeba", "qm9"] | None = None
    router: Literal["parameter"] = "parameter"
    activation: Activation = "sigmoid"
    initial_logits: float | list[float] | UniformLogits = 1.0
    clamp: tuple[float, float] | None = None
    tau: Literal["one", "weights"] = "weights"
    weight_denominator: Literal["none", "sum", "detached_sum"] = "detached_sum"
    discrepancy_weight: float | EdgeFraction = EdgeFraction(0.4)
    pairs: Pairs = "all"
    smoothing: float = 0.0
    router_gradient: Literal["both", "upper"] = "both"

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoothing < 0:
            raise OptionError(f"smoothing: {self.smoothing} is not valid, expected a number >= 0")
        if not isinstance(self.discrepancy_weight, EdgeFraction) and self.discrepancy_weight < 0:
            raise OptionError(f"discrepancy_weight: {self.discrepancy_weight} is not valid, expected a number >= 0")
        if self.clamp is not None and not 0 <= self.clamp[0] < self.clamp[1]:
            raise OptionError(f"clamp: {list(self.clamp)} is not valid, expected [low, high] with 0 <= low < high")


@register_balancer(
    "bilb", options=BilbOptions, paper="Xiao et al., BiLB4MTL / LDC-MTL, arXiv 2502.08585, eq. 1-2, Algorithm 1"
)
class Bilb(Objective):
    """The single loop of BiLB4MTL. State: the router's `logits [K]`. Cost: one forward, one backward of the model."""

    def __init__(self, num_tasks: int, options: BilbOptions) -> None:
        super().__init__()
        self.options = options
        self.router = ParameterRouter(num_tasks, options.activation, options.initial_logits, options.clamp)

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F = g + lambda f over the `active` tasks."""
        options = self.options
        sigma = self.router()
        lower = torch.where(active, sigma if options.router_gradient == "both" else sigma.detach(), 0.0)
        denominator = self._denominator(lower, active)
        g = torch.dot(lower, losses) / denominator
        f = discrepancy(
            sigma * losses if options.tau == "weights" else losses, active, options.pairs, options.smoothing
        )

        edge, several = self._edge(sigma.detach(), denominator.detach(), active)
        weight: float | Tensor
        ratio: float | Tensor
        if isinstance(options.discrepancy_weight, EdgeFraction):
            weight, ratio = options.discrepancy_weight.edge_fraction * edge, options.discrepancy_weight.edge_fraction
        else:
            weight, ratio = options.discrepancy_weight, options.discrepancy_weight / edge
        # Sigmoid weights near zero cancel in sigma / sum sigma while f vanishes: the method has silently become LS.
        collapsed = (sigma.detach().amax() < 0.05) if options.activation == "sigmoid" else None
        return ObjectiveValue(g + weight * f, sigma, f, several * ratio, collapsed)

    def _denominator(self, weights: Tensor, active: Tensor) -> Tensor:
        """The sum of `weights [K]`, which are zero for inactive tasks; one where there is nothing to divide."""
        kind = self.options.weight_denominator
        if kind == "none":
            return torch.ones_like(weights[0])
        total = (weights if kind == "sum" else weights.detach()).sum()
        return torch.where(active.any(), total, 1.0)

    def _edge(self, sigma: Tensor, denominator: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The lambda at which a dF/dl_i can reach zero, min_i sigma_i / (denominator * tau_i * largest slope of f), and
        whether there are several tasks: one alone has no discrepancy, so that any lambda is harmless."""
        slopes = largest_slopes(active, self.options.pairs, sigma.dtype)
        if self.options.tau == "one":
            # A weight that has underflowed to zero must not turn the slope of an inactive task into NaN.
            slopes = slopes / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
        steepest = slopes.amax()
        several = steepest > 0
        return 1 / (denominator * torch.where(several, steepest, 1.0)), several

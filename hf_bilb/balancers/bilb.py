"""BiLB4MTL, now LDC-MTL: bilevel loss balancing with a router. Xiao, Dong, Zou, Ji, arXiv 2502.08585, equations 1-2.

    upper level   min_W  f(W, x*) = sum_i | tau_i l_i - tau_{i+1} l_{i+1} |
    lower level   x*(W) = argmin_x g(W, x) = sum_i sigma_i(W) l_i / denominator
    single loop (Algorithm 1)   F = g + lambda f, descended by x and W together: one backward pass

    W -> router.logits, sigma -> weights, l_i -> losses (after `normalization`), lambda -> discrepancy_weight,
    tau -> `tau` (one | weights), denominator -> `weight_denominator`, f -> discrepancy

    double loop (Algorithm 2)   F = lambda f(W, x) + penalty_weight (g(W, x) - g(W, z_N))
                                z <- z - inner_learning_rate grad_z g(W, z), inner_steps times

    lower_level: {inner_steps, inner_learning_rate, penalty_weight}; discrepancy_weight: 1 is the paper's penalty form

Where the official code differs between its trainers, `preset` names the trainer and is its objective to the letter
(optimizer, schedule and clipping are the recipe's). In the code lambda multiplies f, as here; in the paper's penalty
form it multiplies g. What the single loop really does: in g the router DEscends sum sigma_i l_i, so it moves weight
towards smaller losses; balance comes from f. `router_gradient: upper` lets it descend f alone. The guide page is
docs/bilb_exactly.md.

Without a preset the defaults are ours and provisional (power normalization, all pairs, lambda at 0.4 of its edge).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_bilb.balancers.discrepancy import Pairs, discrepancy, edge_of_weight, with_slopes
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.balancers.router import Activation, FeatureRouter, ParameterRouter, Router, UniformLogits
from hf_bilb.config.options import bounded, check_bounds
from hf_bilb.engine.constants import one, zero
from hf_bilb.engine.objective import BilevelObjective, Derivatives, Levels, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, LearningRate
from hf_bilb.engine.records import MeanOf, NormalizationKind, ReferenceKind
from hf_bilb.errors import OptionError


@dataclass(frozen=True)
class EdgeFraction:
    """`discrepancy_weight: {edge_fraction: a}`: lambda = a * edge, beyond which a coefficient can turn negative."""

    edge_fraction: float = bounded(at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class DoubleLoop:
    """`lower_level: {inner_steps: N, inner_learning_rate: beta, penalty_weight: p}`: the penalty form.

    Attributes:
        inner_steps: N, descents of the model's second copy z per update; 0 drops g(W, z_N), which is the single loop.
        inner_learning_rate: beta of z's gradient descent (plain, whatever the model's optimizer).
        penalty_weight: p, what g is multiplied with.
    """

    inner_steps: int = bounded(at_least=0)
    inner_learning_rate: float = bounded(above=0)
    penalty_weight: float = bounded(1.0, above=0)

    def __post_init__(self) -> None:
        check_bounds(self)


_OFFICIAL = {"router": "parameter", "tau": "weights", "weight_denominator": "detached_sum", "pairs": "adjacent"}
_DENSE = {
    "router": "features",
    "activation": "softmax",
    "initial_logits": None,
    "clamp": [0.2, 0.8],
    "pairs": "adjacent",
}
PRESETS: dict[str, Mapping[str, Any]] = {
    # LDC-MTL experiments/cityscapes/trainer.py:185-189, models.py:580-585,763-770
    "cityscapes": {
        **_DENSE,
        "normalization": "none",
        "tau": "one",
        "weight_denominator": "none",
        "discrepancy_weight": 0.1,
    },
    # LDC-MTL experiments/nyuv2/trainer.py:137-146, models.py:619-622,794-800; the denominator is not detached
    "nyuv2": {
        **_DENSE,
        "normalization": "rescaled",
        "reference": "first_step",
        "tau": "weights",
        "weight_denominator": "sum",
        "discrepancy_weight": 0.05,
    },
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
        preset: `cityscapes` | `nyuv2` | `celeba` | `qm9`; options given in addition to it override it.
        router: `parameter`, one logit per task, or `features`, a linear layer on the batch's mean `router_features`.
        num_features: D of a feature router; the Trainer takes it from `model.config.num_router_features`.
        activation: of the router; `softmax` weights sum to one.
        initial_logits: a number, one per task, or `{uniform: [a, b], seed: s}`; of a feature router the bias, where
            null starts as `torch.nn.Linear` does.
        clamp: `[low, high]` of the weights, not renormalised.
        tau: what multiplies the losses in f, `weights` or `one`.
        weight_denominator: g is divided by nothing, by sum sigma, or by its detached value.
        discrepancy_weight: lambda, a number, or `{edge_fraction: a}` of the value beyond which a coefficient can turn
            negative.
        pairs: f over `adjacent` tasks (the paper) or `all` pairs.
        smoothing: gamma in sqrt(d^2 + gamma); 0 is |d|.
        detach_features: whether the features give no gradient to the model (officially they do).
        router_gradient: `both` (W descends g + lambda f, the official single loop) or `upper` (lambda f only).
        lower_level: `single_loop`, or the double loop's `{inner_steps, inner_learning_rate, penalty_weight}`, which
            needs `balancer.bind(model)` and `balancer.step(reevaluate=...)` (the Trainer does both).
    """

    normalization: NormalizationKind = "power"
    reference: ReferenceKind | MeanOf = "first_step"
    learning_rate: LearningRate = 1e-3
    preset: Literal["cityscapes", "nyuv2", "celeba", "qm9"] | None = None
    router: Literal["parameter", "features"] = "parameter"
    num_features: int | None = bounded(None, at_least=1)
    activation: Activation = "sigmoid"
    initial_logits: float | list[float] | UniformLogits | None = 1.0
    clamp: tuple[float, float] | None = None
    tau: Literal["one", "weights"] = "weights"
    weight_denominator: Literal["none", "sum", "detached_sum"] = "detached_sum"
    discrepancy_weight: float | EdgeFraction = EdgeFraction(0.4)
    pairs: Pairs = "all"
    smoothing: float = bounded(0.0, at_least=0)
    detach_features: bool = False
    router_gradient: Literal["both", "upper"] = "both"
    lower_level: Literal["single_loop"] | DoubleLoop = "single_loop"

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.discrepancy_weight, EdgeFraction) and self.discrepancy_weight < 0:
            raise OptionError(f"discrepancy_weight: {self.discrepancy_weight} is not valid, expected a number >= 0")
        if self.clamp is not None and not 0 <= self.clamp[0] < self.clamp[1]:
            raise OptionError(f"clamp: {list(self.clamp)} is not valid, expected [low, high] with 0 <= low < high")
        if self.router == "parameter" and (self.num_features is not None or self.detach_features):
            key = "detach_features" if self.detach_features else "num_features"
            raise OptionError(f"{key}: has no effect with router: parameter, expected router: features")
        if self.router_gradient == "upper" and self.inner_steps > 0:
            raise OptionError(
                "router_gradient: 'upper' is not valid with a double loop, which corrects the gradient of g that "
                "'upper' drops; expected 'both'"
            )

    @property
    def inner_steps(self) -> int:
        """N of the double loop, 0 for the single loop."""
        return self.lower_level.inner_steps if isinstance(self.lower_level, DoubleLoop) else 0


@register_balancer(
    "bilb",
    options=BilbOptions,
    paper="Xiao et al., BiLB4MTL / LDC-MTL, arXiv 2502.08585, eq. 1-2, Algorithms 1 and 2",
    costs=(
        Cost(1, 1, when="lower_level: single_loop"),
        Cost("N + 2", "N + 1", "2d: z and its gradient", when="lower_level: {inner_steps: N, ...}"),
    ),
)
class Bilb(BilevelObjective):
    """BiLB4MTL. State: the router's `logits [K]`, or `weight [K, D]` and `bias [K]`; in the double loop also z, a copy
    of the model's trainable parameters. Cost: one forward, one backward of the model; the double loop adds N of each,
    one forward, and one more set of gradients."""

    def __init__(self, num_tasks: int, options: BilbOptions) -> None:
        super().__init__()
        self.options = options
        if options.activation == "sigmoid":
            # Sigmoid weights near zero cancel in sigma / sum sigma while f vanishes: the method has silently become LS.
            self.collapsed_below = 0.05
        if options.router == "parameter":
            if options.initial_logits is None:
                raise OptionError(
                    "initial_logits: null is for router: features, expected a number, a list or {uniform}"
                )
            self.router: Router = ParameterRouter(num_tasks, options.activation, options.initial_logits, options.clamp)
        elif options.num_features is None:
            raise OptionError("num_features: is required by router: features, expected D of router_features [B, D]")
        else:
            self.num_features = options.num_features
            self.router = FeatureRouter(
                num_tasks, options.num_features, options.activation, options.initial_logits, options.clamp
            )
        if isinstance(options.lower_level, DoubleLoop):
            self.inner_steps = options.lower_level.inner_steps
            self.inner_learning_rate = options.lower_level.inner_learning_rate
            self.penalty_weight = options.lower_level.penalty_weight

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F = penalty_weight g + lambda f over the `active` tasks (the single loop has penalty_weight 1)."""
        sigma = self._weights(features)
        both = self.options.router_gradient == "both"
        fixed = sigma if both else self._weights_of_fixed_router(sigma, features)
        g, denominator = self._lower(fixed, losses, active)
        f = self._upper(sigma, losses, active)
        edge = edge_of_weight(sigma.detach(), denominator.detach(), active, self.options.pairs, self.options.tau)
        weight, ratio = self._discrepancy_weight(*edge)
        return ObjectiveValue(self._penalised(g) + weight * f, sigma, f, ratio)

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives | None:
        """dF/dl = dF/dg sigma / denominator + lambda tau df/dv, and dF/dsigma likewise; the router's own derivative is
        autograd's. Not with smoothing."""
        options = self.options
        if options.smoothing > 0:
            return None
        with torch.enable_grad():
            routed = self._weights(None)
        sigma, nothing = routed.detach(), zero(losses.dtype, losses.device)
        g, denominator = self._lower(sigma, losses, active)
        by_weights = options.tau == "weights"
        f, slopes = with_slopes(sigma * losses if by_weights else losses, active, options.pairs)
        edge = edge_of_weight(sigma, denominator, active, options.pairs, options.tau)
        weight, ratio = self._discrepancy_weight(*edge)
        output = ObjectiveValue(self._penalised(g) + weight * f, sigma, f, ratio)

        of_g, of_f = self._penalised(denominator.reciprocal()), weight * slopes
        coefficients = of_g * sigma + (of_f * sigma if by_weights else of_f)
        of_sigma = of_f * losses if by_weights else torch.zeros_like(sigma)
        if options.router_gradient == "both":
            in_g = of_g * losses
            if options.weight_denominator == "sum":
                in_g = in_g - self._penalised(g / denominator)
            of_sigma = torch.where(active, in_g, nothing) + of_sigma
        own = torch.autograd.grad(routed, list(self.parameters()), of_sigma)
        return Derivatives(output, torch.where(active, coefficients, nothing), own)

    def _discrepancy_weight(self, edge: Tensor, several: Tensor) -> tuple[Tensor | float, Tensor]:
        """lambda, and its ratio to the edge of g + lambda f, which is penalty_weight times that in g's place."""
        chosen, edge = self.options.discrepancy_weight, self._penalised(edge)
        if isinstance(chosen, EdgeFraction):
            return chosen.edge_fraction * edge, several * chosen.edge_fraction
        return chosen, several * (chosen / edge)

    def levels(self, losses: Tensor, active: Tensor, features: Tensor | None) -> Levels:
        """f, g and sigma."""
        sigma = self._weights(features)
        g, _ = self._lower(sigma, losses, active)
        return Levels(self._upper(sigma, losses, active), g, sigma, self.router.clamped_share(sigma.detach()))

    def _penalised(self, value: Tensor) -> Tensor:
        return value if self.penalty_weight == 1 else self.penalty_weight * value

    def _weights(self, features: Tensor | None) -> Tensor:
        return self.router(features.detach() if features is not None and self.options.detach_features else features)

    def _weights_of_fixed_router(self, sigma: Tensor, features: Tensor | None) -> Tensor:
        """sigma without a gradient to W; one to the features stays."""
        if features is None or self.options.detach_features:
            return sigma.detach()
        fixed = {name: parameter.detach() for name, parameter in self.router.named_parameters()}
        return torch.func.functional_call(self.router, fixed, (features,))

    def _upper(self, sigma: Tensor, losses: Tensor, active: Tensor) -> Tensor:
        values = sigma * losses if self.options.tau == "weights" else losses
        return discrepancy(values, active, self.options.pairs, self.options.smoothing)

    def _lower(self, sigma: Tensor, losses: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """g and its denominator: the sum of the active weights, or one where there is nothing to divide."""
        weights = torch.where(active, sigma, zero(sigma.dtype, sigma.device))
        kind = self.options.weight_denominator
        if kind == "none":
            denominator = one(weights.dtype, weights.device)
        else:
            total = (weights if kind == "sum" else weights.detach()).sum()
            denominator = torch.where(active.any(), total, one(weights.dtype, weights.device))
        return torch.dot(weights, losses) / denominator, denominator

"""What the contract suite runs over: every registered balancer, with variants of options and every normalization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hf_bilb import build_balancer, list_balancers
from hf_bilb.balancers import LossBalancer, get_balancer_spec, resolve_options
from hf_bilb.balancers.registry import GRADIENT_METHODS
from hf_bilb.engine.records import NormalizationKind
from hf_bilb.losses.contract import TaskLosses

#: Features of the feature routers, of which there are three.
FEATURES = {"router": "features", "num_features": 3, "initial_logits": None}
DOUBLE_LOOP = {"inner_steps": 2, "inner_learning_rate": 0.05, "penalty_weight": 2.0}


def largest_loss(losses: Tensor, known: Tensor) -> Tensor:
    """An upper level of one's own."""
    return torch.where(known, losses, -torch.inf).amax().clamp(min=0)


#: Variants of a method's own options beside its defaults. A method without an entry is tested with its defaults.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "famo": {
        "next_batch": {"reevaluate": "next_batch"},
        "next_batch_sgd": {"reevaluate": "next_batch", "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0},
        "min_losses": {"min_losses": -0.5, "reevaluate": "next_batch"},
    },
    "dwa": {
        "epoch": {"window": "epoch", "temperature": 0.5},
        "window_1": {"window": 1},
        "window_3": {"window": 3, "temperature": 0.5},
    },
    "imtl_l": {"initial": {"initial_log_scale": -0.5}, "sgd": {"optimizer": "sgd", "learning_rate": 0.1}},
    "rlw": {"seed": {"seed": 3}},
    "stch": {
        "mu": {"mu": 0.1, "ideal_point": -0.5},
        "schedule": {"warmup_epochs": 1},
        "schedule_mu": {"warmup_epochs": 1, "mu": 0.1, "normalization": "initial"},
    },
    "go4align": {
        "groups_2": {"num_groups": 2, "step_size": 0.1},
        "groups_3": {"num_groups": 3, "normalization": "initial"},
        "groups_of_one": {"num_groups": 7, "step_size": 0.1},
        "lloyd": {"num_groups": 3, "step_size": 0.1, "assignment": "lloyd", "seed": 2},
    },
    "marigold": {
        "exact": {"mode": "exact", "learning_rate": 0.1, "beta": 0.3},
        "exact_baseline": {"mode": "exact", "estimator": "one_point_baseline", "learning_rate": 0.1},
        "exact_two_point": {"mode": "exact", "estimator": "two_point", "parametrization": "softmax", "beta": 2.0},
        "lagged": {"mode": "lagged", "learning_rate": 0.1, "seed": 3},
        "lagged_baseline": {"mode": "lagged", "estimator": "one_point_baseline", "optimizer": "sgd"},
        "softmax": {"parametrization": "softmax", "initial": -0.5, "perturbation": 0.1, "learning_rate": 0.1},
        "positive": {"parametrization": "positive", "initial": 0.5, "learning_rate": 0.1},
        "auxiliary": {
            "mode": "exact",
            "parametrization": "identity",
            "trainable_tasks": ["task_0"],
            "upper_level": {"tasks": ["task_0"]},
            "learning_rate": 0.1,
        },
        "function": {
            "upper_level": "tests.contract.cases:largest_loss",
            "parametrization": "identity",
            "estimator": "one_point_baseline",
        },
    },
    "uw": {"initial": {"initial_log_variance": -0.5}, "sgd": {"optimizer": "sgd", "learning_rate": 0.1}},
    "bilb": {
        "celeba": {"preset": "celeba"},
        "qm9": {"preset": "qm9", "learning_rate": 1e-2},
        "softmax": {"activation": "softmax"},
        "sigmoid_relu": {"activation": "sigmoid_relu"},
        "clamp": {"clamp": [0.3, 0.7], "initial_logits": 0.2},
        "tau_one": {"tau": "one", "pairs": "adjacent"},
        "no_denominator": {"weight_denominator": "none"},
        "denominator_sum": {"weight_denominator": "sum"},
        "denominator_detached": {"weight_denominator": "detached_sum", "pairs": "adjacent"},
        "number": {"discrepancy_weight": 0.01},
        "smoothing": {"smoothing": 1e-3, "pairs": "adjacent"},
        "smoothing_all": {"smoothing": 1e-3, "pairs": "all"},
        "edge": {"discrepancy_weight": {"edge_fraction": 0.9}, "weight_denominator": "sum"},
        "edge_tau_one": {"discrepancy_weight": {"edge_fraction": 0.9}, "tau": "one"},
        "upper": {"router_gradient": "upper"},
        "upper_adjacent": {"router_gradient": "upper", "pairs": "adjacent", "weight_denominator": "sum"},
        "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
        "every_epoch": {"reference": "every_epoch", "normalization": "log"},
        "mean_of": {"reference": {"mean_of": 3}, "normalization": "initial"},
        "cityscapes": {"preset": "cityscapes", "num_features": 3},
        "nyuv2": {"preset": "nyuv2", "num_features": 3, "learning_rate": 1e-2},
        "features": {**FEATURES, "activation": "sigmoid"},
        "features_clamp": {**FEATURES, "activation": "sigmoid", "clamp": [0.4, 0.6], "initial_logits": 0.1},
        "features_upper": {**FEATURES, "activation": "softmax", "router_gradient": "upper", "pairs": "adjacent"},
        "features_detached": {**FEATURES, "activation": "sigmoid_relu", "detach_features": True, "tau": "one"},
        "penalty": {"lower_level": {**DOUBLE_LOOP, "inner_steps": 0}},
        "double_loop": {"lower_level": DOUBLE_LOOP},
        "double_loop_features": {**FEATURES, "activation": "sigmoid", "lower_level": DOUBLE_LOOP},
    },
}

#: Methods whose step over the present tasks is that of a balancer built for these tasks alone.
SEPARABLE = {"ls", "si", "uw", "bilb", "famo", "gls", "imtl_l", "dwa", "stch", "go4align"}

#: Methods that cannot take the negative numbers of `normalization: log` without taking a logarithm.
POSITIVE = {"dwa", "marigold"}


@dataclass(frozen=True)
class Case:
    """A balancer with options."""

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.label}"

    def build(self, num_tasks: int, dtype: torch.dtype = torch.float64, **more: Any) -> LossBalancer:
        return build_balancer(self.name, num_tasks, dtype=dtype, **{**self.options, **more})

    def option(self, key: str) -> Any:
        """The value of an option, the preset's or the default's included; None where the method has no such option."""
        return getattr(resolve_options(self.name, self.options), key, None)

    @property
    def depends_on_order(self) -> bool:
        """Whether F looks at the order of the tasks (adjacent pairs)."""
        return self.option("pairs") == "adjacent"

    @property
    def looks_ahead(self) -> bool:
        """Whether an update begins with a trial step."""
        return self.option("mode") == "exact"

    @property
    def is_double_loop(self) -> bool:
        """Whether the router's gradient is corrected at z."""
        return bool(self.option("inner_steps"))


def all_cases() -> list[Case]:
    """Every registered loss balancer x (its variants + every normalization that it accepts).

    Those that look at gradients have a contract of their own, `test_gradient_balancers.py`.
    """
    cases = []
    for name in list_balancers():
        if name in GRADIENT_METHODS:
            continue
        cases.append(Case(name, "default"))
        cases += [Case(name, label, options) for label, options in VARIANTS.get(name, {}).items()]
        takes_logarithm = get_balancer_spec(name).objective.takes_logarithm
        positive = takes_logarithm or name in POSITIVE
        kinds = [kind for kind in get_args(NormalizationKind) if not (positive and kind == "log")]
        cases += [Case(name, f"normalization_{kind}", {"normalization": kind}) for kind in kinds]
    return cases


CASES = all_cases()


#: Gradient methods without weights, which have neither weights to keep nor to give the heads.
DIRECTIONS = ("graddrop", "moco")


def gradient_cases() -> list[Case]:
    """Every gradient method x options that all of them have."""
    cases = []
    for name in GRADIENT_METHODS:
        kind = "initial" if name == "gradnorm" else "log"  # gradnorm divides by the first losses
        cases += [
            Case(name, "default"),
            Case(name, kind, {"normalization": kind}),
            Case(name, "max_norm", {"max_norm": 0.5}),
        ]
        if name not in DIRECTIONS:
            other = "sum" if get_balancer_spec(name).options().heads == "weights" else "weights"
            cases += [
                Case(name, "every_3", {"every_n_steps": 3}),
                Case(name, "features", {"gradients": "features"}),
                Case(name, other, {"heads": other}),
            ]
    return cases


GRADIENT_CASES = gradient_cases()


def random_losses(num_tasks: int, steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[steps, K]` positive losses of very different sizes, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 1, num_tasks, dtype=torch.float64)[torch.randperm(num_tasks, generator=generator)]
    return (scale * (0.3 + torch.rand(steps, num_tasks, dtype=torch.float64, generator=generator))).to(dtype)


class Tilted(nn.Module):
    """What a double loop or a look-ahead is bound to: its K losses are the given ones times exp(tilt), tilt [K] = 0."""

    def __init__(self, num_tasks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.zeros(num_tasks, dtype=dtype))

    def forward(self, losses: Tensor) -> Tensor:
        return losses * self.tilt.exp()


def features_for(balancer: LossBalancer) -> Tensor | None:
    """Router features `[4, D]`, always the same; None where nothing looks at them."""
    length = balancer.objective.num_features
    if length == 0:
        return None
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(4, length, dtype=torch.float64, generator=generator)
    return features.to(device=balancer.device, dtype=balancer.dtype)


def batch_for(balancer: LossBalancer, losses: Tensor, num_items: Tensor | None = None) -> TaskLosses:
    """The `losses [K]` once more: of the bound model, at z or after a trial step; unchanged for other methods."""
    items = torch.ones_like(losses) if num_items is None else num_items
    # A loss that is not there must not reach the graph, not even times zero.
    there = torch.where(items > 0, losses, 0.0)
    if balancer._look_ahead is not None:
        return TaskLosses(balancer._look_ahead.model(there), items)
    if balancer._lower_level is None:
        return TaskLosses(there, items)
    return TaskLosses(balancer._lower_level.model(there), items, features_for(balancer))


def advance(balancer: LossBalancer, losses: Tensor, num_items: Tensor | None = None) -> Tensor:
    """One update with the `losses [K]`; returns the coefficients as they reach a model (the gradient of the losses)."""
    leaf = losses.detach().clone().requires_grad_()
    balancer.look_ahead(lambda: batch_for(balancer, losses, num_items))
    balancer.backward(leaf, num_items=num_items, router_features=features_for(balancer))
    balancer.step(reevaluate=lambda: batch_for(balancer, losses, num_items))
    assert leaf.grad is not None
    return leaf.grad

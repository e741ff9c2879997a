"""What the contract suite runs over: every registered balancer, with variants of options and every normalization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from hf_bilb import build_balancer, list_balancers
from hf_bilb.balancers import LossBalancer, get_balancer_spec
from hf_bilb.normalization import NormalizationKind

#: Variants of a method's own options beside its defaults. A method without an entry is tested with its defaults.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
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
    },
}

#: Methods whose step over the present tasks is that of a balancer built for these tasks alone.
SEPARABLE = {"ls", "si", "uw", "bilb"}


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

    @property
    def depends_on_order(self) -> bool:
        """Whether F looks at the order of the tasks (adjacent pairs)."""
        spec = get_balancer_spec(self.name).options
        preset = dict(spec.presets.get(self.options.get("preset"), {}))
        return {**preset, **self.options}.get("pairs") == "adjacent"


def all_cases() -> list[Case]:
    """Every registered balancer x (its variants + every normalization that it accepts)."""
    cases = []
    for name in list_balancers():
        cases.append(Case(name, "default"))
        cases += [Case(name, label, options) for label, options in VARIANTS.get(name, {}).items()]
        takes_logarithm = get_balancer_spec(name).objective.takes_logarithm
        kinds = [kind for kind in get_args(NormalizationKind) if not (takes_logarithm and kind == "log")]
        cases += [Case(name, f"normalization_{kind}", {"normalization": kind}) for kind in kinds]
    return cases


CASES = all_cases()


def random_losses(num_tasks: int, steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[steps, K]` positive losses of very different sizes, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 1, num_tasks, dtype=torch.float64)[torch.randperm(num_tasks, generator=generator)]
    return (scale * (0.3 + torch.rand(steps, num_tasks, dtype=torch.float64, generator=generator))).to(dtype)


def advance(balancer: LossBalancer, losses: Tensor, num_items: Tensor | None = None) -> Tensor:
    """One update with the `losses [K]`; returns the coefficients as they reach a model (the gradient of the losses)."""
    leaf = losses.detach().clone().requires_grad_()
    balancer.backward(leaf, num_items=num_items)
    balancer.step()
    assert leaf.grad is not None
    return leaf.grad

"""FairGrad, fair resource allocation in multi-task learning. Ban and Ji, ICML 2024 (arXiv 2402.15638).

    G w = w^(-1 / alpha),   w > 0        the shared parameters descend K J^T w

    alpha -> alpha, w -> the weights before the factor K

It maximises the alpha-fair utility of the tasks' decreases: alpha = 1 is Nash-MTL's equation, alpha -> inf minimises
the worst. It is the minimum of a convex function for every alpha > 0, found by Newton's method. Official code asks
scipy's `least_squares` from 1 / K, multiplies the direction by K and clips it to norm 1 (`max_norm: 1` here); torchjd
has no K, and equal weights for alpha = 0. Tasks with a zero gradient, and gradients that cancel: as in `nash_mtl`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import array, fair_weights
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod, HeadWeights


@dataclass(frozen=True, kw_only=True)
class FairGradOptions(GradientOptions):
    """Options of `fairgrad`.

    Attributes:
        alpha: of the fairness, from 0.1 (nearly the plain sum) to 10 (nearly only the worst task).
    """

    alpha: float = bounded(1.0, at_least=0.1, at_most=10)
    heads: HeadWeights = "sum"


@register_balancer(
    "fairgrad",
    options=FairGradOptions,
    paper="Ban and Ji, ICML 2024 (arXiv 2402.15638)",
    costs=(Cost(1, "K", memory="K d"),),
)
class FairGrad(GramianMethod):
    """FairGrad. No state."""

    def __init__(self, num_tasks: int, options: FairGradOptions) -> None:
        super().__init__()
        self._power = 1 / options.alpha

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """K w `[A]`, all > 0, with the number of tasks in the step as K."""
        return torch.from_numpy(fair_weights(array(gramian), self._power) * len(gramian))

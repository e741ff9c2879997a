"""SDMGrad, stochastic direction-oriented multi-objective gradient. Xiao, Ban, Ji, NeurIPS 2023 (arXiv 2305.18409).

    A = J_1 J_2^T / s^2,   s = mean_k sqrt(max(0, (J_1 J_2^T)_kk))
    `iterations` times:  v <- momentum v + A (a + lambda 1 / K),   a <- P(a - rate v)     v = 0 before each
    the shared parameters descend J_3^T (a + lambda 1 / K) / (1 + lambda)

J_1, J_2, J_3 -> the gradients of three independent samples, as in `modo`; a -> shares, 1 / K at the start, which each
step begins from; P projects on the simplex, lambda -> regularization, rate -> step_size. lambda draws the direction to
that of the plain mean: 0 is MGDA, large is the mean. LibMTL and its scripts: rate 5, momentum 0.5, 20 iterations,
lambda 0.3, as here; torchjd has a rate of 10. Both add 1e-8 to s^2 (we: where it is zero).

With a rate of 5 the inner steps overshoot where gradients differ in length: the shares jump between corners of the
simplex, and a difference in rounding, as another number of ranks makes it, decides where they end. A rate below about
1 / (largest eigenvalue of A), such as 0.1, gives the same shares on any number of ranks.

In a step with absent tasks a is that of the present ones, scaled to sum 1; the absent ones' stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.modo import SharesMethod
from hf_bilb.balancers.gradient.solvers import array, project_to_simplex
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.gradient_method import GradientOptions, HeadWeights


@dataclass(frozen=True, kw_only=True)
class SdmGradOptions(GradientOptions):
    """Options of `sdmgrad`.

    Attributes:
        regularization: lambda, how strongly the direction is drawn to the mean gradient.
        step_size: of the shares' inner steps.
        momentum: of these inner steps; each update begins with none.
        iterations: how many there are in an update.
    """

    regularization: float = bounded(0.3, at_least=0)
    step_size: float = bounded(5.0, above=0)
    momentum: float = bounded(0.5, at_least=0, below=1)
    iterations: int = bounded(20, at_least=1)
    heads: HeadWeights = "sum"


@register_balancer(
    "sdmgrad",
    options=SdmGradOptions,
    paper="Xiao et al., NeurIPS 2023 (arXiv 2305.18409)",
    costs=(Cost(1, "K", memory="3 K d"),),
)
class SdmGrad(SharesMethod):
    """SDMGrad. State: `shares [K]`."""

    def __init__(self, num_tasks: int, options: SdmGradOptions) -> None:
        super().__init__(num_tasks)
        self._options = options

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """(a + lambda / A) / (1 + lambda) `[A]`, for the third sample."""
        options, products = self._options, array(gramian)
        scale = np.sqrt(np.maximum(products.diagonal(), 0.0)).mean() ** 2
        # Independent samples may disagree in every sign: then the largest entry stands in.
        scale = scale if scale > 0 else np.abs(products).max()
        matrix = products / (scale if scale > 0 else 1.0)
        shares, total = self.known_shares(tasks)
        even = options.regularization / len(shares)
        velocity = np.zeros_like(shares)
        for _ in range(options.iterations):
            velocity = options.momentum * velocity + matrix @ (shares + even)
            shares = project_to_simplex(shares - options.step_size * velocity)
        self.remember(shares, tasks, total)
        return torch.from_numpy((shares + even) / (1 + options.regularization))

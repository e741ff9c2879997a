"""UPGrad, unconflicting projection of gradients. Quinton and Rey 2024 (arXiv 2406.16232).

    v_i = argmin v^T (G / tr G + r I) v   over v >= e_i / K,      w = sum_i v_i

    w -> the weights, r -> `regularization`, e_i -> the i-th unit vector

J^T v_i is the projection of g_i / K on the cone of directions along which no loss grows; their sum does not conflict
with any task. r makes the solution unique and lets the result conflict by about that share. torchjd and LibMTL's copy
of it give each problem to quadprog, with r = 1e-4; torchjd's `norm_eps` takes a trace below 1e-4 for zero, which small
gradients are not: here only zero is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import array, normalised, smallest_above
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod, HeadWeights


@dataclass(frozen=True, kw_only=True)
class UpGradOptions(GradientOptions):
    """Options of `upgrad`.

    Attributes:
        regularization: r, what is added to the diagonal of the Gramian, as a share of its trace.
    """

    regularization: float = bounded(1e-4, at_least=1e-10, at_most=1)
    heads: HeadWeights = "sum"


@register_balancer(
    "upgrad",
    options=UpGradOptions,
    paper="Quinton and Rey 2024 (arXiv 2406.16232)",
    costs=(Cost(1, "K", memory="K d"),),
)
class UpGrad(GramianMethod):
    """UPGrad. No state."""

    def __init__(self, num_tasks: int, options: UpGradOptions) -> None:
        super().__init__()
        self._regularization = options.regularization

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """w `[A]`, each at least 1 / A."""
        scaled, scale = normalised(array(gramian))
        identity = np.eye(len(gramian))
        if scale == 0:
            return torch.from_numpy(identity.mean(axis=0))
        matrix = scaled / scaled.trace() + self._regularization * identity
        return torch.from_numpy(smallest_above(matrix, identity / len(identity)).sum(axis=0))

"""CAGrad, conflict-averse gradient descent. Liu et al., NeurIPS 2021 (arXiv 2110.14048), Algorithm 1.

    d = argmax min_k g_k . d   over |d - g0| <= c |g0|,   g0 = (1 / K) sum_k g_k
      = g0 + x,   x = (r / |g_w|) g_w,   r = c |g0|,   g_w = sum_k w_k g_k
    w = argmin g_w . g0 + r |g_w|   over w >= 0 with sum 1

    c -> c, d -> the direction before the factors, G, g0 . g_k -> from the Gramian

The shared parameters descend K d / (1 + c^2), as in official code (`rescale: 1`; 2 divides by 1 + c, 0 by nothing).
torchjd has d itself. Official code then clips to norm 1 (`max_norm: 1` here). It finds w with SLSQP to about 1e-6 and
adds 1e-8 under its square roots; torchjd uses cvxpy, and returns zero where |g_w| is below 1e-4.

For t = |g_w| / r, w is also the minimum of 1/2 |g_w|^2 + t g_w . g0 over the simplex, and |g_w| / t falls as t grows.
So w is found exactly: a quadratic program for a t, then the t at which its support fits, and again. Where weights >= 0
bring the gradients to zero, t may be 0: then d is the nearest direction to g0 along which no loss grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import (
    Array,
    Mask,
    array,
    nonnegative_minimum,
    normalised,
    quietly,
    simplex_minimum,
    solved_equations,
)
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod, HeadWeights

_ROUNDS = 60
#: |g_w| / r below which the gradients count as cancelling each other.
_STATIONARY = 1e-7


@dataclass(frozen=True, kw_only=True)
class CaGradOptions(GradientOptions):
    """Options of `cagrad`.

    Attributes:
        c: how far the direction may go from the mean gradient, as a share of its norm; 0 is the plain mean.
        rescale: what the direction is divided by: 0 nothing, 1 (1 + c^2), 2 (1 + c).
    """

    c: float = bounded(0.4, at_least=0)
    rescale: Literal[0, 1, 2] = 1
    heads: HeadWeights = "sum"


@register_balancer(
    "cagrad",
    options=CaGradOptions,
    paper="Liu et al., NeurIPS 2021 (arXiv 2110.14048)",
    costs=(Cost(1, "K", memory="K d"),),
)
class CaGrad(GramianMethod):
    """CAGrad. No state."""

    def __init__(self, num_tasks: int, options: CaGradOptions) -> None:
        super().__init__()
        self._c = options.c
        self._divisor = {0: 1.0, 1: 1 + options.c**2, 2: 1 + options.c}[options.rescale]

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """The weights `[A]` of K d over the divisor, with the number of tasks in the step as K."""
        moves = conflict_averse(array(gramian), self._c)
        return torch.from_numpy((1 + len(gramian) * moves) / self._divisor)


@quietly
def conflict_averse(gramian: Array, c: float) -> Array:
    """The weights `[A]` of x = d - g0."""
    gramian = normalised(gramian)[0]
    linear = gramian.mean(axis=1)
    radius = c * max(float(linear.mean()), 0.0) ** 0.5
    if radius <= 1e-12 * c:  # the mean is zero up to rounding errors, or c is
        return np.zeros_like(linear)
    low, high = 0.0, 1 / radius
    ratio = min(1 / c, high)
    support: Mask | None = None
    weights: Array | None = None
    for _ in range(_ROUNDS):
        weights = simplex_minimum(gramian, ratio * linear, weights)
        norm = max(float(weights @ gramian @ weights), 0.0) ** 0.5
        low, high = (ratio, high) if norm > radius * ratio else (low, ratio)
        before, support = support, weights > 0
        fitting = [t for t in _fitting_ratios(gramian, linear, radius, support) if low < t < high]
        if before is not None and np.array_equal(before, support) and abs(norm - radius * ratio) <= 1e-14 * norm:
            break
        if not fitting and high - low <= 1e-15 * high:
            break
        ratio = fitting[0] if fitting else (low * high) ** 0.5 if low > 0 else high / 8
        if ratio < _STATIONARY:
            return _nearest_without_conflict(gramian, linear, radius)
    return weights * (radius / norm)


def _fitting_ratios(gramian: Array, linear: Array, radius: float, support: Mask) -> list[float]:
    """The t with |g_w| = r t, where w(t) is the minimum with this support, a line; two at most."""
    index = support.nonzero()[0]
    block = gramian[index[:, None], index]
    solved = solved_equations(block + 1, np.stack([np.ones(len(index)), -linear[index]], axis=1))
    if solved is None:
        return []
    start, slope = solved[:, 0] / solved[:, 0].sum(), solved[:, 1]
    slope = slope - start * slope.sum()
    line = np.stack([start, slope])
    (square, mixed), (_, curve) = (line @ block @ line.T).tolist()
    # (curve - r^2) t^2 + 2 mixed t + square = 0
    leading = curve - radius**2
    if mixed**2 < leading * square:
        return []
    root = (mixed**2 - leading * square) ** 0.5
    return [square / (sign * root - mixed) for sign in (1, -1) if sign * root != mixed]


def _nearest_without_conflict(gramian: Array, linear: Array, radius: float) -> Array:
    """x of the direction nearest to g0 along which no loss grows, at most `radius` away from it."""
    moves = nonnegative_minimum(gramian, linear)
    norm = max(float(moves @ gramian @ moves), 0.0) ** 0.5
    return moves * min(1.0, radius / norm) if norm > 0 else moves

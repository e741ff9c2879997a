"""The upper level of BiLB4MTL: how far the (weighted, normalised) losses of the tasks are apart.

    adjacent   sum_i |v_i - v_next(i)| over neighbours in the order of the tasks (the paper's f, arXiv 2502.08585 eq. 1)
    all        mean over all pairs of |v_i - v_j|, times n - 1, so that it has the scale of n - 1 neighbours (ours)

|d| may be smoothed to sqrt(d^2 + gamma). Tasks outside `active` take no part: neighbours bridge the gap.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pairs = Literal["adjacent", "all"]


def discrepancy(values: Tensor, active: Tensor, pairs: Pairs, smoothing: float = 0.0) -> Tensor:
    """Scalar discrepancy of `values [K]` over the tasks in the bool mask `active [K]`, differentiable in `values`.

    Cost: O(K) for adjacent pairs, O(K log K) for all pairs, O(K^2) for all pairs with smoothing.
    """
    if pairs == "adjacent":
        return _adjacent(values, active, smoothing)
    return _all_pairs(values, active) if smoothing == 0 else _all_pairs_smoothed(values, active, smoothing)


def largest_slopes(active: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """The largest possible |df/dv_i| `[K]`: the number of neighbours (0, 1 or 2), or 2 (n-1)/n over all pairs; zero
    where not `active`."""
    count = active.sum()
    if pairs == "adjacent":
        place = active.cumsum(dim=0)
        slopes = (place > 1).to(dtype) + (place < count).to(dtype)
    else:
        slopes = 2 - 2 / count.clamp(min=1).to(dtype)
    return slopes * active


def edge_of_weight(
    sigma: Tensor, denominator: Tensor, active: Tensor, pairs: Pairs, tau: Literal["one", "weights"]
) -> tuple[Tensor, Tensor]:
    """The factor of f in g + factor * f at which a dF/dl_i can reach zero, min_i sigma_i / (denominator * tau_i *
    largest slope of f), and whether there are several tasks: one alone has no discrepancy, so that any factor is
    harmless. Both scalars.

    Args:
        sigma: weights `[K]`, detached. denominator: scalar, of g.
        tau: what multiplies the losses in f, their weights or one.
    """
    slopes = largest_slopes(active, pairs, sigma.dtype)
    if tau == "one":
        # A weight that has underflowed to zero must not turn the slope of an inactive task into NaN.
        slopes = slopes / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
    steepest = slopes.amax()
    several = steepest > 0
    return 1 / (denominator * torch.where(several, steepest, 1.0)), several


def _adjacent(values: Tensor, active: Tensor, smoothing: float) -> Tensor:
    positions = torch.arange(values.numel(), device=values.device)
    last_active = torch.where(active, positions, -1).cummax(dim=0).values
    previous = torch.cat([last_active.new_full((1,), -1), last_active[:-1]])
    differences = values - values[previous.clamp(min=0)]
    magnitudes = differences.abs() if smoothing == 0 else (differences.square() + smoothing).sqrt()
    return torch.where(active & (previous >= 0), magnitudes, 0.0).sum()


def _all_pairs(values: Tensor, active: Tensor) -> Tensor:
    # sum_{i<j} |v_i - v_j| = sum_i s_i v_i with s_i = #{v_j < v_i} - #{v_j > v_i}: value and gradient are those of the
    # K x K matrix (zero at ties, as for |0|), without building it.
    fixed = torch.where(active, values.detach(), torch.inf)
    ordered = fixed.sort().values
    count = active.sum()
    slopes = torch.searchsorted(ordered, fixed) + torch.searchsorted(ordered, fixed, right=True) - count
    return torch.dot(torch.where(active, slopes, 0) * _mean_times_rest(count, values.dtype), values)


def _all_pairs_smoothed(values: Tensor, active: Tensor, smoothing: float) -> Tensor:
    differences = values.unsqueeze(0) - values.unsqueeze(1)
    magnitudes = (differences.square() + smoothing).sqrt()
    mask = torch.triu(active.unsqueeze(0) & active.unsqueeze(1), diagonal=1)
    return torch.where(mask, magnitudes, 0.0).sum() * _mean_times_rest(active.sum(), values.dtype)


def _mean_times_rest(count: Tensor, dtype: torch.dtype) -> Tensor:
    """What brings a sum over n (n-1) / 2 pairs to their mean times n - 1."""
    return 2 / count.clamp(min=1).to(dtype)

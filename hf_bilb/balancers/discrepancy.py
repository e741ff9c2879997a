"""The upper level of BiLB4MTL: how far the (weighted, normalised) losses of the tasks are apart.

    adjacent   sum_i |v_i - v_next(i)| over neighbours in the order of the tasks (the paper's f, arXiv 2502.08585 eq. 1)
    all        mean over all pairs of |v_i - v_j|, times n - 1, so that it has the scale of n - 1 neighbours (ours)

|d| may be smoothed to sqrt(d^2 + gamma). Tasks outside `active` take no part: neighbours bridge the gap.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from hf_bilb.engine.constants import infinity, one, zero

Pairs = Literal["adjacent", "all"]


def discrepancy(values: Tensor, active: Tensor, pairs: Pairs, smoothing: float = 0.0) -> Tensor:
    """Scalar discrepancy of `values [K]` over the tasks in the bool mask `active [K]`, differentiable in `values`.

    Cost: O(K) for adjacent pairs, O(K log K) for all pairs, O(K^2) for all pairs with smoothing.
    """
    if pairs == "adjacent":
        return _adjacent(values, active, smoothing)
    return _all_pairs(values, active) if smoothing == 0 else _all_pairs_smoothed(values, active, smoothing)


def with_slopes(values: Tensor, active: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The discrepancy without smoothing, and its slopes df/dv `[K]`, as autograd has both."""
    if pairs == "all":
        slopes = _slopes_of_all_pairs(values, active)
        return torch.dot(slopes, values), slopes
    differences, previous, follows = _to_previous(values, active)
    differences = torch.where(follows, differences, zero(differences.dtype, differences.device))
    signs = differences.sign()
    return differences.abs().sum(), signs - torch.zeros_like(signs).index_add(0, previous, signs)


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


@functools.lru_cache(maxsize=64)
def _largest_slope(num_tasks: int, pairs: Pairs, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[K + 1]`: the largest of `largest_slopes` for every number of active tasks; one where there is no pair."""
    with torch.inference_mode(False):
        number = torch.arange(num_tasks + 1, device=device, dtype=dtype)
        largest = (number - 1).clamp(max=2) if pairs == "adjacent" else 2 - 2 / number.clamp(min=1)
        return torch.where(number > 1, largest, 1.0)


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
    if tau == "weights":
        count = active.sum()
        steepest = _largest_slope(len(sigma), pairs, sigma.dtype, sigma.device).take(count)
        return (denominator * steepest).reciprocal(), count > 1
    # A weight that has underflowed to zero must not turn the slope of an inactive task into NaN.
    slopes = largest_slopes(active, pairs, sigma.dtype) / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
    steepest = slopes.amax()
    several = steepest > 0
    return (denominator * torch.where(several, steepest, one(steepest.dtype, steepest.device))).reciprocal(), several


def _adjacent(values: Tensor, active: Tensor, smoothing: float) -> Tensor:
    differences, _, follows = _to_previous(values, active)
    magnitudes = differences.abs() if smoothing == 0 else (differences.square() + smoothing).sqrt()
    return torch.where(follows, magnitudes, zero(magnitudes.dtype, magnitudes.device)).sum()


def _to_previous(values: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The differences `[K]` to the previous active task, its number, and where there is one, which is active itself."""
    positions = torch.arange(values.numel(), device=values.device)
    last_active = torch.where(active, positions, -1).cummax(dim=0).values
    before = torch.cat([last_active.new_full((1,), -1), last_active[:-1]])
    previous = before.clamp(min=0)
    return values - values[previous], previous, active & (before >= 0)


def _all_pairs(values: Tensor, active: Tensor) -> Tensor:
    return torch.dot(_slopes_of_all_pairs(values.detach(), active), values)


def _slopes_of_all_pairs(values: Tensor, active: Tensor) -> Tensor:
    # sum_{i<j} |v_i - v_j| = sum_i s_i v_i with s_i = #{v_j < v_i} - #{v_j > v_i}: value and gradient are those of the
    # K x K matrix (zero at ties, as for |0|), without building it.
    fixed = torch.where(active, values, infinity(values.dtype, values.device))
    ordered = fixed.sort().values
    count = active.sum()
    slopes = torch.searchsorted(ordered, fixed) + torch.searchsorted(ordered, fixed, right=True) - count
    scale = _mean_times_rest(len(values), values.dtype, values.device).take(count)
    return torch.where(active, slopes, zero(slopes.dtype, slopes.device)) * scale


def _all_pairs_smoothed(values: Tensor, active: Tensor, smoothing: float) -> Tensor:
    differences = values.unsqueeze(0) - values.unsqueeze(1)
    magnitudes = (differences.square() + smoothing).sqrt()
    scale = _mean_times_rest(len(values), values.dtype, values.device).take(active.sum())
    mask = torch.triu(active.unsqueeze(0) & active.unsqueeze(1), diagonal=1)
    return torch.where(mask, magnitudes, zero(magnitudes.dtype, magnitudes.device)).sum() * scale


@functools.lru_cache(maxsize=64)
def _mean_times_rest(num_tasks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[K + 1]`: for every number n of active tasks what makes a sum over n (n-1) / 2 pairs their mean times n - 1."""
    with torch.inference_mode(False):
        return 2 / torch.arange(num_tasks + 1, device=device, dtype=dtype).clamp(min=1)

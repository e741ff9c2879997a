"""GO4Align, group optimization for multi-task alignment. Shen et al., NeurIPS 2024 (arXiv 2404.06486).

    q_k <- q_k exp(-eta l_k) / sum_j q_j exp(-eta l_j)     q in the simplex, q = 1 / K at the start
    w_k = (sum_j l_j / l_k) q_k                            the "risk-guided indicator"
    F = sum_k c_k l_k,   c_k = the mean of w over the group of k

    eta -> step_size, M -> num_groups, c -> the coefficients, l_k -> losses (after `normalization`)

q keeps the sum of each task's losses; groups are found again in every update by k-means of the K numbers w. In one
dimension its optimum is a cut of the sorted numbers, found by dynamic programming: deterministic, without a start, and
equal on all ranks. With one group (the default of the official command line) every task has the same weight, which
depends on the losses; c is a constant to the gradient.

The official code runs Lloyd's algorithm in float32 from M random tasks' numbers and stops when the centres move by
less than 0.01 together, which may be short of the optimum (`assignment: lloyd`, here with draws of its own and in the
losses' precision); a group that has become empty, where it divides by nothing, keeps its centre here. Its M >= 2 needs
an import that is commented out. The number of groups per data set is not in it. Absent tasks belong to no group; with
`absent_tasks: hold` their last loss is added to the sum again, so that a task does not fall behind for coming often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_bilb.balancers.random_numbers import NormalDraws
from hf_bilb.balancers.registry import register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.constants import lowest, one, zero
from hf_bilb.engine.objective import Derivatives, HistoryObjective, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, masked_sum

#: Lloyd's algorithm: the square of the centres' shifts together below which it rests, and the most rounds it takes.
_REST, _ROUNDS = 1e-4, 50


@dataclass(frozen=True, kw_only=True)
class Go4AlignOptions(BalancerOptions):
    """Options of `go4align`.

    Attributes:
        num_groups: M, at most so many groups (no more than there are tasks).
        step_size: eta, how strongly a task's past losses lower its weight.
        assignment: how the groups are found: `kmeans`, the exact optimum in one dimension, or `lloyd`, the official
            search from random centres.
        seed: of the random centres.
    """

    num_groups: int = bounded(1, at_least=1)
    step_size: float = bounded(1e-4, at_least=0)
    assignment: Literal["kmeans", "lloyd"] = "kmeans"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive_normalization("go4align")


@register_balancer("go4align", options=Go4AlignOptions, paper="Shen et al., NeurIPS 2024 (arXiv 2404.06486)")
class Go4Align(HistoryObjective):
    """GO4Align. State: `loss_sums [K]`; q is the softmax of -eta times them; with `lloyd` the number of updates. Cost:
    one forward and one backward of the model; with M > 1 groups M passes over K x K numbers in an update, or with
    `lloyd` 50 over M x K."""

    takes_logarithm = True
    loss_sums: Tensor

    def __init__(self, num_tasks: int, options: Go4AlignOptions) -> None:
        super().__init__()
        self._num_groups = min(options.num_groups, num_tasks)
        self._step_size = options.step_size
        # One group is one group, wherever it began.
        searches = options.assignment == "lloyd" and self._num_groups > 1
        self.starts = NormalDraws(num_tasks, options.seed) if searches else None
        self.register_buffer("loss_sums", torch.zeros(num_tasks, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """Add the active tasks' losses to their sums."""
        self.loss_sums.add_(torch.where(active, losses, zero(losses.dtype, losses.device)))

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the `active` tasks; the weights are constants to its gradient, and so its coefficients."""
        return ObjectiveValue(masked_sum(self._weights(losses.detach(), active) * losses, active))

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = c_k."""
        weights = self._weights(losses, active)
        return Derivatives(ObjectiveValue((weights * losses).sum()), weights, ())

    def _weights(self, losses: Tensor, active: Tensor) -> Tensor:
        """c `[K]`, zero where not active."""
        indicator = self._indicator(losses, active)
        if self.starts is None:
            return group_means(indicator, active, self._num_groups)
        # Those with the smallest draws: M different ones, each as likely as any other.
        order = torch.argsort(torch.where(active, self.starts(losses), torch.inf))
        return lloyd_means(indicator, active, order[: self._num_groups])

    def end_step(self) -> None:
        """The next update begins its search again; a frozen method always from the same tasks."""
        if self.starts is not None and self.training:
            self.starts.end_step()

    def _indicator(self, losses: Tensor, active: Tensor) -> Tensor:
        """w `[K]`, zero where not active, by way of logarithms: q of a task may be as small as it likes."""
        # Finite, so that no NaN arises where no task is active.
        nothing = lowest(losses.dtype, losses.device)
        logits = torch.where(active, -self._step_size * self.loss_sums, nothing)
        logarithms = torch.where(active, losses, one(losses.dtype, losses.device)).log()
        total = torch.logsumexp(torch.where(active, logarithms, nothing), dim=0)
        found = torch.exp(total - logarithms + torch.log_softmax(logits, dim=0))
        return torch.where(active, found, zero(found.dtype, found.device))


def lloyd_means(values: Tensor, active: Tensor, start: Tensor) -> Tensor:
    """Each value's centre `[K]`, zero where not active, when Lloyd's algorithm comes to rest; at most 50 rounds.

    Args:
        values: `[K]`.
        active: bool `[K]`, which of them count.
        start: `[M]`, whose values are the first centres; those not active stand for none.

    No device synchronisation: rounds after it has come to rest change nothing.
    """
    counts = active.to(values.dtype)
    centers = torch.where(active[start], values[start], torch.inf)
    group = torch.zeros_like(active, dtype=torch.int64)
    moving = torch.ones_like(active.any())
    for _ in range(_ROUNDS):
        nearest = (torch.where(active, values, 0.0)[:, None] - centers).abs().argmin(dim=1)
        sizes = torch.zeros_like(centers).index_add(0, nearest, counts)
        sums = torch.zeros_like(centers).index_add(0, nearest, torch.where(active, values, 0.0))
        means = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
        shift = torch.where(sizes > 0, (means - centers).abs(), 0.0).sum()
        group, centers = torch.where(moving, nearest, group), torch.where(moving, means, centers)
        moving = moving & (shift.square() >= _REST)
    return torch.where(active, centers[group], 0.0)


def group_means(values: Tensor, active: Tensor, num_groups: int) -> Tensor:
    """Each value's group mean `[K]`, zero where not active, for the groups of exact one-dimensional k-means.

    Args:
        values: `[K]`.
        active: bool `[K]`, which of them count.
        num_groups: M, from 1 to K.

    Of several optima it takes the one with the earliest cuts. Cost: M K^2 operations, no device synchronisation.
    """
    if num_groups == 1:
        mean = torch.where(active, values, zero(values.dtype, values.device)).double().sum() / active.sum().clamp(min=1)
        return torch.where(active, mean.to(values.dtype), zero(values.dtype, values.device))
    # Those that do not count lie at the end and cost nothing, whichever group they fall into.
    order = torch.argsort(torch.where(active, values, torch.inf), stable=True)
    counts, ranked = active[order].double(), torch.where(active, values, 0.0).double()[order]
    group = _optimal_groups(ranked, counts, num_groups)
    sums = torch.zeros(num_groups, dtype=torch.float64, device=values.device).index_add(0, group, ranked * counts)
    sizes = torch.zeros_like(sums).index_add(0, group, counts)
    means = (sums / sizes.clamp(min=1))[group]
    return torch.where(active, torch.zeros_like(means).index_copy(0, order, means).to(values.dtype), 0.0)


def _optimal_groups(ranked: Tensor, counts: Tensor, num_groups: int) -> Tensor:
    """The group `[K]` of each of the sorted values, by dynamic programming over where a group ends."""
    cost = _segment_costs(ranked, counts)
    size = len(ranked)
    position = torch.arange(size, device=ranked.device)
    best = cost[0]  # [K]: of the first j + 1 values in one group
    starts = []
    for _ in range(num_groups - 1):
        # One more group, from i to j, after the best of what lies before i.
        before = torch.cat([best.new_full((1,), torch.inf), best[:-1]])
        best, start = (before[:, None] + cost).min(dim=0)
        starts.append(start)
    group = torch.zeros_like(position)
    end = position[-1:]
    for start in reversed(starts):
        first = start.index_select(0, end)
        group = group + (position >= first)
        end = (first - 1).clamp(min=0)  # within, whatever an infinite cost leads to
    return group


def _segment_costs(ranked: Tensor, counts: Tensor) -> Tensor:
    """`[K, K]`: the sum of squared distances to their mean of the values from i to j, infinite for j < i."""
    center = (ranked * counts).sum() / counts.sum().clamp(min=1)
    shifted = (ranked - center) * counts
    sums, squares, sizes = (torch.cat([one.new_zeros(1), one.cumsum(0)]) for one in (shifted, shifted.square(), counts))
    total = sums[None, 1:] - sums[:-1, None]
    number = (sizes[None, 1:] - sizes[:-1, None]).clamp(min=1)
    cost = (squares[None, 1:] - squares[:-1, None] - total.square() / number).clamp(min=0)
    size = len(ranked)
    below = torch.ones(size, size, dtype=torch.bool, device=ranked.device).tril(-1)
    return torch.where(below, torch.inf, cost)

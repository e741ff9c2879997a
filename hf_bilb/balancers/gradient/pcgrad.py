"""PCGrad, gradient surgery. Yu et al., NeurIPS 2020 (arXiv 2001.06782), Algorithm 1.

    for each task i: p = g_i; for j in some order: if p . g_j < 0: p <- p - (p . g_j / |g_j|^2) g_j
    the shared parameters descend sum_i p_i

With p_i = sum_k M_ik g_k all of it happens to the rows of M [K, K], which starts as I: the weights are the sums of M's
columns, and p_i . g_j are the entries of M G. The K rows take their steps together.

The paper leaves j = i out and torchjd does; official code and its copies do not, nor do we, which makes a difference
only where the projections have turned p_i against g_i itself. LibMTL adds 1e-8 to |g_j|^2. Official code shuffles one
list again and again; ours are independent orders, a function of (seed, number of the update): no other random number
changes them, they are the same on all ranks, and a dropped update repeats its own. Official code clips to norm 1
(`max_norm: 1` here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import Array, array
from hf_bilb.balancers.random_numbers import NormalDraws
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod, HeadWeights
from hf_bilb.engine.objective import HistoryObjective

Order = Literal["random", "identity"]


@dataclass(frozen=True, kw_only=True)
class PcGradOptions(GradientOptions):
    """Options of `pcgrad`.

    Attributes:
        order: in which a gradient meets the others: `random`, drawn in every update, or `identity`, theirs.
        seed: of the draws of a `random` order.
    """

    order: Order = "random"
    seed: int = 0
    heads: HeadWeights = "sum"


class Orders(torch.nn.Module):
    """For each of K tasks an order of all K, which a method goes through.

    State: with `random`, the number of updates, on the host.
    """

    def __init__(self, num_tasks: int, order: Order, seed: int) -> None:
        super().__init__()
        self._num_tasks = num_tasks
        self.draws = NormalDraws(num_tasks * num_tasks, seed) if order == "random" else None

    def forward(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        """`[A, A]`, a row for each of `tasks`. An absent task leaves the order of the others as it is."""
        if self.draws is None:
            return torch.arange(len(tasks)).expand(len(tasks), -1)
        drawn = self.draws(gramian).view(self._num_tasks, self._num_tasks)
        return (drawn if len(tasks) == self._num_tasks else drawn[tasks[:, None], tasks]).argsort(dim=1)

    def end_step(self) -> None:
        """The next update draws again."""
        if self.draws is not None:
            self.draws.end_step()


@register_balancer(
    "pcgrad",
    options=PcGradOptions,
    paper="Yu et al., NeurIPS 2020 (arXiv 2001.06782)",
    costs=(Cost(1, "K", memory="K d"),),
)
class PcGrad(GramianMethod, HistoryObjective):
    """PCGrad. State: with random orders the number of updates, on the host. Cost: K passes over K x K numbers."""

    def __init__(self, num_tasks: int, options: PcGradOptions) -> None:
        super().__init__()
        self.orders = Orders(num_tasks, options.order, options.seed)

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """w `[A]`."""
        return torch.from_numpy(surgery(array(gramian), array(self.orders(gramian, tasks)))).sum(dim=0)

    def end_step(self) -> None:
        """The next update draws again, balancing or frozen: nothing is learned that could stay."""
        self.orders.end_step()


def surgery(gramian: Array, order: Array) -> Array:
    """M `[A, A]`, whose rows are the projected gradients; row i meets the tasks in the order of `order[i]`."""
    each = np.arange(len(gramian))
    rows = np.eye(len(gramian))
    products = gramian.copy()  # of the projected gradients with the given ones
    squares = np.maximum(gramian.diagonal(), np.finfo(gramian.dtype).tiny)
    for met in order.T:
        # A product below zero is one with a gradient that is not.
        factor = np.minimum(products[each, met], 0.0) / squares[met]
        rows[each, met] -= factor
        products -= factor[:, None] * gramian[met]
    return rows

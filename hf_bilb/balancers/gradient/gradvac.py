"""GradVac, gradient vaccine. Wang, Tsvetkov, Firat, Cao, ICLR 2021 (arXiv 2010.05874), Algorithm 1.

    for each task i: p = g_i; for each other task j:
        c = cos(p, g_j)
        if c < r_ij:  p <- p + |p| (r_ij sqrt(1 - c^2) - c sqrt(1 - r_ij^2)) / (|g_j| sqrt(1 - r_ij^2)) g_j
        r_ij <- (1 - beta) r_ij + beta c
    the shared parameters descend sum_i p_i

r -> targets, zero at the start, so that it begins as PCGrad; beta -> beta. After a correction the cosine is r_ij. As in
`pcgrad` it is done to the rows of a K x K matrix. LibMTL (beta 0.5) visits the tasks in a random order, torchjd too;
the reference for the tests, and the default here, in theirs. The paper has targets for groups of parameters, here the
shared ones are one group.

A target near 1 asks for a correction without end: at most 1 - 1e-6 is asked for. A zero gradient has no cosine, and
neither corrects nor counts. The target of an absent task stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.pcgrad import Order, Orders
from hf_bilb.balancers.gradient.solvers import Array, array, quietly
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod, HeadWeights
from hf_bilb.engine.objective import HistoryObjective

#: The largest cosine that is asked for.
_MOST = 1 - 1e-6


@dataclass(frozen=True, kw_only=True)
class GradVacOptions(GradientOptions):
    """Options of `gradvac`.

    Attributes:
        beta: what share of a target each update replaces.
        order: in which a gradient meets the others: `identity`, theirs, or `random`, drawn in every update.
        seed: of the draws of a `random` order.
    """

    beta: float = bounded(0.5, at_least=0, at_most=1)
    order: Order = "identity"
    seed: int = 0
    heads: HeadWeights = "sum"


@register_balancer(
    "gradvac",
    options=GradVacOptions,
    paper="Wang et al., ICLR 2021 (arXiv 2010.05874)",
    costs=(Cost(1, "K", memory="K d"),),
)
class GradVac(GramianMethod, HistoryObjective):
    """GradVac. State: `targets [K, K]`; with random orders the number of updates, on the host. Cost: K passes over
    K x K numbers."""

    targets: Tensor

    def __init__(self, num_tasks: int, options: GradVacOptions) -> None:
        super().__init__()
        self._beta = options.beta
        self.orders = Orders(num_tasks, options.order, options.seed)
        self.register_buffer("targets", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """w `[A]`."""
        known = self.targets.to(gramian)
        targets = array(known)[array(tasks)[:, None], array(tasks)]
        rows, cosines = vaccine(array(gramian), targets, array(self.orders(gramian, tasks)))
        if self.training:
            array(known)[array(tasks)[:, None], array(tasks)] = targets + self._beta * (cosines - targets)
            self.targets.copy_(known)
        return torch.from_numpy(rows).sum(dim=0)

    def end_step(self) -> None:
        """The next update draws again."""
        self.orders.end_step()


@quietly
def vaccine(gramian: Array, targets: Array, order: Array) -> tuple[Array, Array]:
    """The rows `[A, A]` of the corrected gradients, and the cosines that were met, the target where there was none."""
    size = len(gramian)
    rows = np.eye(size)
    products = gramian.copy()  # of the corrected gradients with the given ones
    norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    asked = np.minimum(targets, _MOST)
    slants = np.sqrt(np.maximum(1 - asked * asked, 0.0))
    cosines = targets.copy()
    each = np.arange(size)
    for met in order.T:
        own = np.sqrt(np.maximum((rows * products).sum(axis=1), 0.0))
        scale = own * norms[met]
        counts = (scale > 0) & (met != each)
        cosine = np.minimum(np.maximum(products[each, met] / np.where(counts, scale, 1.0), -1.0), 1.0)
        target, slant = asked[each, met], slants[each, met]
        sine = np.sqrt(1 - cosine * cosine)
        wanted = own * (target * sine - cosine * slant) / np.where(counts, norms[met] * slant, 1.0)
        factor = np.where(counts & (cosine < target), wanted, 0.0)
        cosines[each, met] = np.where(counts, cosine, targets[each, met])
        rows[each, met] += factor
        products += factor[:, None] * gramian[met]
    return rows, cosines

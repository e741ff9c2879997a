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

import torch
from torch import Tensor

from hf_bilb.balancers.gradient.pcgrad import Order, Orders
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
        targets = known[tasks[:, None], tasks]
        rows, cosines = vaccine(gramian, targets, self.orders(gramian, tasks))
        if self.training:
            known[tasks[:, None], tasks] = targets + self._beta * (cosines - targets)
            self.targets.copy_(known)
        return rows.sum(dim=0)

    def end_step(self) -> None:
        """The next update draws again."""
        self.orders.end_step()


def vaccine(gramian: Tensor, targets: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The rows `[A, A]` of the corrected gradients, and the cosines that were met, the target where there was none."""
    size = len(gramian)
    rows = torch.eye(size, dtype=gramian.dtype)
    products = gramian.clone()  # of the corrected gradients with the given ones
    norms = gramian.diagonal().clamp_min(0).sqrt()
    asked = targets.clamp_max(_MOST)
    slants = (1 - asked.square()).clamp_min(0).sqrt()
    cosines = targets.clone()
    itself = torch.arange(size)[:, None]
    for met in order.T[:, :, None]:
        own = (rows * products).sum(dim=1, keepdim=True).clamp_min(0).sqrt()
        scale = own * norms[met]
        counts = (scale > 0) & (met != itself)
        cosine = (products.gather(1, met) / torch.where(counts, scale, 1.0)).clamp(-1, 1)
        target, slant = asked.gather(1, met), slants.gather(1, met)
        sine = (1 - cosine.square()).sqrt()
        wanted = own * (target * sine - cosine * slant) / torch.where(counts, norms[met] * slant, 1.0)
        factor = torch.where(counts & (cosine < target), wanted, 0.0)
        cosines.scatter_(1, met, torch.where(counts, cosine, targets.gather(1, met)))
        rows.scatter_add_(1, met, factor)
        products += factor * gramian[met[:, 0]]
    return rows, cosines

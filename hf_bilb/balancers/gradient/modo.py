"""MoDo, multi-objective gradient with double sampling. Chen et al., NeurIPS 2023 (arXiv 2305.20057), Algorithm 1.

    a <- P(a - gamma (J_1 J_2^T a + rho a))        a = 1 / K at the start, P projects on the simplex
    the shared parameters descend J_3^T a

J_1, J_2, J_3 -> the gradients of three independent samples, a -> shares. The product of two samples has no bias, where
the Gramian of one has that of its noise. Samples are the micro-batches of a step in turn; with one micro-batch all are
the same. Authors' code (in LibMTL): gamma 1e-3, rho 0.1, as here; torchjd has gamma 0.1. There the heads descend the
mean over the three samples, here what `heads` says. The paper's variant with two samples takes the mean of both for
the direction.

In a step with absent tasks a is that of the present ones, scaled to sum 1; the absent ones' stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import Array, array, project_to_simplex
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod, HeadWeights


@dataclass(frozen=True, kw_only=True)
class MoDoOptions(GradientOptions):
    """Options of `modo`.

    Attributes:
        gamma: step size of the shares.
        rho: an L2 penalty on the shares.
    """

    gamma: float = bounded(1e-3, at_least=0)
    rho: float = bounded(0.1, at_least=0)
    heads: HeadWeights = "sum"


class SharesMethod(GramianMethod):
    """A method that remembers shares a in the simplex. State: `shares [K]`, 1 / K at the start."""

    samples = 3
    shares: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("shares", torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64))

    def known_shares(self, tasks: Tensor) -> tuple[Array, float]:
        """Those of `tasks`, scaled to sum 1, equal ones where all of them are zero; and their sum before."""
        known = array(self.shares.to("cpu", torch.float64))[array(tasks)]
        total = known.sum()
        return (known / total if total > 0 else np.full_like(known, 1 / len(known))), total

    def remember(self, shares: Array, tasks: Tensor, total: float) -> None:
        """Keep the new shares of `tasks`, with the sum `total` that these had; not where the method is frozen."""
        if self.training:
            self.shares.index_copy_(0, tasks.to(self.shares.device), torch.from_numpy(shares * total).to(self.shares))


@register_balancer(
    "modo",
    options=MoDoOptions,
    paper="Chen et al., NeurIPS 2023 (arXiv 2305.20057), Algorithm 1",
    costs=(Cost(1, "K", memory="3 K d"),),
)
class MoDo(SharesMethod):
    """MoDo. State: `shares [K]`."""

    def __init__(self, num_tasks: int, options: MoDoOptions) -> None:
        super().__init__(num_tasks)
        self._gamma, self._rho = options.gamma, options.rho

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """a `[A]` after its step, for the third sample."""
        known, total = self.known_shares(tasks)
        shares = project_to_simplex(known - self._gamma * (array(gramian) @ known + self._rho * known))
        self.remember(shares, tasks, total)
        return torch.from_numpy(shares)

"""MoCo, multi-objective gradient correction. Fernando et al., ICLR 2023, as in its authors' code (LibMTL).

    h_k = l_k g_k / (|g_k| + 1e-8)
    y_k <- y_k - beta t^-s (y_k - h_k)                                  y = 0 at the start
    a <- softmax(a - gamma t^-u (y y^T + rho I) a)                      a = 1 / K at the start
    the shared parameters descend sum_k a_k y_k

t -> the number of the update from 1, y -> averages, a -> shares, s -> beta_sigma, u -> gamma_sigma. The averages take
the noise of a batch out of the gradients. The paper projects a on the simplex; its authors' code takes the softmax, as
here, which keeps a near 1 / K. The gradients are normalised to their losses, so their own size is lost. The 1e-8 is
official, too: gradients that are smaller count for less.

In a step with absent tasks a is that of the present ones, scaled to sum 1; the absent ones' y and a stay. y is kept in
the precision of the balancer, K x d numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_bilb.balancers.gradient.graddrop import VectorOptions
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.gradient_method import Direction, JacobianMethod
from hf_bilb.errors import OptionError

_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class MoCoOptions(VectorOptions):
    """Options of `moco`.

    Attributes:
        beta: step size of the averages.
        beta_sigma: how fast it falls, as a power of the number of updates.
        gamma: step size of the shares.
        gamma_sigma: how fast it falls.
        rho: an L2 penalty on the shares.
    """

    beta: float = bounded(0.5, at_least=0)
    beta_sigma: float = bounded(0.5, at_least=0)
    gamma: float = bounded(0.1, at_least=0)
    gamma_sigma: float = bounded(0.5, at_least=0)
    rho: float = bounded(0.0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradients == "features":
            raise OptionError(
                "gradients: 'features' is not valid, expected 'parameters': moco averages gradients over steps, and "
                "those of features belong to one batch"
            )


@register_balancer(
    "moco",
    options=MoCoOptions,
    paper="Fernando et al., ICLR 2023, Algorithm 1",
    costs=(Cost(1, "K", memory="2 K d"),),
)
class MoCo(JacobianMethod):
    """MoCo. State: `averages [K, d]`, `shares [K]` and the number of updates."""

    needs_model = True
    averages: Tensor | None
    shares: Tensor
    updates: Tensor

    def __init__(self, num_tasks: int, options: MoCoOptions) -> None:
        super().__init__()
        self._options = options
        self.register_buffer("averages", None)
        self.register_buffer("shares", torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.float64))

    def allocate(self, num_parameters: int) -> None:
        """Make room for the averages; those of the same size stay."""
        if self.averages is not None and self.averages.shape[1] == num_parameters:
            return
        self.averages = self.shares.new_zeros(len(self.shares), num_parameters)

    @torch.no_grad()
    def direction(self, jacobian: Tensor, losses: Tensor, tasks: Tensor) -> Direction:
        """sum_k a_k y_k; the weights are a."""
        if self.averages is None:
            raise RuntimeError("allocate() comes before direction()")
        options, time, where = self._options, self.updates + 1, tasks.to(self.averages.device)
        step = options.beta * float(time) ** -options.beta_sigma
        scale = step * losses.to(jacobian) / (torch.linalg.vector_norm(jacobian, dim=1) + _EPSILON)
        averages = self.averages[where].to(jacobian)
        averages.mul_(1 - step).addcmul_(scale[:, None], jacobian)  # in place: they are K x d numbers
        known = self.shares[where].to("cpu", torch.float64)
        total = known.sum()
        slope = (averages @ averages.T).to(known) @ (known / total) + options.rho * (known / total)
        shares = torch.softmax(known / total - (options.gamma * time**-options.gamma_sigma).to(known) * slope, dim=0)
        if self.training:
            self.averages.index_copy_(0, where, averages.to(self.averages))
            self.shares.index_copy_(0, where, (total * shares).to(self.shares))
            self.updates.add_(1)
        return Direction(shares.to(jacobian) @ averages, shares)

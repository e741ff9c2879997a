"""RLW, random loss weighting. Lin, Ye, Zhang, Tsang, TMLR 2022 (arXiv 2111.10603), the normal distribution.

    F = sum_k w_k l_k,   w = softmax(e),   e ~ N(0, I_K), drawn again in every update

    w_k -> weights, l_k -> losses (after `normalization`)

The weights add up to 1, not to K, as in LDC-MTL, LibMTL and torchjd (`Random`), which draw from torch's global
generator. Ours is a function of (seed, number of the update): no other random number changes it, it is the same on
all ranks, a dropped update repeats its draw, and all micro-batches of an update share one. Drawing goes on when the
balancer is frozen: nothing is learned that could stay. Absent tasks take no part in the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_bilb.balancers.random_numbers import NormalDraws
from hf_bilb.balancers.registry import register_balancer
from hf_bilb.engine.objective import Derivatives, HistoryObjective, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, masked_softmax, masked_sum


@dataclass(frozen=True, kw_only=True)
class RandomOptions(BalancerOptions):
    """Options of `rlw`.

    Attributes:
        seed: of the draws; runs that shall differ in them need different ones.
    """

    seed: int = 0


@register_balancer("rlw", options=RandomOptions, paper="Lin et al., TMLR 2022 (arXiv 2111.10603)")
class RandomWeighting(HistoryObjective):
    """RLW. State: the number of updates, on the host. Cost: one forward and one backward of the model; K numbers are
    drawn on the CPU and sent to the device, without waiting for it."""

    def __init__(self, num_tasks: int, options: RandomOptions) -> None:
        super().__init__()
        self.draws = NormalDraws(num_tasks, options.seed)

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the `active` tasks, always with the same weights between two updates."""
        weights = masked_softmax(self.draws(losses), active)
        return ObjectiveValue(masked_sum(weights * losses, active), weights=weights)

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = w_k."""
        output = self(losses, active, None)
        return Derivatives(output, output.weights, ())

    def end_step(self) -> None:
        """The next update draws again."""
        self.draws.end_step()

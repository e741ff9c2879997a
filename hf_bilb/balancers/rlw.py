"""RLW, random loss weighting. Lin, Ye, Zhang, Tsang, TMLR 2022 (arXiv 2111.10603), the normal distribution.

    F = sum_k w_k l_k,   w = softmax(e),   e ~ N(0, I_K), drawn anew in every update

    w_k -> weights, l_k -> losses (after `normalization`)

The weights add up to 1, not to K, as in LDC-MTL, LibMTL and torchjd (`Random`), which draw from torch's global
generator. Ours is a function of (seed, number of the update): no other random number changes it, it is the same on
all ranks, a dropped update repeats its draw, and all micro-batches of an update share one. Drawing goes on when the
balancer is frozen: nothing is learned that could stay. Absent tasks take no part in the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_bilb.balancers.options import BalancerOptions, masked_sum
from hf_bilb.balancers.registry import register_balancer
from hf_bilb.objective import HistoryObjective, ObjectiveValue

_64_BITS = 2**64 - 1


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
        self._num_tasks = num_tasks
        self._seed = options.seed
        self._generator = torch.Generator()
        self._updates = 0

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the `active` tasks, always with the same weights between two updates."""
        self._generator.manual_seed(_mixed(self._seed, self._updates))
        drawn = torch.randn(self._num_tasks, generator=self._generator, dtype=torch.float64)
        # From ordinary memory a copy of this size is staged at once; a blocking one would wait for the device.
        noise = drawn.to(losses.dtype).to(losses.device, non_blocking=True)
        # Finite, so that no NaN arises where no task is active.
        noise = torch.where(active, noise, torch.finfo(noise.dtype).min)
        weights = torch.where(active, torch.softmax(noise, dim=0), 0.0)
        return ObjectiveValue(masked_sum(weights * losses, active), weights=weights)

    def end_update(self) -> None:
        """The next update draws anew."""
        self._updates += 1

    def get_extra_state(self) -> Tensor:
        """The number of updates, as a part of the state."""
        return torch.tensor(self._updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the number of updates."""
        self._updates = int(state)


def _mixed(seed: int, count: int) -> int:
    """A seed from two numbers (splitmix64): the generator takes neighbouring seeds to similar first draws."""
    mixed = (seed * 0xD1342543DE82EF95 + (count + 1) * 0x9E3779B97F4A7C15) & _64_BITS
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return mixed ^ (mixed >> 31)

"""GLS, geometric loss strategy. Chennupati, Sistu, Yogamani, Rawashdeh, CVPR Workshops 2019 (arXiv 1904.08492).

    F = (prod_k l_k)^(1/K) = exp(mean_k log l_k)

    l_k -> losses (after `normalization`), K -> the number of active tasks

No parameters; the coefficient of a task is F / (K l_k): as with `si`, every task gets the same relative push, here
times the geometric mean of the losses, so that the steps shrink as they fall. LibMTL multiplies the losses, which runs
under or over with many tasks; torchjd (`GeometricMean`) takes logarithms, and so do we. A loss <= 0 is an error that
names the task.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_bilb.balancers.registry import register_balancer
from hf_bilb.engine.constants import one, zero
from hf_bilb.engine.objective import Derivatives, Objective, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, masked_sum


@dataclass(frozen=True, kw_only=True)
class GeometricOptions(BalancerOptions):
    """GLS has no options of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive_normalization("gls")


@register_balancer("gls", options=GeometricOptions, paper="Chennupati et al., CVPR Workshops 2019 (arXiv 1904.08492)")
class Geometric(Objective):
    """F = geometric mean of the losses. State: none. Cost: one forward and one backward of the model."""

    takes_logarithm = True

    def __init__(self, num_tasks: int, options: GeometricOptions) -> None:
        super().__init__()

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """The geometric mean of `losses [K]` over the `active` tasks; 0 where there is none."""
        # The logarithm of a placeholder must stay finite, or its zero gradient becomes NaN.
        total = masked_sum(torch.log(torch.where(active, losses, 1.0)), active)
        count = active.sum()
        return ObjectiveValue(torch.where(count > 0, torch.exp(total / count.clamp(min=1)), 0.0))

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = F / (K l_k)."""
        nothing, placeholder = zero(losses.dtype, losses.device), one(losses.dtype, losses.device)
        count, given = active.sum(), torch.where(active, losses, placeholder)  # whose logarithm is 0
        number = count.clamp(min=1)
        value = torch.where(count > 0, torch.exp(given.log().sum() / number), nothing)
        return Derivatives(ObjectiveValue(value), torch.where(active, value / number / given, nothing), ())

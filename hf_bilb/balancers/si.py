"""SI, scale-invariant loss balancing.

    F = sum_k log l_k

    l_k -> losses (after `normalization`)

No parameters; the coefficient of a task is 1 / l_k. The official code (`ScaleInvariantLinearScalarization`) adds no
epsilon, and neither do we: a loss <= 0 is an error that names the task.
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
class ScaleInvariantOptions(BalancerOptions):
    """SI has no options of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive_normalization("si")


@register_balancer(
    "si", options=ScaleInvariantOptions, paper="scale-invariant weighting (FAMO, arXiv 2306.03792, section 5)"
)
class ScaleInvariant(Objective):
    """F = sum of the logarithms of the losses. State: none. Cost: one forward and one backward of the model."""

    takes_logarithm = True

    def __init__(self, num_tasks: int, options: ScaleInvariantOptions) -> None:
        super().__init__()

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """The sum of log `losses [K]` over the `active` tasks."""
        # The logarithm of a placeholder must stay finite, or its zero gradient becomes NaN.
        return ObjectiveValue(masked_sum(torch.log(torch.where(active, losses, 1.0)), active))

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = 1 / l_k."""
        nothing, placeholder = zero(losses.dtype, losses.device), one(losses.dtype, losses.device)
        given = torch.where(active, losses, placeholder)  # whose logarithm is 0
        return Derivatives(ObjectiveValue(given.log().sum()), torch.where(active, 1 / given, nothing), ())

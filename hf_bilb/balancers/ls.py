"""LS, linear scalarization (equal weighting).

    F = sum_k l_k

    l_k -> losses (after `normalization`)

No parameters. User weights a_k of "sum_k a_k l_k" are `task_priors`, which every method takes. The official code
(LDC-MTL, FAMO, NASH: `LinearScalarization`) is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_bilb.balancers.registry import register_balancer
from hf_bilb.engine.objective import Derivatives, Objective, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, masked_sum, sum_in_closed_form


@dataclass(frozen=True, kw_only=True)
class LinearScalarizationOptions(BalancerOptions):
    """LS has no options of its own."""


@register_balancer("ls", options=LinearScalarizationOptions, paper="linear scalarization (folklore)")
class LinearScalarization(Objective):
    """F = sum of the losses. State: none. Cost: one forward and one backward of the model."""

    def __init__(self, num_tasks: int, options: LinearScalarizationOptions) -> None:
        super().__init__()

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """The sum of `losses [K]` over the `active` tasks."""
        return ObjectiveValue(masked_sum(losses, active))

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = 1."""
        return sum_in_closed_form(losses, active)

"""UW, uncertainty weighting. Kendall, Gal, Cipolla, CVPR 2018 (arXiv 1705.07115), equation 7 in its log-variance form.

    F = sum_k 0.5 (exp(-s_k) l_k + s_k),   s_k = log sigma_k^2 trainable

    s_k -> log_variance, l_k -> losses (after `normalization`), 0.5 exp(-s_k) -> weights

Official code: FAMO, NASH and LDC-MTL start at s = 0 with learning rate 0.025 in a parameter group of their own (our
defaults); MTAN and LibMTL start at s = -0.5 with the model's learning rate (`initial_log_variance: -0.5`,
`learning_rate: follow_model`). At the optimum s_k = log l_k, where UW is one half of SI.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_bilb.balancers.registry import register_balancer
from hf_bilb.balancers.router import initial_values
from hf_bilb.engine.constants import zero
from hf_bilb.engine.objective import Derivatives, Objective, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, LearningRate, masked_sum


@dataclass(frozen=True, kw_only=True)
class UncertaintyOptions(BalancerOptions):
    """Options of `uw`.

    Attributes:
        initial_log_variance: s at the start, a number or one per task.
    """

    learning_rate: LearningRate = 0.025
    initial_log_variance: float | list[float] = 0.0


@register_balancer("uw", options=UncertaintyOptions, paper="Kendall et al., CVPR 2018 (arXiv 1705.07115), eq. 7")
class Uncertainty(Objective):
    """Uncertainty weighting. State: `log_variance [K]`, trainable. Cost: one forward and one backward of the model."""

    def __init__(self, num_tasks: int, options: UncertaintyOptions) -> None:
        super().__init__()
        initial = initial_values(options.initial_log_variance, num_tasks, "initial_log_variance")
        self.log_variance = nn.Parameter(initial)

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the `active` tasks; an absent task's log variance gets no gradient."""
        precision = torch.exp(-self.log_variance)
        value = 0.5 * masked_sum(precision * losses + self.log_variance, active)
        return ObjectiveValue(value, weights=0.5 * precision)

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = 0.5 exp(-s_k), dF/ds_k = 0.5 - 0.5 exp(-s_k) l_k."""
        precision, nothing = torch.exp(-self.log_variance), zero(losses.dtype, losses.device)
        scaled, weights = precision * losses, 0.5 * precision
        value = 0.5 * masked_sum(scaled + self.log_variance, active)
        coefficients, slopes = torch.where(active, weights, nothing), torch.where(active, 0.5 - 0.5 * scaled, nothing)
        return Derivatives(ObjectiveValue(value, weights=weights), coefficients, (slopes,))

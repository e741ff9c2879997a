"""IMTL-L, the loss balance of impartial multi-task learning. Liu et al., ICLR 2021 (openreview IMPnRXEWpvr).

    F = sum_k (exp(s_k) l_k - s_k),   s_k trainable

    s_k -> log_scale, l_k -> losses (after `normalization`), exp(s_k) -> weights

Scaled losses exp(s_k) l_k are drawn to 1: at the optimum s_k = -log l_k, where IMTL-L is SI. It is twice UW with s
negated. torchjd (`IMTLL`) is the same; LibMTL's `IMTL` is IMTL-L followed by IMTL-G, a balancer of gradients. The paper
starts at s = 0; the rate 0.025 is that of the reference trajectories.
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
class ImtlLOptions(BalancerOptions):
    """Options of `imtl_l`.

    Attributes:
        initial_log_scale: s at the start, a number or one per task.
    """

    learning_rate: LearningRate = 0.025
    initial_log_scale: float | list[float] = 0.0


@register_balancer("imtl_l", options=ImtlLOptions, paper="Liu et al., ICLR 2021 (openreview IMPnRXEWpvr), IMTL-L")
class ImtlL(Objective):
    """IMTL-L. State: `log_scale [K]`, trainable. Cost: one forward and one backward of the model."""

    def __init__(self, num_tasks: int, options: ImtlLOptions) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(initial_values(options.initial_log_scale, num_tasks, "initial_log_scale"))

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the `active` tasks; an absent task's log scale gets no gradient."""
        scale = torch.exp(self.log_scale)
        return ObjectiveValue(masked_sum(scale * losses - self.log_scale, active), weights=scale)

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = exp(s_k), dF/ds_k = exp(s_k) l_k - 1."""
        scale, nothing = torch.exp(self.log_scale), zero(losses.dtype, losses.device)
        scaled = scale * losses
        value = masked_sum(scaled - self.log_scale, active)
        coefficients, slopes = torch.where(active, scale, nothing), torch.where(active, scaled - 1, nothing)
        return Derivatives(ObjectiveValue(value, weights=scale), coefficients, (slopes,))

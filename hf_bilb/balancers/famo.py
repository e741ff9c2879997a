"""FAMO, fast adaptive multitask optimization. Liu, Feng, Stone, Liu, NeurIPS 2023 (arXiv 2306.03792), Algorithm 1.

    F = (1 / c) sum_k z_k log D_k,   D_k = l_k - b_k + 1e-8,   z = softmax(xi),   c = stopgrad(sum_k z_k / D_k)

and after the model's step, which has brought D to D',

    xi <- Adam(xi, J^T (log D - log D') + gamma xi),   J = dz / dxi

so that tasks whose loss fell less, relatively, get more weight. xi -> logits, z -> weights, b -> min_losses, gamma ->
weight_decay (L2 inside Adam, not decoupled). The coefficients (z_k / D_k) / c add up to 1.

D' is the loss of the same batch after the step, which costs one more forward pass (the paper's algorithm; its trainers
run it in training mode, so that dropout is drawn again and BatchNorm sees the batch twice: what `reevaluate` runs is
the caller's business), or that of the next update's batch, which costs nothing and is noisy (the paper's remark; the
official toy example, whose first comparison comes before z is used for the next step, as here).

Official code: gamma 1e-3 (NYUv2, QM9, CelebA), 1e-2 (Cityscapes), 0 (toy); learning rate 0.025 of xi throughout. It
trains without clipping there (its clipping comes before the backward pass). Absent tasks take no part in the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.balancers.router import initial_values
from hf_bilb.config.options import bounded
from hf_bilb.engine.constants import one
from hf_bilb.engine.objective import Derivatives, ObjectiveValue, ProgressObjective, StepProgress
from hf_bilb.engine.options import BalancerOptions, LearningRate, masked_softmax
from hf_bilb.errors import OptionError

EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class FamoOptions(BalancerOptions):
    """Options of `famo`.

    Attributes:
        weight_decay: gamma, an L2 penalty on the logits, which draws the weights back to equal ones.
        min_losses: b, below every loss, a number or one per task; only where the losses are not normalised.
        reevaluate: from which batch the progress is taken. `same_batch` needs `balancer.step(reevaluate=...)` and
            costs a forward pass; `next_batch` compares with the losses of the next update, for nothing.
    """

    learning_rate: LearningRate = 0.025
    weight_decay: float = bounded(1e-3, at_least=0)
    min_losses: float | list[float] = 0.0
    reevaluate: Literal["same_batch", "next_batch"] = "same_batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive_normalization("famo")
        bounds = self.min_losses if isinstance(self.min_losses, list) else [self.min_losses]
        if self.normalization != "none" and any(bounds):
            raise OptionError(
                f"min_losses: {self.min_losses} is not valid with normalization: {self.normalization!r}, which changes "
                "what the losses are measured in; expected 0"
            )


@register_balancer(
    "famo",
    options=FamoOptions,
    paper="Liu et al., NeurIPS 2023 (arXiv 2306.03792), Algorithm 1",
    costs=(Cost(2, 1, when="reevaluate: same_batch"), Cost(1, 1, when="reevaluate: next_batch")),
)
class Famo(ProgressObjective):
    """FAMO. State: `logits [K]`, trainable, zero at the start; with `next_batch` the last update's losses.

    Cost: one forward and one backward of the model, and with `same_batch` one more forward.
    """

    takes_logarithm = True
    min_losses: Tensor

    def __init__(self, num_tasks: int, options: FamoOptions) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("min_losses", initial_values(options.min_losses, num_tasks, "min_losses"))
        self.weight_decay = options.weight_decay
        self.reevaluate = options.reevaluate

    @property
    def lower_bounds(self) -> Tensor:
        """`min_losses [K]`."""
        return self.min_losses

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the `active` tasks; no gradient reaches the logits."""
        distances = self._distances(losses, active)
        weights, scale = (constant.detach() for constant in self._constants(distances, active))
        return ObjectiveValue((weights * distances.log()).sum() / scale, weights=weights)

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = z_k / D_k / c."""
        distances = self._distances(losses, active)
        weights, scale = self._constants(distances, active)
        value = (weights * distances.log()).sum() / scale
        coefficients = scale.reciprocal() * weights / distances
        return Derivatives(ObjectiveValue(value, weights=weights), coefficients, (torch.zeros_like(self.logits),))

    def _constants(self, distances: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """z, which is zero where not active, and c."""
        weights = self._weights(active)
        scale = (weights / distances).sum()
        # Without any task the sum is zero.
        return weights, torch.where(scale > 0, scale, one(scale.dtype, scale.device))

    def progress(self, step: StepProgress) -> Tensor:
        """P = sum_k z_k stopgrad(log D_k - log D'_k), whose gradient is J^T (log D - log D')."""
        return (self._weights(step.compared) * self._fallen(step)).sum()

    def progress_in_closed_form(self, step: StepProgress) -> tuple[Tensor, ...]:
        """J^T (log D - log D')."""
        fallen = self._fallen(step)
        with torch.enable_grad():
            weights = self._weights(step.compared)
        return torch.autograd.grad(weights, [self.logits], fallen)

    @torch.no_grad()
    def _fallen(self, step: StepProgress) -> Tensor:
        there = step.compared
        return self._distances(step.before, there).log() - self._distances(step.after, there).log()

    def _weights(self, active: Tensor) -> Tensor:
        """z `[K]`, the softmax over the active tasks, zero elsewhere."""
        return masked_softmax(self.logits, active)

    def _distances(self, losses: Tensor, active: Tensor) -> Tensor:
        """D `[K]`; the logarithm of a placeholder must stay finite, or its zero gradient becomes NaN."""
        return torch.where(active, losses - self.min_losses + EPSILON, one(losses.dtype, losses.device))

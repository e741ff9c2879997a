"""MGDA, the multiple gradient descent algorithm. Desideri 2012; Sener and Koltun, NeurIPS 2018 (arXiv 1810.04650).

    a = argmin |sum_k a_k h_k|^2   over a >= 0 with sum 1,   h_k = g_k / s_k
    w = K a                        (`apply_to: raw`),   or   K a_k / s_k   (`apply_to: normalized`)

    a, w -> the weights, s_k -> the `normalize` option: 1, |g_k|, l_k or l_k |g_k|

No task's loss grows along the negative of the result, to first order, and it is zero where the point is Pareto
stationary. So one task whose gradient is zero takes all the weight.

Official code multiplies the weights by K and applies those of the normalised gradients to the raw ones, which need not
lower every loss; LibMTL applies them to the normalised ones, with sum 1. Both search: the official search compares two
tasks at a time and clamps its step to [0.001, 0.999], so that a task that the optimum leaves out keeps a little weight,
and has no bound on its steps; its modes `norm` and `loss+` do not run on a current PyTorch. Ours is the exact optimum.
Where several weights are optimal (equal gradients) it is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import Array, array, normalised, simplex_minimum
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod


@dataclass(frozen=True, kw_only=True)
class MgdaOptions(GradientOptions):
    """Options of `mgda`.

    Attributes:
        normalize: what a gradient is divided by before the search: `none`, its norm (`l2`), its `loss`, or both
            (`loss+`).
        apply_to: whether the weights go to the `raw` gradients (official code) or to the `normalized` ones (LibMTL).
    """

    normalize: Literal["none", "l2", "loss", "loss+"] = "none"
    apply_to: Literal["raw", "normalized"] = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize in ("loss", "loss+"):
            self.require_positive_normalization("mgda", f"with normalize: {self.normalize!r} divides by the losses")


@register_balancer(
    "mgda",
    options=MgdaOptions,
    paper="Sener and Koltun, NeurIPS 2018 (arXiv 1810.04650)",
    costs=(Cost(1, "K", memory="K d"),),
)
class Mgda(GramianMethod):
    """MGDA. No state. The weights add up to the number of tasks in the step."""

    def __init__(self, num_tasks: int, options: MgdaOptions) -> None:
        super().__init__()
        self._by_norm = options.normalize in ("l2", "loss+")
        self._by_loss = options.normalize in ("loss", "loss+")
        self._apply_to = options.apply_to
        self.divides_by_losses = self._by_loss

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """w `[A]`."""
        scaled, scale = normalised(array(gramian))
        if scale == 0:
            return torch.ones_like(losses)
        if not (self._by_norm or self._by_loss):
            return torch.from_numpy(simplex_minimum(scaled) * len(scaled))
        divisors = self._divisors(scaled, array(losses))
        # Divisors have any size: what the solver sees is of size 1 again.
        point = simplex_minimum(normalised(scaled / (divisors[:, None] * divisors))[0])
        if self._apply_to == "normalized":
            # The norms are those of the given gradients, not of the scaled ones.
            point = point / (divisors * scale**0.5 if self._by_norm else divisors)
        return torch.from_numpy(point * len(point))

    def _divisors(self, gramian: Array, losses: Array) -> Array:
        divisors = losses if self._by_loss else np.ones_like(losses)
        if self._by_norm:
            norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
            divisors = divisors * np.where(norms > 0, norms, 1.0)
        return divisors

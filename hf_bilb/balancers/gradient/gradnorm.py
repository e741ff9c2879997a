"""GradNorm, gradient normalization. Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018 (arXiv 1711.02257), Algorithm 1.

    the shared parameters descend sum_k w_k g_k, and w descends sum_k |w_k n_k - T_k|
    n_k = |g_k|,   T_k = r_k^alpha mean_j w_j n_j,   r_k = (l_k / l0_k) / mean_j (l_j / l0_j)

so that a task whose loss has fallen less than the others' gets a larger gradient; T is a constant to the gradient.
n -> from the Gramian, l0 -> initial_losses, the first loss of each task that the method sees.

LibMTL (`parametrization: softmax`) has w = K softmax(s), s trainable from 1, and so do we; its l0 are the means of the
first epoch, during which w is left at 1. The paper (`direct`) trains w itself and scales it to sum K after each step;
no w falls below 1e-3 here, where the paper's may turn negative. The paper takes the gradients of the last shared layer
only (`shared_parameters`), LibMTL those of all shared parameters. Absent tasks take no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod
from hf_bilb.engine.objective import HistoryObjective

_LEAST = 1e-3


@dataclass(frozen=True, kw_only=True)
class GradNormOptions(GradientOptions):
    """Options of `gradnorm`.

    Attributes:
        alpha: how strongly tasks that have fallen behind are pulled.
        parametrization: what is trained: `softmax`, K softmax(s), or `direct`, the weights themselves.
    """

    alpha: float = bounded(1.5, at_least=0)
    parametrization: Literal["softmax", "direct"] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive_normalization("gradnorm", "divides by the first losses")


@register_balancer(
    "gradnorm",
    options=GradNormOptions,
    paper="Chen et al., ICML 2018 (arXiv 1711.02257), Algorithm 1",
    costs=(Cost(1, "K", memory="K d"),),
)
class GradNorm(GramianMethod, HistoryObjective):
    """GradNorm. State: `scores [K]`, trainable, s or w, 1 at the start; `initial_losses [K]` and which are `seen`."""

    divides_by_losses = True
    initial_losses: Tensor
    seen: Tensor

    def __init__(self, num_tasks: int, options: GradNormOptions) -> None:
        super().__init__()
        self._alpha = options.alpha
        self._direct = options.parametrization == "direct"
        self.scores = nn.Parameter(torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("initial_losses", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_tasks, dtype=torch.bool))

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """w `[A]`; with `softmax` their sum is A."""
        if self.training:
            where = tasks.to(self.seen.device)
            first = torch.where(self.seen[where], self.initial_losses[where], losses.to(self.initial_losses))
            self.initial_losses.index_copy_(0, where, first)
            self.seen.index_fill_(0, where, True)
        return self._weights(gramian, tasks)

    def parameter_loss(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """sum_k |w_k n_k - T_k|."""
        seen, initial = self.seen[tasks.to(self.seen.device)].cpu(), self.initial_losses.to(gramian)[tasks]
        ratio = losses / torch.where(seen, initial, losses)
        norms = gramian.diagonal().clamp_min(0).sqrt()
        scaled = self._weights(gramian, tasks) * norms
        target = scaled.detach().mean() * (ratio / ratio.mean()).clamp_min(0) ** self._alpha
        return (scaled - target).abs().sum()

    @torch.no_grad()
    def end_step(self) -> None:
        """Scale the weights themselves to sum K."""
        if self._direct and self.training:
            positive = self.scores.clamp_min(_LEAST)
            self.scores.copy_(positive * (len(positive) / positive.sum()))

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        scores = self.scores.to(gramian)[tasks]
        return scores if self._direct else torch.softmax(scores, dim=0) * len(scores)

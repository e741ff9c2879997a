"""Nash-MTL, multi-task learning as a bargaining game. Navon et al., ICML 2022 (arXiv 2202.01017), Claim 3.1.

    G a = 1 / a,   a > 0        the shared parameters descend J^T a, whose norm is sqrt(K)

    a -> the weights, G -> the Gramian as it is

It is the minimum of 1/2 a^T G a - sum_k log a_k, which is convex: Newton's method finds it to rounding error. Official
code solves a sequence of convex programs (20 rounds, cvxpy and ECOS), each from the last step's weights, and comes
within about 1e-6; we need neither the rounds nor the last weights. Its `update_weights_every` is `every_n_steps` here.
The original code clips the shared gradient to norm 1 after the backward pass (`max_norm: 1` here; the default is
null); FAMO's and LDC-MTL's copies clip before it, which does nothing.

There is no solution where a task's gradient is zero, or where weights >= 0 make the gradients cancel (opposite ones). A
task with a zero gradient takes no part and gets the mean of the others' weights, for its head. Where gradients cancel
the weights are bounded (`solvers.fair_weights`): |a_k g_k| stays about below 1e4, the norm of J^T a below sqrt(K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import array, fair_weights
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod


@dataclass(frozen=True, kw_only=True)
class NashOptions(GradientOptions):
    """Options of `nash_mtl`: those of every gradient method. The original code has `max_norm` 1."""


@register_balancer(
    "nash_mtl",
    options=NashOptions,
    paper="Navon et al., ICML 2022 (arXiv 2202.01017)",
    costs=(Cost(1, "K", memory="K d"),),
)
class NashMtl(GramianMethod):
    """Nash-MTL. No state: the exact solution does not depend on where the search begins."""

    def __init__(self, num_tasks: int, options: NashOptions) -> None:
        super().__init__()

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """a `[A]`, all > 0."""
        return torch.from_numpy(fair_weights(array(gramian), 1.0))

"""GradDrop, gradient sign dropout. Chen et al., NeurIPS 2020 (arXiv 2010.06808), on the gradients of the parameters.

    P = (1 + sum_k g_k / sum_k |g_k|) / 2      for each parameter,   U uniform in (0, 1)
    kept: where P > U the gradients > 0, where P < U those < 0
    the shared parameters descend sum_k (leak + (1 - leak) kept_k) g_k

So each parameter follows the tasks of one sign, drawn with that sign's share. Official code works so, too, with 1e-8
below the fraction (here a parameter without gradients descends nothing); the paper and LibMTL look at the gradients of
the last shared output, with its sign (`gradients: features` has them, without the sign), and torchjd has one leak for
each task. With a leak of 1 it is the plain sum.

The draws are a function of (seed, number of the update): no other random number changes them, and a dropped update
repeats its own. They are drawn where the gradients are: a GPU's differ from the CPU's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_bilb.balancers.random_numbers import NormalDraws
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.gradient_method import Direction, GradientOptions, HeadWeights, JacobianMethod
from hf_bilb.engine.objective import HistoryObjective
from hf_bilb.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class VectorOptions(GradientOptions):
    """Options of a method that has a direction without weights of the tasks."""

    heads: HeadWeights = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != "sum":
            raise OptionError(f"heads: {self.heads!r} is not valid, expected 'sum': this method has no weights")
        if self.gradients != "parameters":
            raise OptionError(f"gradients: {self.gradients!r} is not valid, expected 'parameters': it has no weights")
        if self.every_n_steps != 1:
            raise OptionError(f"every_n_steps: {self.every_n_steps} is not valid, expected 1: there are no weights")


@dataclass(frozen=True, kw_only=True)
class GradDropOptions(VectorOptions):
    """Options of `graddrop`.

    Attributes:
        leak: the share of a gradient that is kept in any case.
        seed: of the draws, which depend on nothing else but the number of the update.
    """

    leak: float = bounded(0.0, at_least=0, at_most=1)
    seed: int = 0


@register_balancer(
    "graddrop",
    options=GradDropOptions,
    paper="Chen et al., NeurIPS 2020 (arXiv 2010.06808)",
    costs=(Cost(1, "K", memory="K d"),),
)
class GradDrop(JacobianMethod, HistoryObjective):
    """GradDrop. State: the number of updates, on the host."""

    def __init__(self, num_tasks: int, options: GradDropOptions) -> None:
        super().__init__()
        self._leak = options.leak
        self.draws = NormalDraws(1, options.seed)

    @torch.no_grad()
    def direction(self, jacobian: Tensor, losses: Tensor, tasks: Tensor) -> Direction:
        """What is kept of the gradients, summed."""
        # By sums: the positive and the negative ones by themselves would be two more copies of K x d numbers.
        size = jacobian.abs().sum(dim=0)
        total = jacobian.sum(dim=0)
        positive = (1 + total / torch.where(size > 0, size, 1.0)) / 2
        uniform = self.uniform(jacobian)
        kept = torch.where(positive > uniform, (total + size) / 2, 0.0)
        kept = torch.where(positive < uniform, (total - size) / 2, kept)
        return Direction(self._leak * total + (1 - self._leak) * kept)

    def uniform(self, jacobian: Tensor) -> Tensor:
        """U `[d]` of this update, where and in which precision `jacobian [A, d]` is."""
        # The update's own number, of which all bits are looked at, seeds a generator on the device.
        number = self.draws(torch.zeros((), dtype=torch.float64))
        generator = torch.Generator(jacobian.device).manual_seed(int(number.view(torch.int64)))
        return torch.rand(jacobian.shape[1], generator=generator, dtype=jacobian.dtype, device=jacobian.device)

    def end_step(self) -> None:
        """The next update draws again, balancing or frozen: nothing is learned that could stay."""
        self.draws.end_step()

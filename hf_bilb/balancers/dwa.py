"""DWA, dynamic weight average. Liu, Johns, Davison, CVPR 2019 (MTAN, arXiv 1803.10704), eq. 7.

    w_k = K softmax_k(r_k / T),   r_k = Lbar_k(t - 1) / Lbar_k(t - 2)

    T -> temperature, r_k -> ratios, l_k -> losses (after `normalization`), K -> the number of active tasks

so that tasks whose loss falls more slowly get more weight. Lbar is, with `window: epoch` (the paper; MTAN, LibMTL,
torchjd), the mean loss of the last epoch and of the one before it, and

    F = sum_k w_k l_k;

with `window: n` (NASH, FAMO and LDC-MTL with n = 25, behind the published tables), the mean of the last n losses and of
the n before them, this batch's among them, and

    F = mean_k(w_k l_k).

Weights are 1 until two epochs have passed, or n + 2 losses have been seen. As in the official code the window begins
filled with ones, so that the older mean is of ones in part until 2 n losses have been seen. Official code keeps it in
float32, averages batches where we average items (the same where all batches have the same size), and knows no absent
tasks: here a window holds a task's own losses, a task without a full record has r_k = 1, and so has one whose mean loss
was not positive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_bilb.balancers.registry import register_balancer
from hf_bilb.config.options import bounded
from hf_bilb.engine.constants import one
from hf_bilb.engine.objective import Derivatives, HistoryObjective, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, masked_softmax, masked_sum
from hf_bilb.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class DwaOptions(BalancerOptions):
    """Options of `dwa`.

    Attributes:
        temperature: T; the higher, the more alike the weights.
        window: `epoch`, which needs `balancer.on_epoch_begin(epoch)`, or the number n of losses in each mean.
    """

    temperature: float = bounded(2.0, above=0)
    window: Literal["epoch"] | int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window != "epoch" and self.window < 1:
            raise OptionError(f'window: {self.window} is not valid, expected "epoch" or an integer >= 1')
        if self.normalization == "log":
            raise OptionError("normalization: 'log' is not valid, expected another one: dwa takes ratios of the losses")


class LossRecord(nn.Module, ABC):
    """What the ratios are taken from."""

    #: Whether F is the mean over the tasks rather than the sum.
    averages_tasks: bool

    @abstractmethod
    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """As `HistoryObjective.observe`."""

    @abstractmethod
    def ratios(self) -> Tensor:
        """r `[K]`, one where the record is too short."""


class EpochRecord(LossRecord):
    """State: `totals [K]` and `items [K]` of the epoch at work, `means [2, K]` of the last two, `epochs [K]` passed."""

    averages_tasks = False
    totals: Tensor
    items: Tensor
    means: Tensor
    epochs: Tensor
    epoch: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("totals", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("items", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("means", torch.ones(2, num_tasks, dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("epoch", torch.tensor(-1))

    @torch.no_grad()
    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """Add up an epoch; its mean is taken when the first loss of another one comes."""
        if epoch < 0:
            raise OptionError("window: 'epoch' needs balancer.on_epoch_begin(epoch) at the start of every epoch")
        begins = (self.epoch != epoch) & active.any()
        passed = begins & (self.items > 0)
        latest = torch.stack([self.means[1], self.totals / self.items.clamp(min=1)])
        self.means.copy_(torch.where(passed, latest, self.means))
        self.epochs.add_(passed)
        # A held task has no items: its loss is in the epoch already.
        items = torch.where(active, num_items, 0.0)
        self.totals.copy_(torch.where(begins, 0.0, self.totals) + items * losses)
        self.items.copy_(torch.where(begins, 0.0, self.items) + items)
        self.epoch.copy_(torch.where(begins, epoch, self.epoch))

    def ratios(self) -> Tensor:
        """The last epoch's mean over that of the one before it."""
        before, last = self.means
        return _ratios(last, before, self.epochs >= 2)


class WindowRecord(LossRecord):
    """State: `losses [2n, K]`, the newest last, and `observations [K]`, how many of them were seen, ever."""

    averages_tasks = True
    losses: Tensor
    observations: Tensor

    def __init__(self, num_tasks: int, window: int) -> None:
        super().__init__()
        self._window = window
        self.register_buffer("losses", torch.ones(2 * window, num_tasks, dtype=torch.float64))
        self.register_buffer("observations", torch.zeros(num_tasks, dtype=torch.int64))

    @torch.no_grad()
    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """Push the losses of the active tasks."""
        # Moved up, not written at a position of each task's own: the same cost, and simpler.
        pushed = torch.cat([self.losses[1:], losses[None]])
        self.losses.copy_(torch.where(active, pushed, self.losses))
        self.observations.add_(active)

    def ratios(self) -> Tensor:
        """The mean of the last n losses over that of the n before them."""
        before, last = self.losses.unflatten(0, (2, self._window)).mean(dim=1)
        return _ratios(last, before, self.observations > self._window + 1)


def _ratios(last: Tensor, before: Tensor, known: Tensor) -> Tensor:
    usable = known & (torch.minimum(last, before) > 0)
    return torch.where(usable, last / before, one(last.dtype, last.device))


@register_balancer("dwa", options=DwaOptions, paper="Liu, Johns, Davison, CVPR 2019 (arXiv 1803.10704), eq. 7")
class DynamicWeightAverage(HistoryObjective):
    """DWA. State: 2 n K losses, or four numbers per task with `window: epoch` and the epoch's number. Cost: one forward
    and one backward of the model; the window is copied in every update.

    Raises:
        OptionError: in the first update, for `window: epoch` where nobody has told the epoch.
    """

    def __init__(self, num_tasks: int, options: DwaOptions) -> None:
        super().__init__()
        self._temperature = options.temperature
        self.record: LossRecord = (
            EpochRecord(num_tasks) if options.window == "epoch" else WindowRecord(num_tasks, options.window)
        )

    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """Enter the losses into the record."""
        self.record.observe(losses, num_items, active, epoch)

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the `active` tasks."""
        number = active.sum()
        weights = self._weights(active, number)
        total = masked_sum(weights * losses, active)
        return ObjectiveValue(total / number.clamp(min=1) if self.record.averages_tasks else total, weights)

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = w_k, or w_k / K."""
        number = active.sum()
        weights = self._weights(active, number)
        total = masked_sum(weights * losses, active)
        if not self.record.averages_tasks:
            return Derivatives(ObjectiveValue(total, weights), weights, ())
        number = number.clamp(min=1)
        share = one(weights.dtype, weights.device) / number
        return Derivatives(ObjectiveValue(total / number, weights), weights * share, ())

    def _weights(self, active: Tensor, number: Tensor) -> Tensor:
        return number * masked_softmax(self.record.ratios() / self._temperature, active)

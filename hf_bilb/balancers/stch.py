"""STCH, smooth Tchebycheff scalarization. Lin, Zhang, Yang, Liu, Wang, Zhang, ICML 2024 (arXiv 2402.19078).

The paper's form (`warmup_epochs: null`), a smooth weighted maximum that tends to max_k lambda_k (l_k - z_k) as mu -> 0:

    F = mu log sum_k exp(lambda_k (l_k - z_k) / mu)

    mu -> mu, lambda -> preference (brought to sum 1 over the active tasks), z -> ideal_point,
    l_k -> losses (after `normalization`); the coefficients are lambda_k softmax_k(lambda (l - z) / mu)

The schedule of the official deep learning code (`warmup_epochs: E`; there E = 4, mu = 1), by epoch e:

    e <= E   F = sum_k log(l_k + 1e-20);   n_k = the mean loss of epoch E ("nadir")
    e > E    F = K mu log sum_k exp(q_k / mu),   q_k = log(l_k / n_k + 1e-20)

with neither lambda nor z. For mu = 1 that is K log sum_k l_k / n_k: the plain sum of losses divided by n_k, up to a
factor; only mu < 1 stresses the worst task. There F lacks K max_k q_k, a constant to its gradient. We count epochs from
the first one that is balanced, average items where the official code averages batches, and give a task that is first
seen after epoch E its first loss as n_k. K is the number of active tasks; absent ones take no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_bilb.balancers.registry import register_balancer
from hf_bilb.balancers.router import initial_values
from hf_bilb.config.options import bounded
from hf_bilb.engine.constants import lowest, one, zero
from hf_bilb.engine.objective import Derivatives, HistoryObjective, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, masked_sum
from hf_bilb.errors import OptionError

EPSILON = 1e-20


@dataclass(frozen=True, kw_only=True)
class StchOptions(BalancerOptions):
    """Options of `stch`.

    Attributes:
        mu: the smaller, the more the worst task alone counts.
        warmup_epochs: E of the official schedule, which needs `balancer.on_epoch_begin(epoch)`; null: the paper's form.
        preference: lambda, one number > 0 per task; null: equal ones. Only of the paper's form.
        ideal_point: z, a number or one per task, below the losses after normalization. Only of the paper's form.
    """

    mu: float = bounded(1.0, above=0)
    warmup_epochs: int | None = bounded(None, at_least=0, expected="an integer >= 0 or null")
    preference: list[float] | None = None
    ideal_point: float | list[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preference is not None and not all(value > 0 for value in self.preference):
            raise OptionError(f"preference: {self.preference} is not valid, expected numbers > 0")
        if self.warmup_epochs is None:
            return
        self.require_positive_normalization("stch with warmup_epochs")
        bounds = self.ideal_point if isinstance(self.ideal_point, list) else [self.ideal_point]
        for name, given in (("preference", self.preference is not None), ("ideal_point", any(bounds))):
            if given:
                raise OptionError(
                    f"{name}: {getattr(self, name)} is not valid with warmup_epochs, whose schedule has none; expected "
                    "warmup_epochs: null"
                )


def _log_sum_exp(exponents: Tensor, active: Tensor) -> Tensor:
    """log sum exp of `exponents [K]` over the `active` tasks; 0 where there is none."""
    # Finite, so that no NaN arises where no task is active.
    given = torch.where(active, exponents, lowest(exponents.dtype, exponents.device))
    return torch.where(active.any(), torch.logsumexp(given, dim=0), zero(given.dtype, given.device))


class PaperForm(nn.Module):
    """F of the paper. State: `preference [K]`, `ideal_point [K]`, fixed."""

    preference: Tensor
    ideal_point: Tensor

    def __init__(self, num_tasks: int, options: StchOptions) -> None:
        super().__init__()
        self._mu = options.mu
        preference = 1.0 if options.preference is None else options.preference
        self.register_buffer("preference", initial_values(preference, num_tasks, "preference"))
        self.register_buffer("ideal_point", initial_values(options.ideal_point, num_tasks, "ideal_point"))

    def forward(self, losses: Tensor, active: Tensor) -> Tensor:
        """F over the `active` tasks."""
        return self._mu * _log_sum_exp(self._exponents(losses, active)[0], active)

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = lambda_k softmax_k(lambda (l - z) / mu)."""
        exponents, preference = self._exponents(losses, active)
        total = _log_sum_exp(exponents, active)
        # As autograd has it, to the last bit.
        slopes = self._mu * torch.exp(exponents - total) / self._mu * preference
        slopes = torch.where(active, slopes, zero(slopes.dtype, slopes.device))
        return Derivatives(ObjectiveValue(self._mu * total), slopes, ())

    def _exponents(self, losses: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """lambda (l - z) / mu, and lambda, which adds up to 1 over the `active` tasks."""
        total = masked_sum(self.preference, active)
        preference = self.preference / torch.where(total > 0, total, one(total.dtype, total.device))
        return preference * (losses - self.ideal_point) / self._mu, preference


class NadirSchedule(nn.Module):
    """F of the official schedule.

    State: `totals [K]` and `items [K]`, whose ratio is n_k; `epoch`, the number of the one at work; `passed`, how many
    have ended.
    """

    totals: Tensor
    items: Tensor
    epoch: Tensor
    passed: Tensor

    def __init__(self, num_tasks: int, mu: float, warmup_epochs: int) -> None:
        super().__init__()
        self._mu = mu
        self._warmup_epochs = warmup_epochs
        self.register_buffer("totals", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("items", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("epoch", torch.tensor(-1))
        self.register_buffer("passed", torch.tensor(0))

    @torch.no_grad()
    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """Count epochs; in epoch E, or when a task comes later for the first time, take its losses into n_k."""
        if epoch < 0:
            raise OptionError("warmup_epochs: needs balancer.on_epoch_begin(epoch) at the start of every epoch")
        begins = (self.epoch != epoch) & active.any()
        self.passed.add_(begins & (self.epoch >= 0))
        self.epoch.copy_(torch.where(begins, epoch, self.epoch))
        late = (self.passed > self._warmup_epochs) & (self.items == 0)
        # A held task has no items; first compared after epoch E it needs a nadir all the same.
        items = torch.where(late, num_items.clamp(min=1), num_items)
        items = torch.where(active & (late | (self.passed == self._warmup_epochs)), items, 0.0)
        self.totals.add_(items * losses)
        self.items.add_(items)

    def forward(self, losses: Tensor, active: Tensor) -> Tensor:
        """F over the `active` tasks."""
        # The logarithm of a placeholder must stay finite, or its zero gradient becomes NaN.
        losses = torch.where(active, losses, 1.0)
        known = self.items > 0
        nadir = torch.where(known, self.totals, 1.0) / torch.where(known, self.items, 1.0)
        exponents = torch.log(losses / nadir + EPSILON) / self._mu
        smooth = active.sum() * self._mu * _log_sum_exp(exponents, active)
        warm_up = masked_sum(torch.log(losses + EPSILON), active)
        return torch.where(self.passed > self._warmup_epochs, smooth, warm_up)


@register_balancer("stch", options=StchOptions, paper="Lin et al., ICML 2024 (arXiv 2402.19078)")
class Stch(HistoryObjective):
    """STCH. State: `preference [K]` and `ideal_point [K]`; with `warmup_epochs` the nadir `[K]` and the epochs. Cost:
    one forward and one backward of the model.

    Raises:
        OptionError: in the first update, for `warmup_epochs` where nobody has told the epoch.
    """

    def __init__(self, num_tasks: int, options: StchOptions) -> None:
        super().__init__()
        self.form: PaperForm | NadirSchedule
        if options.warmup_epochs is None:
            self.form = PaperForm(num_tasks, options)
        else:
            self.form = NadirSchedule(num_tasks, options.mu, options.warmup_epochs)
            self.takes_logarithm = True

    @property
    def has_record(self) -> bool:
        """Whether there is a schedule."""
        return isinstance(self.form, NadirSchedule)

    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """Enter the losses into the schedule."""
        if isinstance(self.form, NadirSchedule):
            self.form.observe(losses, num_items, active, epoch)

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the `active` tasks."""
        return ObjectiveValue(self.form(losses, active))

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives | None:
        """Of the paper's form."""
        return self.form.closed_form(losses, active) if isinstance(self.form, PaperForm) else None

"""What is remembered of the losses, their references and their last values, and how they are normalised with it.

    none       l

    initial    l / l0                       (power with p = 1)
    rescaled   l * min_j l0_j / l0          BiLB4MTL (arXiv 2502.08585), "rescaled" normalization
    log        log(l / l0)                  BiLB4MTL, logarithmic normalization
    power      (l / l0)^p / p               ours; p = 1 is initial, p -> 0 tends to log up to a constant; goes on as its
                                            tangent below l = 1e-6 l0, so that a loss of 0 has a finite coefficient

l0 (`reference_losses`) are the losses of the first step, of the first step of every epoch, or the mean of the first n
steps. A task seen late gets its l0 when it is first seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_bilb.config.options import bounded, check_bounds
from hf_bilb.engine.reduction import GlobalBatch

#: Share of l0 below which a task counts as solved under `power`.
SOLVED = 1e-6

AbsentTasks = Literal["auto", "skip", "hold"]
Phase = Literal["warmup", "balancing", "frozen"]
NormalizationKind = Literal["none", "initial", "rescaled", "log", "power"]


@dataclass(frozen=True)
class MeanOf:
    """`reference: {mean_of: n}`: l0 is the mean of a task's first n observed losses (the running mean until then)."""

    mean_of: int = bounded(at_least=1)

    def __post_init__(self) -> None:
        check_bounds(self)


ReferenceKind = Literal["first_step", "every_epoch"]


class Normalization(nn.Module):
    """Normalises the vector of K losses and keeps their references.

    State: `reference_losses [K]` (1 until seen), `observations [K]` (how many losses stand behind each reference),
    `seen [K]`. Cost: a few operations on K numbers; none to observe once all references are known to be formed.
    """

    reference_losses: Tensor
    observations: Tensor
    seen: Tensor

    def __init__(
        self, num_tasks: int, kind: NormalizationKind, reference: ReferenceKind | MeanOf, power: float = 0.5
    ) -> None:
        super().__init__()
        self.kind = kind
        self.power = power
        self.every_epoch = reference == "every_epoch"
        self.window = reference.mean_of if isinstance(reference, MeanOf) else 1
        self.register_buffer("reference_losses", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("observations", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_tasks, dtype=torch.bool))
        # On the host: whether all are formed, and in how many calls that was asked for.
        self.settled, self._asked = False, 0

    def begin_epoch(self) -> None:
        """With `reference: every_epoch`, let the next loss of each task replace its reference."""
        if self.every_epoch:
            self.observations.zero_()
            self.settled, self._asked = False, 0

    @torch.no_grad()
    def observe(self, losses: Tensor, present: Tensor, forming: Tensor | None) -> None:
        """Take the losses `[K]` of the present tasks into their references where these are `forming`."""
        if forming is None:
            return
        forming = present & forming
        # A window of one takes the loss itself, to the last bit.
        mean = losses if self.window == 1 else self.reference_losses.lerp(losses, 1 / (self.observations + 1))
        # New tensors: whoever holds the old ones has what was known before.
        self.reference_losses = torch.where(forming, mean, self.reference_losses)
        self.observations = self.observations + forming
        self.seen = self.seen | present

    @torch.no_grad()
    def settle(self) -> None:
        """Look whether all references are formed. In calls 1, 2, 4, 8, ... a host read, until they are."""
        self._asked += 1
        if not self.settled and self._asked & (self._asked - 1) == 0:
            self.settled = bool((self.seen & (self.observations >= self.window)).all())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.settled, self._asked = False, 0

    def forming(self, frozen: bool = False) -> Tensor | None:
        """Bool `[K]`, whose references the next losses go into; `frozen`: only where there is none yet. None where all
        are known to be formed."""
        if self.settled:
            return None
        return ~self.seen if frozen else self.observations < self.window

    @property
    def needs_positive_losses(self) -> bool:
        """Whether some losses <= 0 are refused, see `outside_domain`."""
        return self.kind != "none"

    def outside_domain(self, losses: Tensor, present: Tensor, forming: Tensor | None) -> Tensor:
        """Bool `[K]`: present losses that this normalization cannot take: <= 0 under a logarithm, or into a reference
        that is `forming`, < 0 under a power."""
        if self.kind == "none":
            return torch.zeros_like(present)
        if self.kind == "log":
            return present & (losses <= 0)
        outside = torch.zeros_like(present) if forming is None else (losses <= 0) & forming
        return present & (outside | (losses < 0) if self.kind == "power" else outside)

    def forward(self, losses: Tensor) -> Tensor:
        """Normalised losses `[K]`; entries of tasks that were never seen are meaningless but finite for losses > 0."""
        if self.kind == "none":
            return losses
        ratio = losses / self._scale()
        if self.kind == "log":
            return torch.log(ratio)
        return self._power(ratio) if self.kind == "power" else ratio

    def with_slopes(self, losses: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """As `forward`; and the factor, None where there is none, and the divisors, in this order, that make dF/dl of
        dF/d(normalised), as autograd would."""
        if self.kind == "none":
            return losses, None, ()
        reference = self._scale()
        ratio = losses / reference
        if self.kind == "log":
            return ratio.log(), None, (ratio, reference)
        if self.kind != "power":
            return ratio, None, (reference,)
        # Above the bound the second term is 0, to the last bit; below it is the tangent's.
        above = ratio.clamp(min=SOLVED)
        steep = above.pow(self.power - 1)
        value = torch.addcmul(above.pow(self.power) / self.power, steep, ratio - above)
        return value, steep, (reference,)

    def _scale(self) -> Tensor:
        """What the losses are divided by, `[K]`."""
        reference = self.reference_losses
        if self.kind != "rescaled":
            return reference
        smallest = torch.where(self.seen, reference, torch.inf).min()
        return reference / torch.where(self.seen.any(), smallest, 1.0)

    def _power(self, ratio: Tensor) -> Tensor:
        # Below a millionth of l0 the tangent goes on: the slope stays finite when a task is solved and its loss is 0.
        # Two branches, not a correction added to one: its slope of 1000 would cancel at the cost of float32 digits.
        above = ratio.clamp(min=SOLVED).pow(self.power) / self.power
        below = SOLVED**self.power / self.power + SOLVED ** (self.power - 1) * (ratio - SOLVED)
        return torch.where(ratio > SOLVED, above, below)


class LossMemory(nn.Module):
    """The last known global loss of each task, for `absent_tasks: hold`. State: `last_losses [K]`, `seen [K]`."""

    last_losses: Tensor
    seen: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("last_losses", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_tasks, dtype=torch.bool))
        #: On the host: whether all tasks are known to have been seen.
        self.settled = False

    @torch.no_grad()
    def observe(self, losses: Tensor, present: Tensor) -> None:
        """Take in the losses `[K]` of the present tasks."""
        self.last_losses = torch.where(present, losses, self.last_losses)
        if not self.settled:
            self.seen = self.seen | present

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.settled = False


class Records:
    """Both records of a balancer, and the rule of `absent_tasks`, which rests on them; the state is theirs.

    Args:
        normalization: with the references. memory: the last known losses.
        absent_tasks: `skip`, `hold` or `auto`, see `build_balancer`.
    """

    def __init__(self, normalization: Normalization, memory: LossMemory, absent_tasks: AbsentTasks) -> None:
        self._normalization = normalization
        self._memory = memory
        self._absent_tasks = absent_tasks

    def observe(self, whole: GlobalBatch, phase: Phase, forming: Tensor | None) -> Tensor:
        """Take the losses in, into references that are `forming`, too; returns the tasks that F runs over, bool `[K]`.

        Losses that turn out to be none that the method can take are taken back by what `entries` was before.
        """
        self._memory.observe(whole.losses, whole.present)
        if phase == "warmup":
            return whole.present
        self._normalization.observe(whole.losses, whole.present, forming)
        return self.active(whole.present)

    def settle(self) -> None:
        """Look whether there is anything that a step has to look at, see `Normalization.settle`."""
        self._normalization.settle()
        self._memory.settled |= self._normalization.settled

    def entries(self) -> dict[str, Tensor]:
        """What `observe` puts new tensors in the place of, by the names of the state's entries; no copies."""
        normalization, memory = self._normalization, self._memory
        return {
            "memory.last_losses": memory.last_losses,
            "memory.seen": memory.seen,
            "normalization.reference_losses": normalization.reference_losses,
            "normalization.observations": normalization.observations,
            "normalization.seen": normalization.seen,
        }

    def active(self, present: Tensor) -> Tensor:
        """Bool `[K]`, the tasks that F runs over where those of `present` have a loss."""
        if self._absent_tasks == "skip":
            return present
        # A loss remembered from the warm-up has no reference yet: it cannot be compared.
        held = self._memory.seen if self._normalization.kind == "none" else self._normalization.seen
        if self._absent_tasks == "hold":
            return held
        # Over a single task f = 0 and sigma l / sigma = l say nothing. The rule knows the global batch alone, so that
        # its split into ranks and micro-batches cannot change what is decided.
        return torch.where(present.sum() == 1, held, present)

    def known(self, whole: GlobalBatch) -> Tensor:
        """The losses `[K]`, the last known ones for absent tasks."""
        return torch.where(whole.present, whole.losses.to(self._memory.last_losses.dtype), self._memory.last_losses)

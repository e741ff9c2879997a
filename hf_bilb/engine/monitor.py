"""The monitor: counters on the device that say, when somebody looks, that balancing has gone wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_bilb.engine.constants import zero

#: Share of the sum of |c| beyond which one task drowns the others, and the share of steps from which that is said.
DOMINATION, DOMINATED_STEPS = 0.9, 0.01
#: Before this many steps one dominated step is no 1 % of anything.
MIN_STEPS = 100
#: Norm beyond which losses, or gradients of a method's own parameters, teach it nothing, and its square. Adam squares
#: them, records add them up, and float32 ends at 3.4e38: one such loss, and a second moment is infinite for ever. In
#: float64 the limit is the same, where Adam would stand still for 100,000 steps.
TOO_LARGE = 1e19
TOO_LARGE_SQUARED = TOO_LARGE**2
#: So many steps, or lessons, are put together at a time: nothing is computed for each alone.
TOGETHER = 64


class Monitor(nn.Module):
    """Counts suspicious steps without reading the device; `due_messages` reads and words them, each kind once.

    Steps wait to be counted until there are 64 of them, or somebody asks for the counts.

    State: `counts [4]` (steps, steps with a negative coefficient, with lambda beyond its edge, with collapsed weights)
    and `dominated [K]` (steps in which task k had over 90 % of the sum of |coefficients|). No state, as it begins again
    with every look: `learned`, how many of the lessons since then were taken, and `refused [K]`, the largest losses of
    those that were not.
    """

    counts: Tensor
    dominated: Tensor
    learned: Tensor
    refused: Tensor

    def __init__(self, num_tasks: int, collapsed_below: float | None = None) -> None:
        super().__init__()
        self._collapsed_below = collapsed_below
        self.register_buffer("counts", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("dominated", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("learned", torch.zeros(()), persistent=False)
        self.register_buffer("refused", torch.zeros(num_tasks), persistent=False)
        self._counting = True
        self._lessons = 0
        self._steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._latest: list[tuple[Tensor, Tensor, Tensor]] = []
        self._said: set[str] = set()

    def observe(self, coefficients: Tensor, active: Tensor, weights: Tensor | None, edge_ratio: Tensor | None) -> None:
        """Count one step; arguments as in `Weighting` and `ObjectiveValue`. None may be written into afterwards."""
        ratio = zero(coefficients.dtype, coefficients.device) if edge_ratio is None else edge_ratio
        looked_at = coefficients if self._collapsed_below is None or weights is None else weights
        self._steps.append((coefficients, active, ratio, looked_at))
        if len(self._steps) == TOGETHER:
            self._count_steps()

    @torch.no_grad()
    def _count_steps(self) -> None:
        if not self._steps:
            return
        parts = zip(*self._steps, strict=True)
        coefficients, active, ratio, weights = map(torch.stack, parts)
        self._steps.clear()
        # The edge itself is a coefficient of zero: only beyond it, by more than rounding.
        flags = [torch.ones_like(ratio, dtype=torch.bool), (coefficients < 0).any(dim=1), ratio > 1 + 1e-6]
        if self._collapsed_below is not None:
            flags.append(weights.amax(dim=1) < self._collapsed_below)
        self.counts[: len(flags)] += torch.stack(flags).sum(dim=1)
        if len(self.dominated) > 1:
            magnitudes = coefficients.abs()
            dominated = magnitudes > DOMINATION * magnitudes.sum(dim=1, keepdim=True)
            counted = active.sum(dim=1) > 1
            self.dominated.add_((dominated & counted[:, None]).sum(dim=0))

    def _apply(self, *args: Any, **kwargs: Any) -> Monitor:
        self._count_steps()  # where they are, before all else moves
        self._put_together()
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._count_steps()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._steps.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def learn(self, taken: Tensor, losses: Tensor, before: Tensor | None = None) -> None:
        """Count a lesson, what the method's own step or its record was to learn from `losses [K]`, and whether it was
        `taken`, a bool scalar; `before`: what the losses were compared with. Cost: an eighth of an operation."""
        if not self._counting:
            return
        self._lessons += 1
        self._latest.append((taken, losses, losses if before is None else before))
        if len(self._latest) == TOGETHER:
            self._put_together()

    @contextmanager
    def lessons_not_counted(self) -> Iterator[None]:
        """Lessons inside leave no trace."""
        self._counting, before = False, self._counting
        try:
            yield
        finally:
            self._counting = before

    @torch.no_grad()
    def _put_together(self) -> None:
        if self._latest:
            parts = zip(*self._latest, strict=True)
            taken, losses, before = map(torch.stack, parts)
            losses = torch.maximum(losses.abs(), before.abs())
            # A loss that is not finite is reported, and its update dropped, elsewhere.
            taken = taken | ~losses.isfinite().all(dim=1)
            self.learned.add_(taken.sum())
            refused = torch.where(taken[:, None], 0.0, losses).amax(dim=0)
            self.refused.copy_(torch.maximum(self.refused, refused.to(self.refused.dtype)))
            self._latest.clear()

    def due_messages(self, task_names: Sequence[str]) -> list[str]:
        """Messages for what happened since the last call and has not been said yet. Cost: a read of 2K + 5 numbers."""
        self._count_steps()
        self._put_together()
        everything = torch.cat([self.counts, self.dominated, self.learned.reshape(1), self.refused])
        steps, negative, beyond_edge, collapsed, *rest = everything.tolist()
        dominated, learned, refused = rest[: len(task_names)], rest[len(task_names)], rest[len(task_names) + 1 :]
        messages = {}
        if learned < self._lessons:
            k = max(range(len(refused)), key=lambda k: refused[k])
            messages["refused"] = (
                f"task {task_names[k]!r} had a loss of size {refused[k]:.3g}: the balancer learned nothing in "
                f"{self._lessons - learned:.0f} of the last {self._lessons} steps, whose losses or gradients were "
                f"beyond {TOO_LARGE:g}"
            )
        self._lessons = 0
        self.learned.zero_()
        self.refused.zero_()
        if negative:
            messages["negative"] = (
                f"a coefficient was negative in {negative:.0f} of {steps:.0f} steps: gradient ascent on that task"
            )
        if beyond_edge:
            messages["edge"] = (
                f"discrepancy_weight was beyond its edge in {beyond_edge:.0f} of {steps:.0f} steps: a coefficient can "
                "turn negative; use discrepancy_weight: {edge_fraction: a} with a < 1"
            )
        if collapsed:
            messages["collapsed"] = (
                f"all weights were below 0.05 in {collapsed:.0f} of {steps:.0f} steps: the method is now nearly ls"
            )
        share, k = max((count, k) for k, count in enumerate(dominated))
        if steps >= MIN_STEPS and share > DOMINATED_STEPS * steps:
            messages["dominated"] = (
                f"task {task_names[k]!r} had over 90 % of the sum of |coefficients| in {share:.0f} of {steps:.0f} steps"
            )
        due = [text for kind, text in messages.items() if kind not in self._said]
        self._said.update(messages)
        return due

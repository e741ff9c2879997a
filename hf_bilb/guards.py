"""Guards: counters on the device that say, when somebody looks, that balancing has gone wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Share of the sum of |c| beyond which one task drowns the others, and the share of steps from which that is said.
DOMINATION, DOMINATED_STEPS = 0.9, 0.01
#: Before this many steps one dominated step is no 1 % of anything.
MIN_STEPS = 100


class Guards(nn.Module):
    """Counts suspicious steps without reading the device; `due_messages` reads and words them, each kind once.

    State: `counts [4]` (steps, steps with a negative coefficient, with lambda beyond its edge, with collapsed weights)
    and `dominated [K]` (steps in which task k had over 90 % of the sum of |coefficients|).
    """

    counts: Tensor
    dominated: Tensor
    _never: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("dominated", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("_never", torch.zeros((), dtype=torch.bool), persistent=False)
        self._said: set[str] = set()

    @torch.no_grad()
    def observe(
        self, coefficients: Tensor, present: Tensor, valid: Tensor, edge_ratio: Tensor | None, collapsed: Tensor | None
    ) -> None:
        """Count one step (nothing unless `valid`, a bool scalar); arguments as in `Decision` and `ObjectiveValue`."""
        negative = (coefficients < 0).any()
        # The edge itself is a coefficient of zero: only beyond it, by more than rounding.
        beyond = self._never if edge_ratio is None else edge_ratio > 1 + 1e-6
        flags = torch.stack([valid, negative, beyond, self._never if collapsed is None else collapsed])
        self.counts.add_(flags & valid)
        if len(self.dominated) > 1:
            magnitudes = coefficients.abs()
            self.dominated.add_((magnitudes > DOMINATION * magnitudes.sum()) & (present.sum() > 1) & valid)

    def due_messages(self, task_names: Sequence[str]) -> list[str]:
        """Messages for what happened since the last call and has not been said yet. Cost: one read of K + 4 numbers."""
        steps, negative, beyond_edge, collapsed, *dominated = torch.cat([self.counts, self.dominated]).tolist()
        messages = {}
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

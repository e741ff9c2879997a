"""What is logged about the tasks: sums on the device between two logging steps, one host read when they are due."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_bilb.engine.monitor import TOGETHER
from hf_bilb.storage.writing import write_text
from hf_bilb.trainer.step import Part

#: Above this many tasks the log holds a summary, and the full vectors go to a file.
MAX_TASKS_IN_LOG = 32
VECTORS_FILE = "task_vectors.jsonl"
_VECTORS = ("loss_sum", "items", "coefficient", "presence", "weight", "weighted")
_SCALARS = ("value", "loss_mean", "discrepancy", "auxiliary", "balanced", "fraction")
_LOSS_MEAN = _SCALARS.index("loss_mean") - len(_SCALARS)  # counted from the end


class RunningLog:
    """Means since the last log of: F, the K losses, weights and coefficients, the discrepancy; and of F over the run.

    Losses are means over items, weights and coefficients means over the steps in which the task was present. Updates
    that are dropped leave no trace but their count. Steps wait until there are 64 of them, or somebody asks for the
    sums: less than two operations for each. State (`state()`): JSON-able numbers, exact.
    """

    def __init__(self, task_names: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        self.task_names = list(task_names)
        self._size = len(_VECTORS) * len(self.task_names) + len(_SCALARS)
        self._sums = torch.zeros(self._size, device=device, dtype=dtype)
        # At hand for what a step has not.
        self._zero = torch.zeros((), device=device, dtype=dtype)
        self._nothing = torch.zeros(len(self.task_names), device=device, dtype=dtype)
        self._steps: list[Sequence[Part]] = []
        self._updates = 0
        self._has_weights = self._has_discrepancy = self._has_auxiliary = False
        self._run_value, self._run_updates = 0.0, 0
        self.dropped: dict[str, int] = {}

    def commit(self, parts: Sequence[Part]) -> None:
        """A step took place: its micro-batches count. None of their tensors may be written into afterwards."""
        if self._steps and (len(self._steps) == TOGETHER or _windows(parts) != _windows(self._steps[0])):
            self._add_up()
        self._steps.append(parts)
        self._updates += 1
        for weighting, _, _ in parts:
            self._has_weights |= weighting.weights is not None
            self._has_discrepancy |= weighting.discrepancy is not None
            self._has_auxiliary |= weighting.has_auxiliary

    @torch.no_grad()
    def _add_up(self) -> None:
        """Add the steps that wait to the sums, one after the other: so that it does not matter how many waited."""
        if not self._steps:
            return
        of_parts = self._of_parts([part for parts in self._steps for part in parts])
        of_steps = functools.reduce(torch.add, of_parts.unflatten(0, (len(self._steps), -1)).unbind(1))
        num_tasks = len(self.task_names)
        sums, items = of_steps[:, :num_tasks], of_steps[:, num_tasks : 2 * num_tasks]
        losses = sums / items.clamp(min=torch.finfo(items.dtype).tiny)
        of_steps[:, _LOSS_MEAN] = losses.sum(dim=1) / (items > 0).sum(dim=1).clamp(min=1)
        for step in of_steps.unbind():
            self._sums += step
        self._steps = []

    def _of_parts(self, parts: Sequence[Part]) -> Tensor:
        """`[P, 6 K + 6]`: what each of the P parts adds to the sums."""
        zero, nothing = self._zero, self._nothing

        def stacked(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(tensors)).to(zero.dtype)

        weightings, values, shares = zip(*parts, strict=True)
        present = stacked(w.present for w in weightings)
        # A batch without a label has no F.
        fraction, auxiliary = present.amax(dim=1), stacked(w.auxiliary_loss for w in weightings)
        if shares[0] is not None:
            fraction = fraction * stacked(share.fraction for share in shares)
            auxiliary = auxiliary / shares[0].num_micro_batches
        # None while the method is warming up: then there is nothing to take a mean of.
        weight = stacked(nothing if w.weights is None else w.weights for w in weightings) * present
        weighted = stacked(nothing if w.weights is None else nothing + 1 for w in weightings) * present
        discrepancy = stacked(zero if w.discrepancy is None else w.discrepancy for w in weightings) * fraction
        balanced = stacked(zero if w.discrepancy is None else zero + 1 for w in weightings) * fraction
        coefficients, items = stacked(w.coefficients for w in weightings), stacked(w.num_items for w in weightings)
        per_step = torch.cat([coefficients, present, weight, weighted], dim=1) * fraction[:, None]
        # The mean loss of the update follows from its sums.
        scalars = [stacked(values), torch.zeros_like(fraction), discrepancy, auxiliary, balanced, fraction]
        losses = stacked(w.losses for w in weightings)
        return torch.cat([losses * items, items, per_step, torch.stack(scalars, dim=1)], dim=1)

    def drop(self, task: str) -> None:
        """A step was dropped because of `task`."""
        self.dropped[task] = self.dropped.get(task, 0) + 1

    def drain(self) -> tuple[dict[str, float], dict[str, list[float | None]]]:
        """The log entries since the last call, as Python floats, and the full vectors; starts over.

        Cost: one device-to-host copy of 6 K + 6 numbers.
        """
        self._add_up()
        numbers = self._sums.tolist()
        num_tasks = len(self.task_names)
        vectors = {name: numbers[i * num_tasks : (i + 1) * num_tasks] for i, name in enumerate(_VECTORS)}
        scalars = dict(zip(_SCALARS, numbers[len(_VECTORS) * num_tasks :], strict=True))
        steps = scalars["fraction"]
        self._run_value += scalars["value"]
        self._run_updates += self._updates
        columns = {"loss": _ratio(vectors["loss_sum"], vectors["items"])}
        if self._has_weights:
            columns["weight"] = _ratio(vectors["weight"], vectors["weighted"])
        columns["coefficient"] = _ratio(vectors["coefficient"], vectors["presence"])
        # Nothing to say where every step was dropped; `loss` must be there, as Trainer has put its own.
        logs = {"loss": scalars["value"] / steps if steps else math.nan}
        if steps:
            logs["loss_mean"] = scalars["loss_mean"] / steps
        if scalars["balanced"] and self._has_discrepancy:
            logs["discrepancy"] = scalars["discrepancy"] / scalars["balanced"]
        if steps and self._has_auxiliary:
            logs["auxiliary_loss"] = scalars["auxiliary"] / steps
        logs.update({f"dropped_steps/{task}": float(count) for task, count in self.dropped.items()})
        logs.update(self._per_task(columns) if num_tasks <= MAX_TASKS_IN_LOG else self._summary(columns))
        self._sums.zero_()
        self._updates = 0
        return logs, columns

    def run_mean(self) -> float:
        """Mean of F over all updates of the run, resumed parts included. Reads the device."""
        self._add_up()
        value = self._run_value + float(self._sums[-len(_SCALARS)])
        return value / max(self._run_updates + self._updates, 1)

    def _per_task(self, columns: dict[str, list[float | None]]) -> dict[str, float]:
        return {
            f"{kind}/{task}": value
            for kind, values in columns.items()
            for task, value in zip(self.task_names, values, strict=True)
            if value is not None
        }

    def _summary(self, columns: dict[str, list[float | None]]) -> dict[str, float]:
        logs: dict[str, float] = {}
        for kind, values in columns.items():
            known = [(value, k) for k, value in enumerate(values) if value is not None]
            if not known:
                continue
            logs[f"{kind}/min"], logs[f"{kind}/max"] = min(known)[0], max(known)[0]
            logs[f"{kind}/mean"] = sum(value for value, _ in known) / len(known)
            if kind == "loss":
                # An index, not a name: experiment trackers drop strings.
                logs["loss/worst_task"] = float(max(known)[1])
        return logs

    def state(self) -> dict[str, Any]:
        """All of it as JSON-able values; floats survive JSON exactly."""
        self._add_up()
        return {
            "task_names": self.task_names,
            "sums": self._sums.tolist(),
            "updates": self._updates,
            "has": [self._has_weights, self._has_discrepancy, self._has_auxiliary],
            "run_value": self._run_value,
            "run_updates": self._run_updates,
            "dropped": self.dropped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self._steps = []
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._updates, self._run_value, self._run_updates = state["updates"], state["run_value"], state["run_updates"]
        self._has_weights, self._has_discrepancy, self._has_auxiliary = state["has"]
        self.dropped = dict(state["dropped"])

    def reset(self) -> None:
        """Start a run from nothing."""
        self._steps = []
        self._sums.zero_()
        self._updates, self._run_value, self._run_updates, self.dropped = 0, 0.0, 0, {}
        self._has_weights = self._has_discrepancy = self._has_auxiliary = False


def _windows(parts: Sequence[Part]) -> list[int | None]:
    """Of each part, how many micro-batches its window has; None where it is the whole step."""
    return [None if share is None else share.num_micro_batches for _, _, share in parts]


def _ratio(sums: list[float], counts: list[float]) -> list[float | None]:
    return [total / count if count > 0 else None for total, count in zip(sums, counts, strict=True)]


def append_vectors(folder: str, step: int, epoch: float | None, columns: dict[str, list[float | None]]) -> None:
    """Append one line with the full vectors to `task_vectors.jsonl` in `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / VECTORS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "epoch": epoch, **columns}) + "\n")


def truncate_vectors(folder: str, step: int, name: str = VECTORS_FILE) -> None:
    """Drop the lines after `step` (a resumed run writes them again) and a last line that a kill cut short.

    Args:
        folder: the run's.
        step: the last one that is kept.
        name: of a file of JSON lines, each with its `step`.
    """
    path = Path(folder) / name
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_text(path, "".join(kept))

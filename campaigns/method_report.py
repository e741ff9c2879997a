"""The report of the campaign on every method: where it ran, and the largest deviation per method and check."""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from collections import defaultdict
from dataclasses import dataclass, field

import accelerate
import torch
import transformers

import hf_bilb

INTRODUCTION = """\
# Every method: ranks, accumulation, kill and resume

{date}; {machine};
{versions}.
Command: `make campaign`; {minutes:.0f} minutes.

Every registered loss balancer with the variants and normalizations of `tests/contract/cases.py`; four tasks, float64
and Adam, other data and other missing labels on each rank. Numbers: the largest relative L2 difference of the model's
parameters over a method's cases, allowed {allowed}; the balancer's state and every logged number agree to 1e-11 as
well, and on two ranks the state is the same bit for bit. `tests/distributed/method_checks.py` says what each check
compares.
"""

NOTES = """\
* `skip`, `hold`: of absent tasks, by the Trainer over three epochs. Own loop: DistributedDataParallel without the
  Trainer, with shards of five and three rows, `hold`. Two ranks x 4: each update in four micro-batches per rank.
* `window`: 2 x 4 and 4 x 2 against 1 x 8, in one process. Plain loop: `micro_batch` against a loop without the
  library's driver. Linear: `micro_batch` against 1 x 8, for methods whose coefficients do not depend on the update's
  own losses.
* `bilb` with rescaled losses (`normalization_rescaled`, `nyuv2`) runs with `smoothing: 1e-4`: in the first update these
  losses are all equal but for rounding, which gives each |d| a sign of its own, and the slope of 1 that goes with it.
* MARIGOLD's `two_point` is allowed ten times as much: a step of an Adam that has not run yet is the gradient's sign,
  so that its first two trials end at the same losses but for rounding, and the first step of its own Adam magnifies
  what is left.
* Refused: methods that run a batch once more take accumulation with `window` alone, and say so before training.
* Killed: SIGKILL within the second or third epoch, resumed by a fresh interpreter from the last checkpoint: parameters,
  balancer, log history and train loss are those of the run that was left alone, bit for bit. With dropout; in float32;
  plain, and of a method's main cases over a window, by micro-batches and on two ranks.
"""


@dataclass
class Figures:
    """What was measured: method -> check -> values; and what failed."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    failed: list[str] = field(default_factory=list)
    cases: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    began: float = field(default_factory=time.monotonic)

    def add(self, method: str, case: str, check: str, value: float) -> None:
        """NaN: the check has no number, it has passed."""
        self.cases[method].add(case)
        self.values[method][check].append(value)

    def __len__(self) -> int:
        return len(self.failed) + sum(len(found) for checks in self.values.values() for found in checks.values())

    def report(self, checks: list[str], allowed: str) -> str:
        """The whole Markdown page, with a column for each of the `checks`."""
        rows = [["method", "cases", *checks]]
        rows += [
            [f"`{method}`", str(len(self.cases[method])), *(_cell(self.values[method].get(name)) for name in checks)]
            for method in sorted(self.values)
        ]
        table = ["| " + " | ".join(row) + " |" for row in rows]
        table.insert(1, "|---" * len(rows[0]) + "|")
        failed = (
            "\n".join(["Failed:", "", *(f"* {name}" for name in self.failed)]) if self.failed else "Nothing failed."
        )
        introduction = INTRODUCTION.format(
            date=datetime.date.today().isoformat(),
            machine=f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), no accelerator",
            versions=f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, accelerate {accelerate.__version__}, hf_bilb {hf_bilb.__version__}",
            minutes=(time.monotonic() - self.began) / 60,
            allowed=allowed,
        )
        return "\n".join([introduction, *table, "", NOTES, failed, ""])


def _cell(values: list[float] | None) -> str:
    if values is None:
        return ""
    numbers = [value for value in values if not math.isnan(value)]
    return f"{max(numbers):.1e}" if numbers else f"{len(values)} passed"

"""Training ends where `metric_for_best_model` has stopped getting better.

The callback of transformers keeps a counter, which a resumed run starts again, and which a user loses who replaces the
list of callbacks. Here the evaluations that the log holds say it: a resumed run stops where the whole one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_bilb.config.options import bounded, check_bounds


@dataclass(frozen=True)
class EarlyStoppingOptions:
    """`early_stopping: {patience, threshold}`.

    Attributes:
        patience: stop after so many evaluations in a row that were no better than the best one before them.
        threshold: by how much a value has to be better to count, in the metric's own unit.
    """

    patience: int = bounded(at_least=1)
    threshold: float = bounded(0.0, at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)


def evaluations_without_gain(values: Sequence[float], greater_is_better: bool, threshold: float) -> int:
    """How many of the last `values` were not better than the best before them by more than `threshold`; a value that is
    not a number is not better."""
    sign = 1.0 if greater_is_better else -1.0
    best, since = -math.inf, 0
    for value in values:
        if sign * value - best > threshold:
            best, since = sign * value, 0
        else:
            since += 1
    return since


def values_of(history: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """The values of `metric`, with or without `eval_`, that the log has so far; of several in one step the last."""
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    return list({entry["step"]: float(entry[key]) for entry in history if key in entry}.values())

"""Metrics that are functions of the exact task losses: no prediction, as wide as a vocabulary, is kept or gathered."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # takes seconds to import, and only the name is needed
    from transformers import EvalPrediction


class LossMetrics(ABC):
    """A `compute_metrics` that `BilevelMTLTrainer` gives the evaluation's exact losses instead of predictions."""

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Nothing: what is made of predictions. `evaluate` gathers none; `predict` does, for its caller."""
        return {}

    @abstractmethod
    def of_losses(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Metric key -> value, from the mean loss of every task that has items in the set."""


class Perplexity(LossMetrics):
    """`perplexity_<task>`: exp of the task's mean loss in nats per token; lower is better, 1 is certainty."""

    def of_losses(self, losses: Mapping[str, float]) -> dict[str, float]:
        """One number for each task in `losses`; infinite from a loss of 709 on."""
        return {f"perplexity_{task}": perplexity(loss) for task, loss in losses.items()}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is no float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf

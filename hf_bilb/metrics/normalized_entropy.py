"""Normalised entropy of one binary task. Missing labels are NaN or -100."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import MetricError
from hf_bilb.losses.masked import valid_labels
from hf_bilb.metrics.base import Accumulator, as_vector_pair, one_output, wide


def normalized_entropy(logits: Any, labels: Any) -> float:
    """Cross-entropy of the predictions, divided by that of always predicting the share of positive labels.

    NE = -mean(y log p + (1 - y) log(1 - p)) / -(q log q + (1 - q) log(1 - q)), with p = sigmoid(logit), q = mean y.

    Args:
        logits: `[N]`; numpy, tensor or list.
        labels: `[N]`, 0 or 1, NaN or -100 where missing.

    Returns:
        a number from 0, lower is better, 1 is no better than knowing the share; NaN where there are not both classes,
        or with a NaN logit.

    Raises:
        MetricError: the shapes differ, or a label is neither 0 nor 1.

    Source: He et al., Practical lessons from predicting clicks on ads at Facebook (ADKDD 2014), equation 1.
    """
    given, classes = as_vector_pair(logits, labels)
    there = ~np.isnan(classes) & (classes != -100)
    given, classes = given[there], classes[there]
    wrong = classes[(classes != 0) & (classes != 1)]
    if wrong.size:
        raise MetricError(f"labels: {wrong[0]:g} is not valid, expected 0 or 1 (NaN or -100 where missing)")
    # -log sigmoid of the logit of the label's class, without a probability that rounds to 0.
    with np.errstate(invalid="ignore"):  # a NaN logit: NaN is the answer
        losses = np.logaddexp(0.0, np.where(classes == 1, -given, given))
    return _quotient(float(losses.sum()), float(classes.sum()), len(classes))


def entropy_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Of `[B]`: the sum of the losses, the numbers of positive, of all and of invalid labels; `[4]`, in float64.

    Or of each of M columns at once: `[4, M]` of logits and labels `[B, M]`.
    """
    there = valid_labels(labels)
    invalid = there & (labels != 0) & (labels != 1)
    classes = wide(labels).where(there, 0.0)
    logits = wide(logits)
    losses = functional.softplus(torch.where(classes == 1, -logits, logits)).where(there, 0.0)
    counts = [column.sum(dim=0).to(losses.dtype) for column in (there, invalid)]
    return torch.stack([losses.sum(dim=0), classes.sum(dim=0), *counts])


def entropy_of_sums(losses: float, positives: float, count: float, invalid: float) -> float:
    """The metric from `entropy_sums`; NaN where there are not both classes.

    Raises:
        MetricError: some label is neither 0 nor 1.
    """
    if invalid:
        raise MetricError(f"labels: {invalid:.0f} are not valid, expected 0 or 1, NaN or -100 where missing")
    return _quotient(losses, positives, count)


def _quotient(losses: float, positives: float, count: float) -> float:
    share = positives / count if count else 0.0
    if not 0 < share < 1:
        return math.nan
    return losses / count / -(share * math.log(share) + (1 - share) * math.log(1 - share))


class NormalizedEntropy(Accumulator):
    """`normalized_entropy`, batch by batch; nothing when there are not both classes.

    `update(predictions, labels)` takes logits `[B]`, or the first column of `[B, C]`.

    State: four numbers.
    """

    metric_names: tuple[str, ...] = ("normalized_entropy",)
    higher_is_better: ClassVar[bool] = False
    _sums: Tensor

    def __init__(self) -> None:
        self.reset()

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        sums = entropy_sums(*one_output(predictions, labels))
        self._sums = self._sums.to(sums) + sums

    def compute(self) -> dict[str, float]:
        losses, positives, count, invalid = self._sums.tolist()
        value = entropy_of_sums(losses, positives, count, invalid)
        return {"normalized_entropy": value} if 0 < positives < count else {}

    def reset(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)

    def merge(self, other: NormalizedEntropy) -> None:
        self.check_mergeable(other)
        self._sums = self._sums + other._sums.to(self._sums.device)

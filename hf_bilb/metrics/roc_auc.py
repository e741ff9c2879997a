"""Area under the ROC curve, and several metrics of one binary task together. Missing labels are NaN or -100.

With labels of one class alone the area is undefined: the function returns NaN, the accumulators leave the metric out
(scikit-learn warns or raises).

A score that is NaN is the worst that can be: a positive example below every negative one, a negative one above every
positive one. A model that diverged has area 0, and no NaN takes the mean over all tasks with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.config.options import unknown_name
from hf_bilb.errors import MetricError, OptionError
from hf_bilb.metrics.base import Accumulator, as_vector_pair
from hf_bilb.metrics.classification import AccuracyAndF1

# --- all at once --------------------------------------------------------------------------------------------------


def roc_auc(scores: Any, labels: Any) -> float:
    """Share of the pairs of a positive and a negative example that the scores put in order; equal scores count half.

    Args:
        scores: `[N]`, logits, probabilities or whatever rises with the positive class; numpy, tensor or list.
        labels: `[N]`, 0 or 1, NaN or -100 where missing.

    Returns:
        a number in [0, 1]; NaN where there are not both classes.

    Raises:
        MetricError: the shapes differ, or a label is neither 0 nor 1.

    Source: Hanley and McNeil, The meaning and use of the area under a receiver operating characteristic (ROC) curve,
    Radiology 143 (1982): the Mann-Whitney statistic. Cost: sorts the N scores.
    """
    given, classes = as_vector_pair(scores, labels)
    there = ~np.isnan(classes) & (classes != -100)
    given, classes = given[there], classes[there]
    wrong = classes[(classes != 0) & (classes != 1)]
    if wrong.size:
        raise MetricError(f"labels: {wrong[0]:g} is not valid, expected 0 or 1 (NaN or -100 where missing)")
    positive = classes == 1
    pairs = int(positive.sum()) * int((~positive).sum())
    return _pairs_in_order(given, positive) / pairs if pairs else math.nan


def _pairs_in_order(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Of positive and negative examples: pairs in order and half of the ties; none of a score that is NaN."""
    ranked = ~np.isnan(scores)
    scores, positive = scores[ranked], positive[ranked]
    values, position = np.unique(scores, return_inverse=True)
    negatives = np.bincount(position[~positive], minlength=len(values))
    below = np.cumsum(negatives) - negatives
    positives = np.bincount(position[positive], minlength=len(values))
    # Twice the statistic, in integers: exact however many examples there are.
    return int((positives * (2 * below + negatives)).sum()) / 2


# --- batch by batch -----------------------------------------------------------------------------------------------


class RocAuc(Accumulator):
    """`roc_auc`, exactly, batch by batch; nothing when there are not both classes.

    `update(predictions, labels)` takes scores `[B]`, or two logits an example `[B, 2]` (further columns, which other
    tasks need, are left out): their difference is the score.

    State: the area has no sufficient statistic of fixed size. Score and label of every example are kept, 2 numbers an
    example (missing ones included until `compute`).
    """

    metric_names: tuple[str, ...] = ("roc_auc",)
    higher_is_better: ClassVar[bool] = True

    def __init__(self) -> None:
        self._pairs: list[Tensor] = []

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        scores = _scores(predictions, labels).detach()
        # A copy: a view would keep the whole batch of logits. In the finer of the two types: rounding would make ties.
        dtype = torch.promote_types(scores.dtype, labels.dtype)
        self._pairs.append(torch.stack([scores.to(dtype), labels.to(dtype)]))

    def compute(self) -> dict[str, float]:
        if not self._pairs:
            return {}
        scores, labels = torch.cat([pair.cpu().to(torch.float64) for pair in self._pairs], dim=1)
        area = roc_auc(scores, labels)
        return {} if math.isnan(area) else {"roc_auc": area}

    def reset(self) -> None:
        self._pairs.clear()

    def merge(self, other: RocAuc) -> None:
        self.check_mergeable(other)
        self._pairs += other._pairs


def _scores(predictions: Tensor, labels: Tensor) -> Tensor:
    rows = predictions.shape[:1]
    two_logits = predictions.ndim == 2 and predictions.shape[1] >= 2
    if labels.ndim != 1 or rows != labels.shape or not (predictions.ndim == 1 or two_logits):
        raise MetricError(
            f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, "
            "expected [B] or [B, C] (the first two columns count), and [B]"
        )
    return predictions[:, 1] - predictions[:, 0] if two_logits else predictions


class BinaryClassification(Accumulator):
    """Some or all of `accuracy`, `f1` (of class 1) and `roc_auc` of one binary task.

    `update(predictions, labels)` takes logits `[B]` (class 1 where positive: no probabilities, whose classes part at
    0.5), or two an example `[B, 2]`. Labels of one class alone have accuracy and F1, but no area.

    Args:
        metrics: which, in the order of the result.

    State: 8 integers for accuracy and F1; for the area that of `RocAuc`.

    Raises:
        OptionError: `metrics` is empty, or holds something unknown or twice the same.
    """

    higher_is_better: ClassVar[bool] = True

    def __init__(self, metrics: Sequence[str] = ("accuracy", "f1", "roc_auc")) -> None:
        self.metric_names = tuple(metrics)
        for name in self.metric_names:
            if name not in _OWNERS:
                raise unknown_name("metrics", name, _OWNERS)
        if not metrics or len(set(metrics)) < len(self.metric_names):
            raise OptionError(f"metrics: {list(metrics)} is not valid, expected one or more different names")
        classes = dict.fromkeys(_OWNERS[name] for name in self.metric_names)
        self._parts: list[Accumulator] = [cls() for cls in classes]

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        for part in self._parts:
            part.update(predictions, labels)

    def compute(self) -> dict[str, float]:
        found = {name: value for part in self._parts for name, value in part.compute().items()}
        return {name: found[name] for name in self.metric_names if name in found}

    def reset(self) -> None:
        for part in self._parts:
            part.reset()

    def merge(self, other: BinaryClassification) -> None:
        self.check_mergeable(other)
        if other.metric_names != self.metric_names:
            raise MetricError(f"merge: got {', '.join(other.metric_names)}, expected {', '.join(self.metric_names)}")
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            mine.merge(theirs)


_OWNERS: dict[str, type[AccuracyAndF1] | type[RocAuc]] = {
    "accuracy": AccuracyAndF1,
    "f1": AccuracyAndF1,
    "roc_auc": RocAuc,
}

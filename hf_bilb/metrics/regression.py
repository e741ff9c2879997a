"""Errors of regression tasks; labels that are NaN are missing (-100 is a measurement like any other)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.errors import MetricError
from hf_bilb.metrics.base import Accumulator, one_output, wide


def mean_absolute_error(predictions: Any, labels: Any) -> NDArray[np.float64]:
    """Mean of |prediction - label| for each task.

    Args:
        predictions: `[N, K]`.
        labels: `[N, K]`, NaN where missing, in the units of the predictions.

    Returns:
        `[K]` in the same units, summed in float64; NaN for a task without any label.

    Raises:
        MetricError: the shapes differ (they would broadcast to a plausible, wrong number), or are not `[N, K]`.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (predictions, labels))
    if first.ndim != 2 or first.shape != second.shape:
        raise MetricError(f"predictions {first.shape} and labels {second.shape}, expected both [N, K]")
    there = ~np.isnan(second)
    errors = np.where(there, np.abs(first - second), 0.0)
    with np.errstate(invalid="ignore"):  # 0 / 0 where no label is: NaN is the answer
        return np.asarray(errors.sum(axis=0) / there.sum(axis=0))


def normalized_mean_squared_error(predictions: Any, labels: Any) -> NDArray[np.float64]:
    """Mean squared error of each task divided by the (population) variance of its labels; 1 is knowing their mean.

    Args and errors as in `mean_absolute_error`.

    Returns:
        `[K]`, without a unit; NaN for a task without two different labels.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), section 2.5: the standardised mean
    squared error; 1 minus the coefficient of determination R^2.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (predictions, labels))
    if first.ndim != 2 or first.shape != second.shape:
        raise MetricError(f"predictions {first.shape} and labels {second.shape}, expected both [N, K]")
    there = ~np.isnan(second)
    lowest = np.where(there, second, np.inf).min(axis=0, initial=np.inf)
    highest = np.where(there, second, -np.inf).max(axis=0, initial=-np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(there, second, 0.0).sum(axis=0) / there.sum(axis=0)
        deviations, errors = (np.where(there, values, 0.0) for values in (second - means, first - second))
        ratio = (errors**2).sum(axis=0) / (deviations**2).sum(axis=0)
    # Not by the deviation: that of equal numbers may be a rounding error instead of 0.
    return np.asarray(np.where(lowest < highest, ratio, np.nan))


class MeanAbsoluteError(Accumulator):
    """The same for one task, batch by batch.

    `update(predictions, labels)` takes `[B]`, or the first column of `[B, C]`.

    State: a sum and a count, in float64.
    """

    metric_names: tuple[str, ...] = ("mean_absolute_error",)
    higher_is_better: ClassVar[bool] = False
    _sum_and_count: Tensor

    def __init__(self) -> None:
        self.reset()

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        predictions, labels = one_output(predictions, labels)
        there = ~labels.isnan()
        errors = (wide(predictions) - wide(labels)).abs().where(there, 0.0)
        self._sum_and_count = self._sum_and_count.to(errors) + torch.stack([errors.sum(), there.sum().to(errors.dtype)])

    def compute(self) -> dict[str, float]:
        total, count = self._sum_and_count.tolist()
        return {"mean_absolute_error": total / count} if count else {}

    def reset(self) -> None:
        self._sum_and_count = torch.zeros(2, dtype=torch.float64)

    def merge(self, other: MeanAbsoluteError) -> None:
        self.check_mergeable(other)
        self._sum_and_count = self._sum_and_count + other._sum_and_count.to(self._sum_and_count.device)

"""Metrics of many columns at once: D numbers, or M binary labels, without a loop over them in a batch.

Each class computes column by column what the accumulators of one task compute (`hf_bilb.metrics.correlation`,
`.roc_auc`, `.normalized_entropy`, ...), from predictions and labels `[B, n]`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_bilb.errors import MetricError
from hf_bilb.losses.masked import valid_labels
from hf_bilb.metrics.base import wide
from hf_bilb.metrics.correlation import combined_moments, extremes, moments, pearson_of_deviations, spearman
from hf_bilb.metrics.normalized_entropy import entropy_of_sums, entropy_sums
from hf_bilb.metrics.roc_auc import roc_auc
from hf_bilb.metrics.trainer_metrics import of_task

#: Metric -> its value in each column; None where it is not defined, such as without a label.
ColumnValues = dict[str, list["float | None"]]


class ColumnStatistics(ABC):
    """Statistics of n columns.

    State: tensors, on the device of what is added. Adding does not synchronise with the device.

    Args:
        names: the task of each column, for errors.

    Attributes:
        metric_names: what `compute` returns.
    """

    metric_names: ClassVar[tuple[str, ...]]

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.reset()

    @abstractmethod
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch, both `[B, n]`, labels NaN where missing; the caller has checked the shapes."""

    @abstractmethod
    def compute(self) -> ColumnValues:
        """The metrics of what was seen since `reset`.

        Raises:
            MetricError: some label is none, naming the task.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    def _by_column(self, function: Callable[..., float | None], *columns: Any) -> list[float | None]:
        """`function` of each column's entries of `columns`; errors name the task."""
        values = []
        for name, *entries in zip(self.names, *columns, strict=True):
            with of_task(name):
                values.append(function(*entries))
        return values


# --- numbers ------------------------------------------------------------------------------------------------------


class RegressionColumns(ColumnStatistics):
    """Errors and correlations of n columns of numbers.

    `mae`, `mse` and `rmse` are times the column's scale (its square); `nmse`, the mean squared error over the variance
    of the labels, and `r2`, 1 minus it, are defined where there are two different labels. A prediction that is NaN
    makes all of the column's metrics NaN, but for a `pearson` of constant labels, which is 0.0.

    Args:
        names: as in `ColumnStatistics`.
        scales: `[n]`, what an error of 1 is in the unit that is reported.

    State: 12 numbers for each column, in float64.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("mae", "rmse", "mse", "nmse", "r2", "pearson")
    _sums: Tensor
    _moments: Tensor
    _lowest: Tensor
    _highest: Tensor

    def __init__(self, names: Sequence[str], scales: Sequence[float]) -> None:
        super().__init__(names)
        self.scales = tuple(scales)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        if len(labels) == 0:
            return
        pairs, there = torch.stack([wide(predictions), wide(labels)]), ~labels.isnan()
        errors = (pairs[0] - pairs[1]).where(there, 0.0)
        sums = torch.stack([errors.abs().sum(dim=0), errors.square().sum(dim=0)])
        lowest, highest = extremes(pairs, there)
        self._sums = self._sums.to(sums) + sums
        self._moments = combined_moments(self._moments.to(sums), moments(pairs, there))
        self._lowest = torch.minimum(self._lowest.to(sums), lowest)
        self._highest = torch.maximum(self._highest.to(sums), highest)

    def compute(self) -> ColumnValues:
        table = torch.cat([self._sums, self._moments[[0, 3, 4, 5]], self._lowest, self._highest]).T.tolist()
        found: ColumnValues = {metric: [] for metric in self.metric_names}
        for scale, column in zip(self.scales, table, strict=True):
            values = _of_numbers(scale, *column)
            for metric, entries in found.items():
                entries.append(values.get(metric))
        return found

    def reset(self) -> None:
        columns = len(self.names)
        self._sums = torch.zeros(2, columns, dtype=torch.float64)  # of absolute errors, of squared ones
        self._moments = torch.zeros(6, columns, dtype=torch.float64)
        self._lowest = torch.full((2, columns), torch.inf, dtype=torch.float64)
        self._highest = torch.full((2, columns), -torch.inf, dtype=torch.float64)


def _of_numbers(
    scale: float,
    absolute: float,
    squared: float,
    count: float,
    of_x: float,
    of_y: float,
    product: float,
    lowest_x: float,
    lowest_y: float,
    highest_x: float,
    highest_y: float,
) -> dict[str, float]:
    """The metrics of one column that are defined."""
    if count == 0:
        return {}
    mse = squared / count * scale**2
    constant = lowest_x == highest_x or lowest_y == highest_y
    found = {"mae": absolute / count * scale, "mse": mse, "rmse": math.sqrt(mse)}
    found["pearson"] = pearson_of_deviations(of_x, of_y, product, constant)
    # Not by the deviation alone: that of equal numbers may be a rounding error instead of 0.
    if lowest_y < highest_y and of_y > 0:
        nmse = squared / of_y
        # That of the mean is 0, not a rounding error near it.
        found |= {"nmse": nmse, "r2": round(1 - nmse, 12)}
    return found


# --- binary labels ------------------------------------------------------------------------------------------------


class BinaryColumns(ColumnStatistics):
    """Accuracy and F1 of class 1 of n binary columns, from logits: class 1 where positive.

    Labels are 0 or 1, NaN or -100 where missing. A NaN logit counts as a wrong prediction. F1 is 0.0 where it is 0 / 0.

    State: 5 counts for each column.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("f1", "accuracy")
    _counts: Tensor

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        logits, valid = predictions.detach(), valid_labels(labels)
        predicted, actual = (logits > 0) & valid, (labels == 1) & valid
        right = (predicted == actual) & ~logits.isnan() & valid
        invalid = valid & (labels != 0) & ~actual
        rows = (predicted & actual, predicted.long() + actual.long(), right, valid, invalid)
        self._counts = self._counts.to(logits.device) + torch.stack([row.sum(dim=0) for row in rows])

    def compute(self) -> ColumnValues:
        counts = self._counts.tolist()
        hits, either, right, there, invalid = counts
        self._by_column(_check_binary, invalid)
        f1 = self._by_column(lambda h, e, n: _share(h * 2, e) if n else None, hits, either, there)
        return {"f1": f1, "accuracy": self._by_column(lambda r, n: r / n if n else None, right, there)}

    def reset(self) -> None:
        # Rows: true positives, predicted or actual positives, right answers, labels, and those that are no label.
        self._counts = torch.zeros(5, len(self.names), dtype=torch.int64)

    def merge(self, other: BinaryColumns) -> None:
        """Add what `other`, of the same columns, has seen."""
        self._counts = self._counts + other._counts.to(self._counts.device)


def _share(part: int, total: int) -> float:
    return part / total if total else 0.0


def _check_binary(invalid: int) -> None:
    if invalid:
        raise MetricError(f"labels: {invalid} are not valid, expected 0 or 1, NaN or -100 where missing")


class EntropyColumns(ColumnStatistics):
    """`normalized_entropy` of n binary columns, from logits; defined where there are both classes.

    State: 4 numbers for each column, in float64.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("normalized_entropy",)
    _sums: Tensor

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        sums = entropy_sums(predictions, labels)
        self._sums = self._sums.to(sums) + sums

    def compute(self) -> ColumnValues:
        losses, positives, counts, invalid = self._sums.tolist()
        values = self._by_column(entropy_of_sums, losses, positives, counts, invalid)
        both = [0 < p < n for p, n in zip(positives, counts, strict=True)]
        return {"normalized_entropy": [v if known else None for v, known in zip(values, both, strict=True)]}

    def reset(self) -> None:
        self._sums = torch.zeros(4, len(self.names), dtype=torch.float64)


# --- what needs every row -----------------------------------------------------------------------------------------


class KeptColumns(ColumnStatistics):
    """A metric of ranks, which have no sufficient statistic of fixed size.

    State: predictions and labels of every row, 2 n numbers a row. Cost of `compute`: n sorts on the CPU.
    """

    @staticmethod
    @abstractmethod
    def function(predictions: Tensor, labels: Tensor) -> float:
        """The metric of one column, from `[N]` and `[N]` in float64; NaN labels are missing."""

    @staticmethod
    @abstractmethod
    def defined(labels: Tensor) -> bool:
        """Whether there is such a metric for labels `[N]`."""

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        self._batches.append((predictions.detach(), labels.detach()))

    def compute(self) -> ColumnValues:
        if not self._batches:
            return {metric: [None] * len(self.names) for metric in self.metric_names}
        parts = zip(*self._batches, strict=True)
        predictions, labels = (torch.cat([part.cpu().double() for part in side]).T for side in parts)
        return {self.metric_names[0]: self._by_column(self._of_column, predictions, labels)}

    def _of_column(self, predictions: Tensor, labels: Tensor) -> float | None:
        value = self.function(predictions, labels)  # first, since it checks the labels
        return value if self.defined(labels) else None

    def reset(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] = []

    def merge(self, other: KeptColumns) -> None:
        """Add what `other`, of the same columns, has seen."""
        self._batches += other._batches


class SpearmanColumns(KeptColumns):
    """`spearman` of n columns of numbers, as `hf_bilb.metrics.correlation.spearman`."""

    metric_names: ClassVar[tuple[str, ...]] = ("spearman",)

    @staticmethod
    def function(predictions: Tensor, labels: Tensor) -> float:
        return spearman(predictions, labels)

    @staticmethod
    def defined(labels: Tensor) -> bool:
        return not bool(labels.isnan().all())


class RocAucColumns(KeptColumns):
    """`roc_auc` of n binary columns, from logits, as `hf_bilb.metrics.roc_auc.roc_auc`; of both classes."""

    metric_names: ClassVar[tuple[str, ...]] = ("roc_auc",)

    @staticmethod
    def function(predictions: Tensor, labels: Tensor) -> float:
        return roc_auc(predictions, labels)

    @staticmethod
    def defined(labels: Tensor) -> bool:
        return bool((labels == 0).any() and (labels == 1).any())

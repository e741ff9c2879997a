"""Pearson's and Spearman's correlation of one regression task. Missing labels are NaN.

A constant has no correlation: scipy answers NaN, these answer 0.0. A head that predicts one number for everything has
learned nothing of the order, exactly what Matthews' coefficient says with its 0.0 about a classifier that always
answers one class; and one NaN would take the mean over all tasks with it, and be no JSON in the logs. A NaN that comes
from the model stays a NaN.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.metrics.base import Accumulator, as_vector_pair, one_output, wide

# --- all at once --------------------------------------------------------------------------------------------------


def pearson(predictions: Any, labels: Any) -> float:
    """Pearson's correlation coefficient: how near the pairs are to a rising line.

    Args:
        predictions: `[N]`; numpy, tensor or list.
        labels: `[N]`, NaN where missing.

    Returns:
        a number in [-1, 1]; 0.0 when either side is constant (which a single pair is); NaN without any label, or with
        a prediction that is not finite.

    Raises:
        MetricError: the shapes differ.
    """
    x, y = _labelled(predictions, labels)
    if not x.size:
        return math.nan
    if _constant(x) or _constant(y):
        return 0.0
    x, y = _centred(x), _centred(y)
    with np.errstate(invalid="ignore"):
        return _clip(float(x @ y / np.sqrt((x @ x) * (y @ y))))


def spearman(predictions: Any, labels: Any) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing the mean of theirs.

    Args and errors as in `pearson`; infinite values have a rank. Cost: sorts the N values.
    """
    x, y = _labelled(predictions, labels)
    return math.nan if np.isnan(x).any() else pearson(_average_ranks(x), _average_ranks(y))


def _labelled(predictions: Any, labels: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = as_vector_pair(predictions, labels)
    there = ~np.isnan(y)
    return x[there], y[there]


def _constant(values: NDArray[np.float64]) -> bool:
    # Not by the deviation: that of equal numbers may be a rounding error instead of 0.
    return bool(values.min() == values.max())


def _centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deviations from the mean, the largest 1 or -1, so that no square overflows or vanishes."""
    with np.errstate(invalid="ignore"):  # infinite predictions: NaN is the answer
        deviations = values - values.mean()
        return deviations / np.abs(deviations).max()


def _average_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return ranks[position]


def _clip(value: float) -> float:
    return value if math.isnan(value) else max(-1.0, min(1.0, value))


# --- batch by batch -----------------------------------------------------------------------------------------------


class Pearson(Accumulator):
    """`pearson` from sufficient statistics.

    `update(predictions, labels)` takes `[B]`, or the first column of `[B, C]`.

    State: 10 numbers: count, means, sums of squared and of multiplied deviations, extremes. Batches are combined by
    their means and deviations (Chan, Golub and LeVeque, Algorithms for computing the sample variance, The American
    Statistician 37, 1983), in float64: sums of squares would cancel where the mean is large against the deviation.
    """

    metric_names: tuple[str, ...] = ("pearson",)
    higher_is_better: ClassVar[bool] = True
    _moments: Tensor
    _lowest: Tensor
    _highest: Tensor

    def __init__(self) -> None:
        self.reset()

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        predictions, labels = one_output(predictions, labels)
        if len(labels) == 0:
            return
        pairs = torch.stack([wide(predictions), wide(labels)])
        there = ~labels.isnan()
        self._add(moments(pairs, there), *extremes(pairs, there))

    def _add(self, added: Tensor, lowest: Tensor, highest: Tensor) -> None:
        self._moments = combined_moments(self._moments.to(added), added)
        self._lowest = torch.minimum(self._lowest.to(lowest), lowest)
        self._highest = torch.maximum(self._highest.to(highest), highest)

    def compute(self) -> dict[str, float]:
        count, _, _, of_x, of_y, product = self._moments.tolist()
        constant = bool((self._lowest == self._highest).any())
        return {"pearson": pearson_of_deviations(of_x, of_y, product, constant)} if count else {}

    def reset(self) -> None:
        self._moments = torch.zeros(6, dtype=torch.float64)
        self._lowest = torch.full((2,), torch.inf, dtype=torch.float64)
        self._highest = torch.full((2,), -torch.inf, dtype=torch.float64)

    def merge(self, other: Pearson) -> None:
        self.check_mergeable(other)
        device = self._moments.device
        self._add(other._moments.to(device), other._lowest.to(device), other._highest.to(device))


def moments(pairs: Tensor, there: Tensor) -> Tensor:
    """Of `pairs [2, B]` where `there [B]`: count, the two means, squared deviations of each, their product; `[6]`.

    Or of each of D columns at once: `[6, D]` of `pairs [2, B, D]` and `there [B, D]`.
    """
    count = there.sum(dim=0).to(pairs.dtype)
    means = pairs.where(there, 0.0).sum(dim=1) / count.clamp(min=1)
    deviations = (pairs - means.unsqueeze(1)).where(there, 0.0)
    product = (deviations[0] * deviations[1]).sum(dim=0)
    return torch.cat([count[None], means, deviations.square().sum(dim=1), product[None]])


def combined_moments(a: Tensor, b: Tensor) -> Tensor:
    """`moments` of two sets together."""
    count = a[0] + b[0]
    share = b[0] / count.clamp(min=1)
    shift = b[1:3] - a[1:3]
    squares = torch.cat([shift.square(), (shift[0] * shift[1])[None]])
    return torch.cat([count[None], a[1:3] + shift * share, a[3:] + b[3:] + squares * (a[0] * share)])


def extremes(pairs: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest values; shapes as in `moments`, B above 0."""
    return pairs.where(there, torch.inf).amin(dim=1), pairs.where(there, -torch.inf).amax(dim=1)


def pearson_of_deviations(of_x: float, of_y: float, product: float, constant: bool) -> float:
    """From the last three of `moments`, and whether either side is constant, which deviations alone do not tell."""
    if constant or of_x == 0 or of_y == 0:  # 0 without being constant: deviations whose squares vanish
        return 0.0
    return _clip(product / of_y / math.sqrt(of_x / of_y))


class Spearman(Accumulator):
    """`spearman`, batch by batch.

    Ranks have no sufficient statistic of fixed size: prediction and label of every example are kept, 2 numbers an
    example (missing ones, hence those of other tasks, included until `compute`), but no further columns.

    `update(predictions, labels)` takes `[B]`, or the first column of `[B, C]`.
    """

    metric_names: tuple[str, ...] = ("spearman",)
    higher_is_better: ClassVar[bool] = True

    def __init__(self) -> None:
        self._pairs: list[Tensor] = []

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        predictions, labels = one_output(predictions, labels)
        # A copy: a view would keep the whole batch of logits. In the finer of the two types: rounding would make ties.
        dtype = torch.promote_types(predictions.dtype, labels.dtype)
        self._pairs.append(torch.stack([predictions.detach().to(dtype), labels.to(dtype)]))

    def compute(self) -> dict[str, float]:
        if not self._pairs:
            return {}
        predictions, labels = torch.cat([pair.cpu().to(torch.float64) for pair in self._pairs], dim=1)
        return {} if bool(labels.isnan().all()) else {"spearman": spearman(predictions, labels)}

    def reset(self) -> None:
        self._pairs.clear()

    def merge(self, other: Spearman) -> None:
        self.check_mergeable(other)
        self._pairs += other._pairs


class PearsonSpearman(Accumulator):
    """`pearson` and `spearman`; keeps what `Pearson` and `Spearman` keep."""

    metric_names: tuple[str, ...] = (*Pearson.metric_names, *Spearman.metric_names)
    higher_is_better: ClassVar[bool] = True

    def __init__(self) -> None:
        self._pearson, self._spearman = Pearson(), Spearman()

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        self._pearson.update(predictions, labels)
        self._spearman.update(predictions, labels)

    def compute(self) -> dict[str, float]:
        return {**self._pearson.compute(), **self._spearman.compute()}

    def reset(self) -> None:
        self._pearson.reset()
        self._spearman.reset()

    def merge(self, other: PearsonSpearman) -> None:
        self.check_mergeable(other)
        self._pearson.merge(other._pearson)
        self._spearman.merge(other._spearman)

"""Accuracy, F1 and Matthews correlation of one classification task.

The functions take class indices; the accumulators in addition to them take what a model puts out, batch by batch, and
keep a confusion matrix. Missing labels are NaN or -100, as in `hf_bilb.losses.contract`. Where a quotient is 0 / 0 the
value is scikit-learn's: 0.0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.config.options import nearest, unknown_name
from hf_bilb.errors import MetricError, OptionError
from hf_bilb.losses.masked import valid_labels
from hf_bilb.metrics.base import Accumulator, as_vector_pair

Average: TypeAlias = Literal["binary", "macro"]
#: `matrix[i, j]`: how many examples of class i were taken for class j.
Matrix: TypeAlias = NDArray[np.int64]


# --- all at once --------------------------------------------------------------------------------------------------


def accuracy(predictions: Any, labels: Any) -> float:
    """Share of examples whose class was predicted.

    Args:
        predictions: class indices `[N]`; numpy, tensor or list, of any number type.
        labels: class indices `[N]`, NaN or -100 where missing.

    Returns:
        a number in [0, 1]; NaN without any label.

    Raises:
        MetricError: the shapes differ, or something is no class index.
    """
    matrix, _ = _confusion(predictions, labels)
    return _accuracy(matrix) if matrix.size else math.nan


def f1_score(predictions: Any, labels: Any, average: Average = "binary", pos_label: int = 1) -> float:
    """Harmonic mean of precision and recall: 2 TP / (2 TP + FP + FN).

    Args:
        predictions, labels: as in `accuracy`.
        average: `binary`, of the class `pos_label`, with any other class as its opposite; or `macro`, the mean over the
            classes that labels or predictions have.
        pos_label: the class that `binary` is about.

    Returns:
        a number in [0, 1], 0.0 for a class that was neither there nor predicted; NaN without any label.

    Raises:
        MetricError: as in `accuracy`.
        OptionError: another `average`.
    """
    _check_average(average)
    matrix, classes = _confusion(predictions, labels)
    if not matrix.size:
        return math.nan
    scores = _f1_by_class(matrix)
    if average == "macro":
        return float(np.mean(scores))
    found = np.flatnonzero(classes == pos_label)
    return scores[int(found[0])] if found.size else 0.0


def matthews_correlation(predictions: Any, labels: Any) -> float:
    """Matthews correlation coefficient for two or more classes: the correlation of predicted and actual classes.

    Args:
        predictions, labels: as in `accuracy`.

    Returns:
        a number in [-1, 1]; 0.0 when all labels, or all predictions, are one class; NaN without any label.

    Raises:
        MetricError: as in `accuracy`.

    Source: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, Computational
    Biology and Chemistry 28 (2004), equation 8.
    """
    matrix, _ = _confusion(predictions, labels)
    return _matthews(matrix) if matrix.size else math.nan


def _confusion(predictions: Any, labels: Any) -> tuple[Matrix, NDArray[np.float64]]:
    """The matrix over the classes that appear (none: size 0), and those classes in order."""
    predicted, actual = as_vector_pair(predictions, labels)
    there = ~np.isnan(actual) & (actual != -100)
    predicted, actual = predicted[there], actual[there]
    for name, values in (("predictions", predicted), ("labels", actual)):
        wrong = values[~((values >= 0) & (values == np.floor(values)) & np.isfinite(values))]
        if wrong.size:
            missing = "" if name == "predictions" else " (NaN or -100 where missing)"
            raise MetricError(f"{name}: {wrong[0]:g} is not valid, expected class indices 0, 1, ...{missing}")
    classes, codes = np.unique(np.concatenate([actual, predicted]), return_inverse=True)
    size = len(classes)
    cells = codes[: len(actual)] * size + codes[len(actual) :]
    return np.bincount(cells, minlength=size * size).reshape(size, size), classes


# --- from the confusion matrix ------------------------------------------------------------------------------------


def _accuracy(matrix: Matrix) -> float:
    return float(np.trace(matrix) / matrix.sum())


def _f1_by_class(matrix: Matrix) -> list[float]:
    either = matrix.sum(axis=0) + matrix.sum(axis=1)  # 2 TP + FP + FN
    return [float(2 * hits / total) if total else 0.0 for hits, total in zip(matrix.diagonal(), either, strict=True)]


def _macro_f1(matrix: Matrix) -> float:
    """Of a matrix whose last class is "none": the mean over the other classes that labels or predictions have."""
    seen = (matrix.sum(axis=0) + matrix.sum(axis=1))[:-1] > 0
    return float(np.mean(np.array(_f1_by_class(matrix)[:-1])[seen]))


def _balanced_accuracy(matrix: Matrix) -> float:
    """The mean, over the classes that labels have, of the share of a class's examples that were predicted."""
    examples = matrix.sum(axis=1)
    return float(np.mean(matrix.diagonal()[examples > 0] / examples[examples > 0]))


def _matthews(matrix: Matrix) -> float:
    # Python's integers: differences of products of counts, exact however many examples there are.
    actual, predicted = matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist()
    total, hits = sum(actual), int(np.trace(matrix))
    covariance = hits * total - sum(a * p for a, p in zip(actual, predicted, strict=True))
    of_actual = total * total - sum(a * a for a in actual)
    of_predicted = total * total - sum(p * p for p in predicted)
    scale = math.sqrt(of_actual) * math.sqrt(of_predicted)
    return max(-1.0, min(1.0, covariance / scale)) if scale else 0.0


def _check_average(average: str) -> None:
    known = get_args(Average)
    if average not in known:
        raise OptionError(
            f"average: {average!r} is not valid, expected one of {', '.join(map(repr, known))}{nearest(average, known)}"
        )


# --- batch by batch -----------------------------------------------------------------------------------------------


class ConfusionMatrix(Accumulator):
    """Metrics that a confusion matrix is enough for.

    Args:
        num_classes: C.

    `update(predictions, labels)` takes as predictions logits `[B, C]` (further columns, which other tasks need, are
    left out; the largest counts), or floating point `[B]`, one logit for two classes (class 1 where it is positive),
    or integers `[B]`, class indices. Labels are class indices `[B]` of any type. A prediction that is no class (a NaN
    logit) is counted as wrong, so that a model that diverged looks no better than it is.

    State: C (C + 1) + 2 integers.

    Raises:
        OptionError: `num_classes` below 2.
    """

    higher_is_better: ClassVar[bool] = True
    _counts: Tensor

    def __init__(self, num_classes: int = 2) -> None:
        if num_classes < 2:
            raise OptionError(f"num_classes: {num_classes} is not valid, expected 2 or more")
        self.num_classes = num_classes
        self.reset()

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        predicted = self._predicted_classes(predictions, labels)
        there = valid_labels(labels)
        classes = labels.where(there, 0).long()
        known = there & (classes == labels) & (classes >= 0) & (classes < self.num_classes)
        missing = len(self._counts) - 2
        index = torch.where(known, classes * (self.num_classes + 1) + predicted, missing + there.long())
        self._counts = self._counts.to(index.device)
        self._counts.index_add_(0, index, torch.ones_like(index))

    def _predicted_classes(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """`[B]`, with C standing for none."""
        none = self.num_classes
        if labels.ndim != 1 or predictions.ndim not in (1, 2) or len(predictions) != len(labels):
            raise MetricError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, "
                f"expected [B, {none}] or [B], and [B]"
            )
        if predictions.ndim == 2:
            if predictions.shape[1] < none:
                raise MetricError(
                    f"predictions: got {predictions.shape[1]} columns, expected a logit for each of {none}"
                )
            logits = predictions.detach()[:, :none]
            return logits.argmax(dim=1).masked_fill(logits.isnan().any(dim=1), none)
        if not predictions.is_floating_point():
            classes = predictions.long()
            return classes.masked_fill((classes < 0) | (classes >= none), none)
        if none != 2:
            raise MetricError(f"predictions: got one logit an example, which tells 2 classes apart, not {none}")
        return (predictions > 0).long().masked_fill(predictions.isnan(), none)

    def compute(self) -> dict[str, float]:
        counts = self._counts.cpu().numpy()
        if counts[-1] > 0:
            expected = f"classes 0 to {self.num_classes - 1}, NaN or -100 where missing"
            raise MetricError(f"labels: {counts[-1]} are not valid, expected {expected}")
        matrix = np.zeros((self.num_classes + 1, self.num_classes + 1), dtype=np.int64)
        matrix[:-1] = counts[:-2].reshape(self.num_classes, -1)
        return self._metrics(matrix) if matrix.any() else {}

    @abstractmethod
    def _metrics(self, matrix: Matrix) -> dict[str, float]:
        """From a matrix `[C + 1, C + 1]` that holds an example; the last class is "none", and no label has it."""

    def reset(self) -> None:
        # The matrix with a last column for predictions that are no class, row by row; then missing and invalid labels.
        self._counts = torch.zeros(self.num_classes * (self.num_classes + 1) + 2, dtype=torch.int64)

    def merge(self, other: ConfusionMatrix) -> None:
        self.check_mergeable(other)
        if other.num_classes != self.num_classes:
            raise MetricError(f"merge: got {other.num_classes} classes, expected {self.num_classes}")
        self._counts += other._counts.to(self._counts.device)


class Accuracy(ConfusionMatrix):
    """`accuracy`."""

    metric_names: tuple[str, ...] = ("accuracy",)

    def _metrics(self, matrix: Matrix) -> dict[str, float]:
        return {"accuracy": _accuracy(matrix)}


class AccuracyAndF1(ConfusionMatrix):
    """`accuracy` and `f1`.

    Args:
        num_classes: C.
        average: of F1, as in `f1_score`.
        pos_label: the class that `binary` is about.

    Raises:
        OptionError: a value that does not fit.
    """

    metric_names: tuple[str, ...] = ("accuracy", "f1")

    def __init__(self, num_classes: int = 2, average: Average = "binary", pos_label: int = 1) -> None:
        super().__init__(num_classes)
        _check_average(average)
        if not 0 <= pos_label < num_classes:
            raise OptionError(f"pos_label: {pos_label} is not valid, expected 0 to {num_classes - 1}")
        self.average = average
        self.pos_label = pos_label

    def _metrics(self, matrix: Matrix) -> dict[str, float]:
        scores = _f1_by_class(matrix)
        if self.average == "binary":
            return {"accuracy": _accuracy(matrix), "f1": scores[self.pos_label]}
        return {"accuracy": _accuracy(matrix), "f1": _macro_f1(matrix)}


class MatthewsCorrelation(ConfusionMatrix):
    """`matthews_correlation`."""

    metric_names: tuple[str, ...] = ("matthews_correlation",)

    def _metrics(self, matrix: Matrix) -> dict[str, float]:
        return {"matthews_correlation": _matthews(matrix)}


#: What `ClassMetrics` computes, from a matrix `[C + 1, C + 1]` whose last class is "none".
CLASS_METRICS: Mapping[str, Callable[[Matrix], float]] = {
    "accuracy": _accuracy,
    "f1": lambda matrix: _f1_by_class(matrix)[1],
    "f1_macro": _macro_f1,
    "balanced_accuracy": _balanced_accuracy,
    "matthews": _matthews,
}


class ClassMetrics(ConfusionMatrix):
    """Some of `accuracy`, `f1` (of class 1), `f1_macro`, `balanced_accuracy` and `matthews` of one task.

    `f1_macro` is the mean over the classes that labels or predictions have; `balanced_accuracy` the mean recall over
    those that labels have.

    Args:
        num_classes: C.
        metrics: which, in the order of the result; keys of `CLASS_METRICS`.

    Raises:
        OptionError: `num_classes` below 2, or an unknown metric.
    """

    def __init__(self, num_classes: int, metrics: Sequence[str]) -> None:
        super().__init__(num_classes)
        for name in metrics:
            if name not in CLASS_METRICS:
                raise unknown_name("metrics", name, CLASS_METRICS)
        self.metric_names = tuple(metrics)

    def _metrics(self, matrix: Matrix) -> dict[str, float]:
        return {name: CLASS_METRICS[name](matrix) for name in self.metric_names}

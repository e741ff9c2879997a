"""Accuracy, F1 and Matthews against scikit-learn, all at once and batch by batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.metrics.base import Accumulator
from hf_bilb.metrics.classification import (
    Accuracy,
    AccuracyAndF1,
    MatthewsCorrelation,
    accuracy,
    f1_score,
    matthews_correlation,
)

sklearn = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")


def drawn(num_classes: int, missing: float = 0.3, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[N, C]` and labels `[N]` that agree more often than not, of unequally frequent classes."""
    generator = np.random.default_rng(num_classes)
    frequency = generator.dirichlet(np.full(num_classes, 2.0))
    labels = generator.choice(num_classes, size=rows, p=frequency).astype(np.float32)
    logits = generator.normal(size=(rows, num_classes)) + 1.2 * np.eye(num_classes)[labels.astype(int)]
    labels[generator.random(rows) < missing] = np.nan
    return logits.astype(np.float32), labels


def expected(predicted: np.ndarray, labels: np.ndarray, average: str = "binary") -> dict[str, float]:
    there = ~np.isnan(labels)
    actual, predicted = labels[there].astype(int), predicted[there]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns where it settles 0 / 0
        return {
            "accuracy": sklearn.accuracy_score(actual, predicted),
            "f1": sklearn.f1_score(actual, predicted, average=average),
            "matthews_correlation": sklearn.matthews_corrcoef(actual, predicted),
        }


def in_batches(accumulator: Accumulator, predictions: Tensor, labels: Tensor, size: int) -> dict[str, float]:
    for start in range(0, len(labels), size):
        accumulator.update(predictions[start : start + size], labels[start : start + size])
    return accumulator.compute()


# --- the functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, list], ids=["numpy", "torch", "list"])
def test_functions_equal_scikit_learn(num_classes: int, convert: Callable[[np.ndarray], Any]) -> None:
    logits, labels = drawn(num_classes)
    predicted = logits.argmax(axis=1)
    reference = expected(predicted, labels, "binary" if num_classes == 2 else "macro")
    given, wanted = convert(predicted), convert(labels)
    assert accuracy(given, wanted) == pytest.approx(reference["accuracy"], rel=1e-12)
    assert matthews_correlation(given, wanted) == pytest.approx(reference["matthews_correlation"], rel=1e-12)
    measured = f1_score(given, wanted, "binary" if num_classes == 2 else "macro")
    assert measured == pytest.approx(reference["f1"], rel=1e-12)


def test_the_positive_class_is_a_choice() -> None:
    logits, labels = drawn(2, missing=0.0)
    predicted = logits.argmax(axis=1)
    for positive in (0, 1):
        reference = sklearn.f1_score(labels, predicted, pos_label=positive)
        assert f1_score(predicted, labels, pos_label=positive) == pytest.approx(reference, rel=1e-12)


def test_minus_100_is_a_missing_class_as_it_is_to_the_losses() -> None:
    assert accuracy([1, 0, 0], [1, -100, 1]) == accuracy([1, 0, 0], [1, math.nan, 1]) == 0.5


DEGENERATE = {
    "one class in the labels": ([0, 1, 1, 0], [1, 1, 1, 1]),
    "one class predicted": ([0, 0, 0, 0], [0, 1, 1, 0]),
    "one class in both": ([0, 0], [0, 0]),
    "nothing right": ([1, 1, 0], [0, 0, 1]),
    "a class only predicted": ([2, 0, 1], [0, 0, 1]),
    "one example": ([1], [1]),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_input_gives_what_scikit_learn_gives(name: str) -> None:
    predicted, labels = (np.array(side) for side in DEGENERATE[name])
    reference = expected(predicted, labels.astype(float), "macro")
    assert accuracy(predicted, labels) == reference["accuracy"]
    assert matthews_correlation(predicted, labels) == pytest.approx(reference["matthews_correlation"], abs=1e-15)
    assert f1_score(predicted, labels, "macro") == pytest.approx(reference["f1"], rel=1e-12)
    if max(*predicted, *labels) < 2:
        assert f1_score(predicted, labels) == expected(predicted, labels.astype(float))["f1"]


def test_without_any_label_there_is_no_number() -> None:
    for function in (accuracy, f1_score, matthews_correlation):
        assert math.isnan(function([1, 0], [math.nan, math.nan]))
        assert math.isnan(function([], []))


def test_matthews_is_exact_where_products_of_counts_are_beyond_float64() -> None:
    # 3 * 10^8 examples: the covariance is a difference of numbers near 10^17, whose units float64 does not hold.
    accumulator = MatthewsCorrelation()
    counts = {(0, 0): 150_000_013, (0, 1): 149_999_987, (1, 0): 150_000_031, (1, 1): 150_000_011}
    for (actual, predicted), count in counts.items():
        accumulator._counts[actual * 3 + predicted] = count
    a, b, c, d = counts.values()
    covariance = a * d - b * c
    exact = covariance / math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    assert accumulator.compute()["matthews_correlation"] == pytest.approx(exact, rel=1e-12, abs=0)


@pytest.mark.parametrize("value", [0.7, -1.0, math.nan, math.inf])
def test_what_is_no_class_is_an_error_that_says_so(value: float) -> None:
    with pytest.raises(MetricError, match=rf"predictions: {value:g} is not valid, expected class indices 0, 1, \.\.\."):
        accuracy([1.0, value], [0, 1])
    if not math.isnan(value):
        with pytest.raises(MetricError, match=rf"labels: {value:g} is not valid, .* \(NaN or -100 where missing\)"):
            accuracy([0, 1], [1.0, value])


def test_unequal_lengths_and_an_unknown_average_are_errors() -> None:
    with pytest.raises(MetricError, match=r"predictions \(2,\) and labels \(3,\), expected both \[N\]"):
        accuracy([0, 1], [0, 1, 1])
    with pytest.raises(OptionError, match=r"average: 'makro' is not valid, .* \(did you mean \"macro\"\?\)"):
        f1_score([0], [0], "makro")


# --- the accumulators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("size", [1, 7, 400])
def test_batches_equal_the_whole_set(num_classes: int, size: int) -> None:
    logits, labels = drawn(num_classes)
    average = "binary" if num_classes == 2 else "macro"
    reference = expected(logits.argmax(axis=1), labels, average)
    tensors = torch.from_numpy(logits), torch.from_numpy(labels)
    measured = {
        **in_batches(AccuracyAndF1(num_classes, average=average), *tensors, size),
        **in_batches(MatthewsCorrelation(num_classes), *tensors, size),
    }
    assert measured == pytest.approx(reference, rel=1e-12)
    assert in_batches(Accuracy(num_classes), *tensors, size) == {"accuracy": measured["accuracy"]}


def test_one_logit_class_indices_and_columns_of_other_tasks() -> None:
    logits, labels = (torch.from_numpy(array) for array in drawn(2))
    difference = logits[:, 1] - logits[:, 0]
    more = torch.cat([logits, torch.full((400, 1), 99.0), torch.full((400, 1), -torch.inf)], dim=1)
    results = [
        in_batches(MatthewsCorrelation(), given, labels, 50)
        for given in (logits, difference, logits.argmax(dim=1), more, logits.double(), (difference > 0))
    ]
    assert all(result == results[0] for result in results)
    as_integers = labels.nan_to_num(-100).long()
    assert in_batches(MatthewsCorrelation(), logits, as_integers, 50) == results[0]


def test_macro_f1_is_over_the_classes_that_appear() -> None:
    predicted, labels = np.array([0, 1, 1, 3]), np.array([0, 0, 1, 1])
    accumulator = AccuracyAndF1(num_classes=6, average="macro")
    accumulator.update(torch.from_numpy(predicted), torch.from_numpy(labels))
    assert accumulator.compute()["f1"] == pytest.approx(sklearn.f1_score(labels, predicted, average="macro"), rel=1e-12)


def test_a_class_that_is_neither_there_nor_predicted_has_f1_zero() -> None:
    accumulator = AccuracyAndF1()
    accumulator.update(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.zeros(2))
    assert accumulator.compute() == {"accuracy": 1.0, "f1": sklearn.f1_score([0, 0], [0, 0], zero_division=0.0)}


def test_a_diverged_model_is_wrong_everywhere() -> None:
    # argmax takes NaN for the largest: class 0, and an accuracy that looks like a result.
    labels = torch.tensor([0.0, 0.0, 0.0, 1.0])
    for logits in (torch.full((4, 2), torch.nan), torch.full((4,), torch.nan), torch.tensor([5, -1, 2, 7])):
        metrics = [accumulator() for accumulator in (AccuracyAndF1, MatthewsCorrelation)]
        for accumulator in metrics:
            accumulator.update(logits, labels)
        assert metrics[0].compute() == {"accuracy": 0.0, "f1": 0.0}
        assert metrics[1].compute() == {"matthews_correlation": 0.0}


def test_no_label_no_entry_and_reset_forgets() -> None:
    accumulator = AccuracyAndF1()
    assert accumulator.compute() == {}
    accumulator.update(torch.zeros(3, 2), torch.full((3,), torch.nan))
    assert accumulator.compute() == {}
    accumulator.update(torch.zeros(3, 2), torch.ones(3))
    assert accumulator.compute() == {"accuracy": 0.0, "f1": 0.0}
    accumulator.reset()
    assert accumulator.compute() == {}
    accumulator.update(torch.eye(2), torch.tensor([0.0, 1.0]))
    assert accumulator.compute() == {"accuracy": 1.0, "f1": 1.0}


def test_two_accumulators_merge() -> None:
    logits, labels = (torch.from_numpy(array) for array in drawn(3))
    whole, first, second = (MatthewsCorrelation(3) for _ in range(3))
    whole.update(logits, labels)
    first.update(logits[:100], labels[:100])
    second.update(logits[100:], labels[100:])
    first.merge(second)
    assert first.compute() == whole.compute()
    with pytest.raises(MetricError, match="merge: got 2 classes, expected 3"):
        first.merge(MatthewsCorrelation(2))
    with pytest.raises(MetricError, match="merge: got Accuracy, expected MatthewsCorrelation"):
        first.merge(Accuracy(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [[0.0, 2.0], [0.0, 0.5], [-1.0, 1.0], [math.inf, 0.0]])
def test_a_label_that_is_no_class_is_reported_with_the_result(labels: list[float]) -> None:
    accumulator = Accuracy()
    accumulator.update(torch.zeros(2, 2), torch.tensor(labels))
    with pytest.raises(
        MetricError, match="labels: 1 are not valid, expected classes 0 to 1, NaN or -100 where missing"
    ):
        accumulator.compute()


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(3), r"predictions \(4, 2\) and labels \(3,\), expected \[B, 3\] or \[B\]"),
        (torch.zeros(4, 3), torch.zeros(4, 1), r"labels \(4, 1\)"),
        (torch.zeros(4, 2), torch.zeros(4), "got 2 columns, expected a logit for each of 3"),
        (torch.zeros(4), torch.zeros(4), "got one logit an example, which tells 2 classes apart, not 3"),
    ],
)
def test_shapes_that_do_not_fit(predictions: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        Accuracy(3).update(predictions, labels)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(OptionError, match="num_classes: 1 is not valid, expected 2 or more"):
        Accuracy(1)
    with pytest.raises(OptionError, match="pos_label: 2 is not valid, expected 0 to 1"):
        AccuracyAndF1(pos_label=2)
    with pytest.raises(OptionError, match="average: 'micro' is not valid"):
        AccuracyAndF1(average="micro")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(8, 4), (8,)])
def test_update_never_looks_at_a_value(shape: tuple[int, ...]) -> None:
    # Tensors without values: whatever would wait for the device fails on them.
    accumulator = AccuracyAndF1()
    accumulator.update(torch.zeros(shape, device="meta"), torch.zeros(8, device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        accumulator.compute()

"""Metrics against scikit-learn, task by task."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_bilb.errors import MetricError
from hf_bilb.metrics.regression import MeanAbsoluteError, mean_absolute_error

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")


def _predictions_and_labels(missing: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    predictions, labels = generator.normal(size=(2, 500, 4)) * np.array([1.0, 1e-3, 1e6, 10.0])
    labels[generator.random(labels.shape) < missing] = np.nan
    return predictions, labels


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_mean_absolute_error_equals_scikit_learn_on_the_labels_that_are_there(missing: float) -> None:
    predictions, labels = _predictions_and_labels(missing)
    measured = mean_absolute_error(predictions, labels)
    for task in range(4):
        there = ~np.isnan(labels[:, task])
        expected = sklearn_metrics.mean_absolute_error(labels[there, task], predictions[there, task])
        assert measured[task] == pytest.approx(expected, rel=1e-12)


def test_task_without_any_label_has_no_error() -> None:
    predictions, labels = _predictions_and_labels(0.0)
    labels[:, 2] = np.nan
    measured = mean_absolute_error(predictions, labels)
    assert np.isnan(measured[2]) and np.isfinite(measured[[0, 1, 3]]).all()


def test_float32_errors_are_summed_in_float64() -> None:
    # One large error first: in float32 the small ones after it would be lost (1e8 + 1 == 1e8).
    labels = np.zeros((1001, 1), dtype=np.float32)
    predictions = np.ones((1001, 1), dtype=np.float32)
    predictions[0] = 1e8
    assert mean_absolute_error(predictions, labels)[0] == pytest.approx((1e8 + 1000) / 1001, rel=1e-12)


def test_minus_100_is_a_measurement_here_not_a_missing_label() -> None:
    assert mean_absolute_error(np.zeros((2, 1)), np.array([[-100.0], [0.0]]))[0] == 50


def test_different_shapes_are_refused_rather_than_broadcast() -> None:
    with pytest.raises(MetricError, match=r"\(5, 1\).*\(5, 3\)"):
        mean_absolute_error(np.zeros((5, 1)), np.zeros((5, 3)))
    with pytest.raises(MetricError, match=r"\(4,\).*expected both \[N, K\]"):
        mean_absolute_error(np.zeros(4), np.zeros(4))
    with pytest.raises(MetricError, match=r"\(4,\).*\(5,\)"):
        MeanAbsoluteError().update(torch.zeros(4), torch.zeros(5))


def stream(accumulator: MeanAbsoluteError, predictions: np.ndarray, labels: np.ndarray, size: int) -> dict[str, float]:
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        accumulator.update(torch.from_numpy(predictions[rows]), torch.from_numpy(labels[rows]))
    return accumulator.compute()


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_streaming_equals_scikit_learn_on_the_whole_set(batch_size: int) -> None:
    predictions, labels = _predictions_and_labels(0.4)
    for task in range(4):
        there = ~np.isnan(labels[:, task])
        expected = sklearn_metrics.mean_absolute_error(labels[there, task], predictions[there, task])
        found = stream(MeanAbsoluteError(), predictions[:, task], labels[:, task], batch_size)
        assert found == pytest.approx({"mean_absolute_error": expected}, rel=1e-12)


def test_streaming_sums_float32_errors_in_float64() -> None:
    labels = np.zeros(1001, dtype=np.float32)
    predictions = np.ones(1001, dtype=np.float32)
    predictions[0] = 1e8
    found = stream(MeanAbsoluteError(), predictions, labels, 100)
    assert found["mean_absolute_error"] == pytest.approx((1e8 + 1000) / 1001, rel=1e-12)


def test_two_accumulators_merge_and_reset_forgets() -> None:
    predictions, labels = (array[:, 0] for array in _predictions_and_labels(0.4))
    first, second = MeanAbsoluteError(), MeanAbsoluteError()
    stream(first, predictions + 1, labels, 100)
    first.reset()
    assert first.compute() == {}
    stream(first, predictions[:100], labels[:100], 30)
    stream(second, predictions[100:], labels[100:], 30)
    first.merge(second)
    whole = mean_absolute_error(predictions[:, None], labels[:, None])[0]
    assert first.compute()["mean_absolute_error"] == pytest.approx(whole, rel=1e-12)


def test_where_the_label_is_missing_any_prediction_may_stand() -> None:
    accumulator = MeanAbsoluteError()
    accumulator.update(torch.tensor([torch.inf, torch.nan, 1.0]), torch.tensor([torch.nan, torch.nan, 3.0]))
    assert accumulator.compute() == {"mean_absolute_error": 2.0}
    accumulator.update(torch.full((2, 8), torch.nan), torch.full((2,), torch.nan))
    assert accumulator.compute() == {"mean_absolute_error": 2.0}

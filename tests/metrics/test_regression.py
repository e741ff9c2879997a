"""Metrics against scikit-learn, task by task."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
    with pytest.raises(ValueError, match=r"\(5, 1\).*\(5, 3\)"):
        mean_absolute_error(np.zeros((5, 1)), np.zeros((5, 3)))


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_streaming_equals_all_at_once(batch_size: int) -> None:
    predictions, labels = _predictions_and_labels(0.4)
    accumulator = MeanAbsoluteError(num_tasks=4)
    for start in range(0, 500, batch_size):
        rows = slice(start, start + batch_size)
        accumulator.update(torch.from_numpy(predictions[rows]), torch.from_numpy(labels[rows]))
    np.testing.assert_allclose(accumulator.compute(), mean_absolute_error(predictions, labels), rtol=1e-12)


def test_two_accumulators_merge_to_the_error_of_all_rows() -> None:
    predictions, labels = (torch.from_numpy(array) for array in _predictions_and_labels(0.4))
    first, second = MeanAbsoluteError(num_tasks=4), MeanAbsoluteError(num_tasks=4)
    first.update(predictions[:100], labels[:100])
    second.update(predictions[100:], labels[100:])
    first.merge(second)
    np.testing.assert_allclose(first.compute(), mean_absolute_error(predictions.numpy(), labels.numpy()), rtol=1e-12)

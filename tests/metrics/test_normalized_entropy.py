"""Normalised entropy against scikit-learn's log loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_bilb.errors import MetricError
from hf_bilb.metrics.normalized_entropy import NormalizedEntropy, normalized_entropy

sklearn = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")


def drawn() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = (generator.random(400) < 0.2).astype(np.float32)
    logits = (generator.normal(size=400) + labels - 1).astype(np.float32)
    labels[generator.random(400) < 0.3] = np.nan
    return logits, labels


def expected(logits: np.ndarray, labels: np.ndarray) -> float:
    there = ~np.isnan(labels)
    actual, p = labels[there].astype(float), 1 / (1 + np.exp(-logits[there].astype(float)))
    share = np.full(len(actual), actual.mean())
    return sklearn.log_loss(actual, p) / sklearn.log_loss(actual, share)


def test_function_and_batches_equal_scikit_learn() -> None:
    logits, labels = drawn()
    reference = expected(logits, labels)
    assert normalized_entropy(logits, labels) == pytest.approx(reference, rel=1e-12)
    for size in (1, 7, 400):
        accumulator = NormalizedEntropy()
        for start in range(0, 400, size):
            rows = slice(start, start + size)
            accumulator.update(torch.from_numpy(logits[rows]), torch.from_numpy(labels[rows]))
        assert accumulator.compute() == {"normalized_entropy": pytest.approx(reference, rel=1e-12)}


def test_ends() -> None:
    share = math.log(0.25 / 0.75)
    assert normalized_entropy([share] * 4, [0, 1, 0, 0]) == pytest.approx(1.0, rel=1e-14)
    assert normalized_entropy([-800.0, 800.0], [0, 1]) == 0.0
    assert normalized_entropy([800.0, -800.0], [0, 1]) == pytest.approx(800 / math.log(2))  # no log of a rounded 0
    assert math.isnan(normalized_entropy([math.nan, 0.0], [0, 1]))
    for labels in ([1, 1], [0, -100], [math.nan, math.nan]):
        assert math.isnan(normalized_entropy([0.0, 1.0], labels))
        accumulator = NormalizedEntropy()
        accumulator.update(torch.tensor([0.0, 1.0]), torch.tensor(labels))
        assert accumulator.compute() == {}


def test_a_missing_label_hides_its_prediction() -> None:
    accumulator = NormalizedEntropy()
    accumulator.update(torch.tensor([1.0, math.nan, -1.0]), torch.tensor([1, -100, 0]))
    assert accumulator.compute() == {"normalized_entropy": normalized_entropy([1.0, -1.0], [1, 0])}


def test_merge_reset_and_labels_that_are_no_class() -> None:
    logits, labels = (torch.from_numpy(array) for array in drawn())
    whole, first, second = (NormalizedEntropy() for _ in range(3))
    whole.update(logits, labels)
    first.update(logits[:100], labels[:100])
    second.update(logits[100:], labels[100:])
    first.merge(second)
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-12)
    first.reset()
    assert first.compute() == {}
    first.update(torch.zeros(3), torch.tensor([0.0, 1.0, 0.5]))
    with pytest.raises(MetricError, match="labels: 1 are not valid, expected 0 or 1, NaN or -100 where missing"):
        first.compute()
    with pytest.raises(MetricError, match=r"labels: 0\.5 is not valid, expected 0 or 1"):
        normalized_entropy([0.0, 0.0, 0.0], [0.0, 1.0, 0.5])
    NormalizedEntropy().update(torch.zeros(4, device="meta"), torch.zeros(4, device="meta"))  # looks at no value

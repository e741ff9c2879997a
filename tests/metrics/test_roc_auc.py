"""The area under the ROC curve against scikit-learn and all pairs; and several metrics of one binary task together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.metrics.base import Accumulator
from hf_bilb.metrics.classification import AccuracyAndF1
from hf_bilb.metrics.roc_auc import BinaryClassification, RocAuc, roc_auc

sklearn = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")


def drawn(missing: float = 0.2, decimals: int | None = 1, size: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, labels with some missing."""
    generator = np.random.default_rng(0)
    labels = (generator.random(size) < 0.3).astype(np.float32)
    scores = (generator.normal(size=size) + labels).astype(np.float32)
    labels[generator.random(size) < missing] = np.nan
    return (scores if decimals is None else np.round(scores, decimals)), labels


def expected(scores: np.ndarray, labels: np.ndarray) -> float:
    there = ~np.isnan(labels)
    return sklearn.roc_auc_score(labels[there], scores[there].astype(np.float64))


def in_batches(accumulator: Accumulator, predictions: Tensor, labels: Tensor, size: int) -> dict[str, float]:
    for start in range(0, len(labels), size):
        accumulator.update(predictions[start : start + size], labels[start : start + size])
    return accumulator.compute()


# --- the function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, list], ids=["numpy", "torch", "list"])
def test_it_equals_scikit_learn(decimals: int | None, convert: Callable[[np.ndarray], Any]) -> None:
    scores, labels = drawn(decimals=decimals)
    assert roc_auc(convert(scores), convert(labels)) == pytest.approx(expected(scores, labels), rel=1e-12)


def test_it_is_the_share_of_pairs_in_order() -> None:
    scores, labels = drawn(missing=0.0, size=40, decimals=0)
    above = [(p > n) + (p == n) / 2 for p in scores[labels == 1] for n in scores[labels == 0]]
    assert roc_auc(scores, labels) == pytest.approx(np.mean(above), rel=1e-14)


def test_what_rises_with_the_score_has_the_same_area() -> None:
    scores, labels = drawn(decimals=None)
    areas = {roc_auc(values, labels) for values in (scores, 1 / (1 + np.exp(-scores.astype(np.float64))), 7 * scores)}
    assert len(areas) == 1
    assert roc_auc(-scores, labels) == pytest.approx(1 - areas.pop(), rel=1e-12)


def test_ends() -> None:
    assert roc_auc([1.0, 2.0, 3.0], [0, 0, 1]) == 1.0
    assert roc_auc([3.0, 2.0, 1.0], [0, 0, 1]) == 0.0
    assert roc_auc([5.0, 5.0, 5.0], [0, 0, 1]) == 0.5
    assert roc_auc([-math.inf, math.inf], [0, 1]) == 1.0
    for labels in ([1, 1], [0, 0], [math.nan, -100], [1, math.nan]):
        assert math.isnan(roc_auc([1.0, 2.0], labels))
    assert math.isnan(roc_auc([], []))


def test_a_score_that_is_nan_is_the_worst_there_can_be() -> None:
    nan = math.nan
    assert roc_auc([nan, nan, nan], [0, 1, 1]) == 0.0
    # 4 pairs; those of the NaN are lost, wherever it stands, even against an infinite score
    assert roc_auc([nan, 1.0, 0.0, 0.5], [1, 1, 0, 0]) == 0.5
    assert roc_auc([2.0, 1.0, nan, 0.5], [1, 1, 0, 0]) == 0.5
    assert roc_auc([nan, -math.inf], [1, 0]) == 0.0


@pytest.mark.parametrize("value", [2.0, 0.5, -1.0])
def test_a_label_that_is_no_class(value: float) -> None:
    with pytest.raises(MetricError, match=rf"labels: {value:g} is not valid, expected 0 or 1 \(NaN or -100"):
        roc_auc([0.1, 0.2], [1.0, value])
    accumulator = RocAuc()
    accumulator.update(torch.zeros(2), torch.tensor([1.0, value]))
    with pytest.raises(MetricError, match=rf"labels: {value:g} is not valid"):
        accumulator.compute()


# --- the accumulators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 500])
def test_batches_equal_the_whole_set(size: int) -> None:
    scores, labels = drawn()
    found = in_batches(RocAuc(), torch.from_numpy(scores), torch.from_numpy(labels), size)
    assert found == {"roc_auc": pytest.approx(expected(scores, labels), rel=1e-12)}


def test_two_logits_and_columns_of_other_tasks() -> None:
    scores, labels = (torch.from_numpy(array) for array in drawn())
    logits = torch.stack([torch.linspace(-3, 3, 500).round(), torch.zeros(500)], dim=1)
    logits[:, 1] = logits[:, 0] + scores.double().round(decimals=1).float() * 8
    more = torch.cat([logits, torch.full((500, 1), 99.0), torch.full((500, 1), -torch.inf)], dim=1)
    difference = logits[:, 1] - logits[:, 0]
    for given in (logits, more, logits.double()):
        assert in_batches(RocAuc(), given, labels, 64) == in_batches(RocAuc(), difference, labels, 64)
    as_integers = labels.nan_to_num(-100).long()
    assert in_batches(RocAuc(), scores, as_integers, 64) == in_batches(RocAuc(), scores, labels, 64)


def test_one_class_is_left_out_reset_forgets_and_two_merge() -> None:
    scores, labels = (torch.from_numpy(array) for array in drawn())
    accumulator = RocAuc()
    assert accumulator.compute() == {}
    positive = labels == 1
    accumulator.update(scores[positive], labels[positive])
    assert accumulator.compute() == {}
    accumulator.update(scores[~positive], labels[~positive])
    whole = in_batches(RocAuc(), scores, labels, 500)
    assert accumulator.compute() == whole
    accumulator.reset()
    assert accumulator.compute() == {}
    first, second = RocAuc(), RocAuc()
    first.update(scores[:100], labels[:100])
    second.update(scores[100:], labels[100:])
    first.merge(second)
    assert first.compute() == whole
    with pytest.raises(MetricError, match="merge: got AccuracyAndF1, expected RocAuc"):
        first.merge(AccuracyAndF1())  # type: ignore[arg-type]


def test_what_is_kept_is_a_copy() -> None:
    scores, labels = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    accumulator = RocAuc()
    accumulator.update(scores, labels)
    scores.fill_(0.0)
    assert accumulator.compute() == {"roc_auc": 1.0}


@pytest.mark.parametrize("shape", [(4, 1), (4, 2, 2), (3,)])
def test_shapes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(MetricError, match=r"predictions \(.*\) and labels \(4,\), expected \[B\] or \[B, C\]"):
        RocAuc().update(torch.zeros(shape), torch.zeros(4))
    with pytest.raises(MetricError, match=r"labels \(4, 1\)"):
        RocAuc().update(torch.zeros(4, 2), torch.zeros(4, 1))


def test_several_metrics_of_a_task() -> None:
    scores, labels = drawn()
    there = ~np.isnan(labels)
    reference = {
        "accuracy": sklearn.accuracy_score(labels[there], scores[there] > 0),
        "f1": sklearn.f1_score(labels[there], scores[there] > 0),
        "roc_auc": expected(scores, labels),
    }
    tensors = torch.from_numpy(scores), torch.from_numpy(labels)
    found = in_batches(BinaryClassification(), *tensors, 64)
    assert found == pytest.approx(reference, rel=1e-12) and tuple(found) == ("accuracy", "f1", "roc_auc")
    some = BinaryClassification(("roc_auc", "accuracy"))
    assert some.metric_names == ("roc_auc", "accuracy")
    assert list(in_batches(some, *tensors, 64).items()) == [
        ("roc_auc", found["roc_auc"]),
        ("accuracy", found["accuracy"]),
    ]
    other = BinaryClassification(("roc_auc", "accuracy"))
    other.update(torch.tensor([9.0, -9.0]), torch.tensor([0.0, 1.0]))
    some.merge(other)
    assert 0 < some.compute()["roc_auc"] < found["roc_auc"]
    with pytest.raises(MetricError, match="merge: got roc_auc, expected roc_auc, accuracy"):
        some.merge(BinaryClassification(("roc_auc",)))
    some.reset()
    assert some.compute() == {}
    some.update(torch.tensor([1.0, 2.0]), torch.ones(2))  # no negative example: an accuracy, no area
    assert some.compute() == {"accuracy": 1.0}


def test_options_that_do_not_fit() -> None:
    with pytest.raises(OptionError, match=r"metrics: 'roc_auk' is not known \(did you mean \"roc_auc\"\?\)"):
        BinaryClassification(("accuracy", "roc_auk"))
    for wrong in ((), ("f1", "f1")):
        with pytest.raises(OptionError, match=r"metrics: \[.*\] is not valid, expected one or more different names"):
            BinaryClassification(wrong)


@pytest.mark.parametrize("shape", [(8, 2), (8,)])
def test_update_never_looks_at_a_value(shape: tuple[int, ...]) -> None:
    accumulator = BinaryClassification()
    accumulator.update(torch.zeros(shape, device="meta"), torch.zeros(8, device="meta"))

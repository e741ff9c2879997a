"""K binary tasks at once, against scikit-learn, the official CelebA metric code and `TaskMetrics`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from hf_bilb.data.images.celeba import ATTRIBUTES, SINGLE_TASK_F1
from hf_bilb.errors import MetricError, OptionError
from hf_bilb.metrics.multi_label import MultiLabelMetrics
from hf_bilb.metrics.roc_auc import BinaryClassification
from hf_bilb.metrics.trainer_metrics import TaskMetrics

PARITY = np.load(Path(__file__).parents[1] / "parity_data" / "metrics.npz")
NAMES = ("a", "b", "c")


def batch(logits: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(predictions=logits, label_ids=labels)


def made_up(rows: int = 60, missing: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, 3, generator=generator).mul(4).round().div(4)  # with ties
    labels = (logits + torch.randn(rows, 3, generator=generator) > 0.5).float()
    if missing:
        labels[torch.rand(rows, 3, generator=generator) < 0.2] = torch.nan
    return logits, labels


def stream(metrics: MultiLabelMetrics, logits: torch.Tensor, labels: torch.Tensor, size: int = 16) -> dict[str, float]:
    *first, last = [batch(*parts) for parts in zip(logits.split(size), labels.split(size), strict=True)]
    for part in first:
        assert metrics(part, compute_result=False) == {}
    return metrics(last)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [False, True])
def test_values_are_scikit_learn_s(missing: bool) -> None:
    logits, labels = made_up(missing=missing)
    found = stream(MultiLabelMetrics(NAMES, [0.5, 0.6, 0.7]), logits, labels)
    f1, accuracy, area = [], [], []
    for k in range(3):
        there = ~labels[:, k].isnan()
        scores, actual = logits[there, k].numpy(), labels[there, k].numpy()
        f1.append(f1_score(actual, scores > 0))
        accuracy.append(accuracy_score(actual, scores > 0))
        area.append(roc_auc_score(actual, scores))
    expected = dict(zip(("a_f1", "b_f1", "c_f1"), f1, strict=True))
    expected |= {"mean_f1": np.mean(f1), "mean_accuracy": np.mean(accuracy), "mean_roc_auc": np.mean(area)}
    expected["delta_m"] = 100 * np.mean([1 - a / b for a, b in zip(f1, (0.5, 0.6, 0.7), strict=True)])
    assert list(found) == list(expected) == list(MultiLabelMetrics(NAMES, [0.5, 0.6, 0.7]).keys)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-12)


def test_f1_is_that_of_the_official_code() -> None:
    probabilities, labels = PARITY["celeba_prob"][..., 0], PARITY["celeba_label"][..., 0]  # [batches, tasks, rows]
    logits = np.log(probabilities) - np.log1p(-probabilities)
    metrics = MultiLabelMetrics(ATTRIBUTES)
    for part in range(len(logits)):
        last = part == len(logits) - 1
        found = metrics(batch(torch.from_numpy(logits[part].T), torch.from_numpy(labels[part].T)), compute_result=last)
    ours = [found[f"{name}_f1"] for name in ATTRIBUTES]
    np.testing.assert_allclose(ours, PARITY["celeba_f1"], atol=1e-7)  # the official one adds 1e-8 to denominators


def test_the_base_of_delta_m_is_that_of_the_official_code() -> None:
    np.testing.assert_array_equal(list(SINGLE_TASK_F1.values()), PARITY["celeba_base"])
    # Through the class: labels and predictions whose F1 is known.
    labels = torch.ones(4, 40)
    logits = torch.ones(4, 40)
    logits[:2, :20] = -1  # recall 1/2, precision 1: F1 2/3
    found = MultiLabelMetrics(ATTRIBUTES, list(SINGLE_TASK_F1.values()))(batch(logits, labels))
    f1 = np.array([2 / 3] * 20 + [1.0] * 20)
    assert found["delta_m"] == pytest.approx(np.mean((PARITY["celeba_base"] - f1) / PARITY["celeba_base"]) * 100)


def test_values_are_those_of_task_metrics() -> None:
    logits, labels = made_up()
    one_by_one = TaskMetrics({name: BinaryClassification() for name in NAMES}, NAMES, "mean_roc_auc", "roc_auc")
    expected, found = one_by_one(batch(logits, labels)), MultiLabelMetrics(NAMES)(batch(logits, labels))
    for key in ("a_f1", "b_f1", "c_f1", "mean_roc_auc"):
        assert found[key] == pytest.approx(expected[key], rel=1e-12)


# --- batches and state --------------------------------------------------------------------------------------------


def test_the_cut_into_batches_the_type_and_merging_change_nothing() -> None:
    logits, labels = made_up()
    expected = MultiLabelMetrics(NAMES)(batch(logits, labels))
    for size in (1, 7, 60):
        assert stream(MultiLabelMetrics(NAMES), logits, labels, size) == expected
    as_arrays = SimpleNamespace(predictions=logits.numpy(), label_ids=labels.nan_to_num(-100).numpy())
    assert MultiLabelMetrics(NAMES)(as_arrays) == expected
    first, second = MultiLabelMetrics(NAMES), MultiLabelMetrics(NAMES)
    second(batch(logits[:20], labels[:20]), compute_result=False)
    first(batch(logits[20:50], labels[20:50]), compute_result=False)
    first.merge(second)
    assert first(batch(logits[50:], labels[50:])) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(MetricError, match="merge: got the tasks"):
        first.merge(MultiLabelMetrics(("a", "b")))


def test_an_evaluation_ends_with_its_last_batch_or_an_error() -> None:
    logits, labels = made_up()
    metrics = MultiLabelMetrics(NAMES)
    expected = metrics(batch(logits, labels))
    assert metrics(batch(logits, labels)) == expected
    metrics(batch(-logits, labels), compute_result=False)
    with pytest.raises(MetricError):
        metrics(batch(logits[:, :2], labels))
    assert metrics(batch(logits, labels)) == expected
    metrics(batch(-logits, labels), compute_result=False)
    metrics.reset()
    assert metrics(batch(logits, labels)) == expected


# --- odd cases ----------------------------------------------------------------------------------------------------


def test_a_task_without_labels_and_one_with_one_class() -> None:
    logits, labels = made_up(missing=False)
    labels[:, 0] = torch.nan
    labels[:, 1] = 0
    found = MultiLabelMetrics(NAMES, [0.5, 0.5, 0.5])(batch(logits, labels))
    assert list(found) == ["b_f1", "c_f1", "mean_f1", "mean_accuracy", "mean_roc_auc"]
    assert found["b_f1"] == 0 and found["mean_f1"] == found["c_f1"] / 2
    assert found["mean_roc_auc"] == pytest.approx(roc_auc_score(labels[:, 2], logits[:, 2]))


def test_predictions_that_are_no_numbers_count_as_wrong() -> None:
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = MultiLabelMetrics(("a", "b"))(batch(torch.full((2, 2), torch.nan), labels))
    assert found == {"a_f1": 0, "b_f1": 0, "mean_f1": 0, "mean_accuracy": 0, "mean_roc_auc": 0}


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((4, 2), (4, 3), r"^predictions \(4, 2\) and labels \(4, 3\), expected both \[B, 3\]$"),
        ((4, 2), (4, 2), r"^predictions \(4, 2\) and labels \(4, 2\), expected both \[B, 3\]$"),
        ((4,), (4,), r"expected both \[B, 3\]$"),
    ],
)
def test_shapes_that_do_not_fit(logits: tuple[int, ...], labels: tuple[int, ...], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        MultiLabelMetrics(NAMES)(batch(torch.zeros(logits), torch.zeros(labels)))


def test_a_label_that_is_none_is_named_with_its_task() -> None:
    logits, labels = made_up(missing=False)
    labels[3, 1] = 2
    with pytest.raises(MetricError, match=r"^task 'b': labels: 2 is not valid, expected 0 or 1"):
        MultiLabelMetrics(NAMES)(batch(logits, labels))
    with pytest.raises(MetricError, match=r"^predictions: got list, expected a tensor or an array$"):
        MultiLabelMetrics(NAMES)(SimpleNamespace(predictions=[1], label_ids=labels))


def test_a_base_that_does_not_fit() -> None:
    with pytest.raises(OptionError, match=r"^single_task_f1: 2 numbers for 3 tasks$"):
        MultiLabelMetrics(NAMES, [0.5, 0.5])
    with pytest.raises(OptionError, match=r"^single_task_f1: 0 for 'b' is not valid, expected a number above 0$"):
        MultiLabelMetrics(NAMES, [0.5, 0, 0.5])

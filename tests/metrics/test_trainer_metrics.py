"""`TaskMetrics` sends rows or columns to their tasks, names what comes out, and starts every evaluation afresh."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.metrics.base import Accumulator
from hf_bilb.metrics.classification import Accuracy, AccuracyAndF1, MatthewsCorrelation
from hf_bilb.metrics.correlation import Pearson, PearsonSpearman
from hf_bilb.metrics.regression import MeanAbsoluteError
from hf_bilb.metrics.roc_auc import BinaryClassification
from hf_bilb.metrics.trainer_metrics import TaskMetrics

sklearn = pytest.importorskip("sklearn.metrics", reason="the references are scikit-learn and scipy")
stats = pytest.importorskip("scipy.stats", reason="the references are scikit-learn and scipy")

NAMES = ("cola", "mnli", "mrpc", "stsb")
KEYS = ("cola_matthews_correlation", "mnli_accuracy", "mrpc_accuracy", "mrpc_f1", "stsb_pearson", "stsb_spearman")


@dataclass
class Prediction:
    """The two fields of `transformers.EvalPrediction`, which takes seconds to import."""

    predictions: Any
    label_ids: Any


def glue() -> TaskMetrics:
    accumulators = {
        "stsb": PearsonSpearman(),  # in another order than the ids
        "cola": MatthewsCorrelation(),
        "mnli": Accuracy(num_classes=3),
        "mrpc": AccuracyAndF1(),
    }
    return TaskMetrics(accumulators, NAMES, mean_name="glue_score")


@dataclass
class Mixture:
    """One task per row: logits `[N, 3]` with -inf where a row's task has no such column, labels and ids `[N]`."""

    logits: Tensor
    labels: Tensor
    task_ids: Tensor

    def batches(self, size: int) -> list[Prediction]:
        starts = range(0, len(self.labels), size)
        return [
            Prediction(self.logits[i : i + size], (self.labels[i : i + size], self.task_ids[i : i + size]))
            for i in starts
        ]

    def expected(self) -> dict[str, float]:
        """Task by task with scikit-learn and scipy."""
        found: dict[str, float] = {}
        for index, name in enumerate(NAMES):
            rows = (self.task_ids == index) & ~self.labels.isnan()
            logits, labels = self.logits[rows].numpy(), self.labels[rows].numpy()
            classes = logits[:, : 3 if name == "mnli" else 2].argmax(axis=1)
            if not len(labels):
                continue
            if name == "cola":
                found["cola_matthews_correlation"] = sklearn.matthews_corrcoef(labels, classes)
            elif name == "stsb":
                found["stsb_pearson"] = stats.pearsonr(logits[:, 0].astype(float), labels.astype(float)).statistic
                found["stsb_spearman"] = stats.spearmanr(logits[:, 0], labels).statistic
            else:
                found[f"{name}_accuracy"] = sklearn.accuracy_score(labels, classes)
            if name == "mrpc":
                found["mrpc_f1"] = sklearn.f1_score(labels, classes)
        return found


def mixture(rows: int = 300, missing: float = 0.2) -> Mixture:
    generator = torch.Generator().manual_seed(0)
    task_ids = torch.randint(0, 4, (rows,), generator=generator)
    columns = torch.tensor([2, 3, 2, 1])[task_ids]
    logits = torch.randn(rows, 3, generator=generator)
    labels = (torch.rand(rows, generator=generator) * columns).floor()
    labels = torch.where(task_ids == 3, logits[:, 0] + torch.randn(rows, generator=generator), labels)
    logits = logits.masked_fill(torch.arange(3) >= columns.unsqueeze(1), -torch.inf)
    labels[torch.rand(rows, generator=generator) < missing] = torch.nan
    return Mixture(logits, labels.float(), task_ids)


def evaluate(metrics: TaskMetrics, batches: list[Prediction]) -> dict[str, float]:
    for batch in batches[:-1]:
        assert metrics(batch, compute_result=False) == {}
    return metrics(batches[-1], compute_result=True)


@pytest.mark.parametrize("size", [1, 7, 64, 300])
def test_one_task_per_row(size: int) -> None:
    data = mixture()
    found = evaluate(glue(), data.batches(size))
    score = found.pop("glue_score")
    assert found == pytest.approx(data.expected(), rel=1e-10)
    assert tuple(found) == KEYS and glue().keys == (*KEYS, "glue_score")
    cola, mnli, accuracy, f1, pearson, spearman = found.values()
    assert score == pytest.approx((cola + mnli + (accuracy + f1) / 2 + (pearson + spearman) / 2) / 4, rel=1e-12)


def test_a_task_without_labels_has_no_key_and_no_part_in_the_mean() -> None:
    data = mixture()
    data.labels[data.task_ids == 2] = torch.nan
    data.task_ids[data.task_ids == 1] = 0
    data.labels[data.labels == 2] = 0
    found = evaluate(glue(), data.batches(32))
    assert found.keys() == {"cola_matthews_correlation", "stsb_pearson", "stsb_spearman", "glue_score"}
    expected = (found["cola_matthews_correlation"] + (found["stsb_pearson"] + found["stsb_spearman"]) / 2) / 2
    assert found["glue_score"] == pytest.approx(expected, rel=1e-12)
    data.labels[:] = torch.nan
    assert evaluate(glue(), data.batches(32)) == {}


def test_one_call_with_numpy_arrays_and_further_outputs_of_the_model() -> None:
    data = mixture()
    arrays = Prediction((data.logits.numpy(), np.zeros((300, 9))), (data.labels.numpy(), data.task_ids.numpy()))
    once = glue()(arrays)  # as without batch_eval_metrics
    assert once == pytest.approx(evaluate(glue(), data.batches(20)), rel=1e-10)


def test_every_task_per_row() -> None:
    generator = np.random.default_rng(0)
    predictions = generator.normal(size=(200, 3))
    labels = np.stack([predictions[:, 0] + generator.normal(size=200) > 0, *generator.normal(size=(2, 200))], axis=1)
    labels[generator.random(labels.shape) < 0.4] = np.nan
    metrics = TaskMetrics(
        {"smiling": AccuracyAndF1(), "torque": MeanAbsoluteError(), "angle": PearsonSpearman()},
        ["smiling", "torque", "angle"],
    )
    batches = [
        Prediction(torch.from_numpy(predictions[i : i + 9]), torch.from_numpy(labels[i : i + 9]))
        for i in range(0, 200, 9)
    ]
    there = [~np.isnan(labels[:, k]) for k in range(3)]
    first, second, third = ((predictions[rows, k], labels[rows, k]) for k, rows in enumerate(there))
    expected = {
        "smiling_accuracy": sklearn.accuracy_score(first[1], first[0] > 0),
        "smiling_f1": sklearn.f1_score(first[1], first[0] > 0),
        "torque_mean_absolute_error": sklearn.mean_absolute_error(second[1], second[0]),
        "angle_pearson": stats.pearsonr(*third).statistic,
        "angle_spearman": stats.spearmanr(*third).statistic,
    }
    assert evaluate(metrics, batches) == pytest.approx(expected, rel=1e-10)


def test_one_tensor_a_task_with_a_column_of_labels_each() -> None:
    # The same mixture, laid out as models with tasks of different types do: the label of a row is in its task's column.
    data = mixture()
    generator = torch.Generator().manual_seed(7)
    own = torch.nn.functional.one_hot(data.task_ids, 4).bool()
    labels = data.labels[:, None].where(own, torch.nan)
    outputs = []
    for index, size in enumerate((2, 3, 2, 1)):
        others = torch.randn(300, size, generator=generator)  # what is said of rows that have no label does not count
        outputs.append(torch.where(own[:, index, None], data.logits[:, :size], others))
    batches = [Prediction(tuple(part[i : i + 50] for part in outputs), labels[i : i + 50]) for i in range(0, 300, 50)]
    found = evaluate(glue(), batches)
    assert found.pop("glue_score") is not None
    assert found == pytest.approx(data.expected(), rel=1e-10)
    arrays = Prediction(tuple(part.numpy() for part in outputs), labels.numpy())
    assert glue()(arrays) == pytest.approx(evaluate(glue(), batches), rel=1e-10)


def test_a_single_task_needs_no_task_ids() -> None:
    logits, labels = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]), torch.tensor([2, 1])
    metrics = TaskMetrics({"mnli": Accuracy(3)}, ["mnli"])
    assert metrics(Prediction(logits, labels)) == {"mnli_accuracy": 0.5}
    assert metrics(Prediction(logits.argmax(1).unsqueeze(1), labels.unsqueeze(1))) == {"mnli_accuracy": 0.5}


def test_integer_labels_and_narrow_predictions() -> None:
    data = mixture(missing=0.0)
    keep = data.task_ids != 3
    logits, labels, task_ids = data.logits[keep], data.labels[keep], data.task_ids[keep]
    exact = glue()(Prediction(logits, (labels, task_ids)))
    assert glue()(Prediction(logits, (labels.long(), task_ids.int()))) == exact
    rounded = glue()(Prediction(logits.to(torch.bfloat16), (labels, task_ids)))
    assert rounded == glue()(Prediction(logits.to(torch.bfloat16).float(), (labels, task_ids)))


# --- state --------------------------------------------------------------------------------------------------------


def test_every_evaluation_starts_afresh() -> None:
    data, metrics = mixture(), glue()
    first = evaluate(metrics, data.batches(50))
    assert evaluate(metrics, data.batches(50)) == first
    metrics(data.batches(50)[0], compute_result=False)  # an evaluation that died here
    metrics.reset()
    assert evaluate(metrics, data.batches(50)) == first


def test_an_error_in_a_batch_leaves_nothing_behind() -> None:
    data, metrics = mixture(), glue()
    first = evaluate(metrics, data.batches(50))
    metrics(data.batches(50)[0], compute_result=False)
    with pytest.raises(MetricError):
        metrics(Prediction(data.logits[:, :1], (data.labels, data.task_ids)), compute_result=False)
    assert evaluate(metrics, data.batches(50)) == first
    with pytest.raises(MetricError, match="task_ids: 4 is not valid"):
        metrics(Prediction(data.logits, (data.labels, data.task_ids + 1)))
    assert evaluate(metrics, data.batches(50)) == first


def test_what_is_kept_does_not_grow_with_the_set() -> None:
    data = mixture(rows=600)
    metrics = TaskMetrics({name: AccuracyAndF1(3) for name in NAMES[:3]} | {"stsb": Pearson()}, NAMES)
    sizes = []
    for batch in data.batches(20):
        metrics(batch, compute_result=False)
        sizes.append(len(pickle.dumps(metrics)))
    assert len(sizes) == 30 and sizes[0] == sizes[-1]


def test_it_can_be_pickled() -> None:
    data, metrics = mixture(), glue()
    metrics(data.batches(100)[0], compute_result=False)
    copy = pickle.loads(pickle.dumps(metrics))
    assert copy(data.batches(100)[1]) == metrics(data.batches(100)[1])


def test_nothing_waits_for_the_device_before_the_result() -> None:
    metrics = glue()
    ids = torch.zeros(8, dtype=torch.int64, device="meta")
    batch = Prediction(torch.zeros(8, 3, device="meta"), (torch.zeros(8, device="meta"), ids))
    for _ in range(2):
        assert metrics(batch, compute_result=False) == {}


# --- what does not fit --------------------------------------------------------------------------------------------

ROWS = torch.zeros(4, 3)
LABELS = torch.zeros(4)
IDS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("predictions", "label_ids", "message"),
    [
        (ROWS, (LABELS, IDS - 1), "task_ids: -1 is not valid, expected 0 to 3"),
        (ROWS, (LABELS, IDS + 7), "task_ids: 10 is not valid, expected 0 to 3"),
        (ROWS, (LABELS + 2, IDS), "task 'cola': labels: 1 are not valid, expected classes 0 to 1"),
        (ROWS[:, :1], (LABELS, IDS), "task 'cola': predictions: got 1 columns, expected a logit for each of 2"),
        (ROWS, (IDS, LABELS), r'got torch.int64 \(4,\) and torch.float32 \(4,\), expected .*\["labels", "task_ids"\]'),
        (ROWS, (LABELS, IDS, IDS), r"label_ids: got 3 entries, expected \(labels \[B\], task_ids \[B\]\)"),
        (ROWS, (LABELS[:3], IDS[:3]), r"predictions \(4, 3\), labels \(3,\) and task_ids \(3,\)"),
        (ROWS, (ROWS, IDS), r"got torch.float32 \(4, 3\) and torch.int64 \(4,\)"),
        (
            ROWS,
            LABELS,
            r"predictions \(4, 3\) and labels \(4,\), expected both \[B, 4\]; or labels \[B\] with task_ids",
        ),
        (ROWS, ROWS, r"predictions \(4, 3\) and labels \(4, 3\), expected both \[B, 4\]"),
        ([ROWS], (LABELS, IDS), "predictions: got list, expected a tensor or an array"),
        (ROWS, None, "label_ids: got NoneType, expected a tensor or an array"),
    ],
)
def test_batches_that_do_not_fit_are_one_clear_line(predictions: Any, label_ids: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message) as raised:
        glue()(Prediction(predictions, label_ids))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", [-3, 4])
def test_a_task_id_of_an_earlier_batch_is_found_too(wrong: int) -> None:
    metrics = glue()
    metrics(Prediction(ROWS[:1], (LABELS[:1], torch.tensor([wrong]))), compute_result=False)
    metrics(Prediction(ROWS, (LABELS, IDS)), compute_result=False)
    with pytest.raises(MetricError, match=f"task_ids: {wrong} is not valid, expected 0 to 3"):
        metrics(Prediction(ROWS, (LABELS, IDS)))


def pair() -> dict[str, Accumulator]:
    return {"a": Accuracy(), "b": Accuracy()}


SHARED = Accuracy()


@pytest.mark.parametrize(
    ("accumulators", "names", "mean", "message"),
    [
        ({**pair(), "colla": Accuracy()}, ["a", "b", "cola"], None, "accumulators: 'colla' is no task .*mean \"cola\""),
        (pair(), ["a", "b", "c"], None, "accumulators: task 'c' has none"),
        ({"a": SHARED, "b": SHARED}, ["a", "b"], None, "accumulators: 'a' and 'b' share one"),
        (
            {"a": Accuracy(), "b": MeanAbsoluteError()},
            ["a", "b"],
            "score",
            "'score' would be a mean of errors and scores",
        ),
        (pair(), ["a", "b"], "a_accuracy", "mean_name: 'a_accuracy' is not valid"),
        (pair(), ["a", "b"], "", "mean_name: '' is not valid"),
        (pair(), ["a", "a"], None, "task_names: 'a' stands twice"),
        ({}, [], None, "task_names: is empty"),
    ],
)
def test_tasks_that_do_not_fit(accumulators: Any, names: list[str], mean: str | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TaskMetrics(accumulators, names, mean)


def test_two_tasks_with_the_same_key() -> None:
    class Odd(Accuracy):
        metric_names = ("b_accuracy",)

    with pytest.raises(OptionError, match="'a_b' and 'a' would both have the metric 'a_b_accuracy'"):
        TaskMetrics({"a": Odd(), "a_b": Accuracy()}, ["a", "a_b"])


def test_a_mean_of_errors_is_fine() -> None:
    metrics = TaskMetrics({"x": MeanAbsoluteError(), "y": MeanAbsoluteError()}, ["x", "y"], "mean_error")
    found = metrics(Prediction(torch.zeros(2, 2), torch.tensor([[1.0, 4.0], [3.0, math.nan]])))
    assert found == {"x_mean_absolute_error": 2.0, "y_mean_absolute_error": 4.0, "mean_error": 3.0}


# --- means and Delta_m over columns -------------------------------------------------------------------------------


def binary_columns() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = (torch.rand(200, 3, generator=generator) < 0.4).float()
    logits = torch.randn(200, 3, generator=generator) + labels
    labels[torch.rand(200, 3, generator=generator) < 0.2] = torch.nan
    return logits, labels


BINARY_NAMES = ("smile", "hat", "tie")


def binary(**options: Any) -> TaskMetrics:
    return TaskMetrics(
        {name: BinaryClassification(("f1", "roc_auc")) for name in BINARY_NAMES}, BINARY_NAMES, **options
    )


def test_mean_of_one_metric_and_delta_m_of_another() -> None:
    logits, labels = binary_columns()
    base = {f"{name}_f1": value for name, value in zip(BINARY_NAMES, (0.5, 0.6, 0.7), strict=True)}
    metrics = binary(mean_name="mean_roc_auc", mean_of="roc_auc", delta_m_base=base)
    batches = [Prediction(logits[i : i + 30], labels[i : i + 30]) for i in range(0, 200, 30)]
    found = evaluate(metrics, batches)
    assert tuple(found) == metrics.keys and tuple(found)[-2:] == ("mean_roc_auc", "delta_m")
    areas, changes = [], []
    for column, name in enumerate(BINARY_NAMES):
        there = ~labels[:, column].isnan()
        actual, scores = labels[there, column].numpy(), logits[there, column].double().numpy()
        areas.append(sklearn.roc_auc_score(actual, scores))
        changes.append(100 * (base[f"{name}_f1"] - sklearn.f1_score(actual, scores > 0)) / base[f"{name}_f1"])
    assert found["mean_roc_auc"] == pytest.approx(np.mean(areas), rel=1e-12)
    assert found["delta_m"] == pytest.approx(np.mean(changes), rel=1e-12)


def test_delta_m_of_errors_goes_the_other_way() -> None:
    names = ("homo", "lumo")
    metrics = TaskMetrics(
        {name: MeanAbsoluteError() for name in names},
        names,
        delta_m_base={"homo_mean_absolute_error": 2.0, "lumo_mean_absolute_error": 4.0},
    )
    found = metrics(Prediction(torch.tensor([[3.0, 2.0]]), torch.zeros(1, 2)))  # + 50 % and - 50 %
    assert found["delta_m"] == pytest.approx(0.0)
    found = metrics(Prediction(torch.tensor([[3.0, 8.0]]), torch.zeros(1, 2)))  # + 50 % and + 100 %
    assert found["delta_m"] == pytest.approx(75.0)


def test_without_all_of_its_metrics_there_is_no_delta_m() -> None:
    logits, labels = binary_columns()
    base = {"smile_roc_auc": 0.8, "hat_roc_auc": 0.9}
    metrics = binary(mean_name="mean_roc_auc", mean_of="roc_auc", delta_m_base=base)
    labels[:, 2] = torch.nan  # a task that is not in the base
    assert "delta_m" in metrics(Prediction(logits, labels))
    labels[:, 1] = 0.0  # one class alone: an F1, no area
    found = metrics(Prediction(logits, labels))
    assert "delta_m" not in found and "hat_f1" in found and "hat_roc_auc" not in found
    assert found["mean_roc_auc"] == found["smile_roc_auc"]  # and the F1 is not taken for a score instead


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta_m_base": {"smile_f2": 0.5}}, r"delta_m_base: 'smile_f2' is no metric \(did you mean \"smile_f1\"\?\)"),
        ({"delta_m_base": {"smile_f1": 0.0}}, r"delta_m_base\.smile_f1: 0\.0 is not valid, expected a finite number"),
        ({"delta_m_base": {}}, "delta_m_base: is empty"),
        ({"delta_m_base": {"hat_f1": 0.5}, "mean_name": "delta_m"}, "delta_m_base: 'delta_m' is the key of"),
        ({"mean_name": "m", "mean_of": "roc_auk"}, r"mean_of: 'roc_auk' is not known \(did you mean \"roc_auc\"\?\)"),
        ({"mean_of": "roc_auc"}, "mean_name: is required, since mean_of is 'roc_auc'"),
    ],
)
def test_means_and_bases_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        binary(**options)


def test_a_mean_of_one_metric_may_stand_beside_errors() -> None:
    accumulators = {"smile": BinaryClassification(("roc_auc",)), "age": MeanAbsoluteError()}
    metrics = TaskMetrics(accumulators, ("smile", "age"), mean_name="mean_roc_auc", mean_of="roc_auc")
    found = metrics(Prediction(torch.tensor([[1.0, 3.0], [2.0, 5.0]]), torch.tensor([[0.0, 3.0], [1.0, 9.0]])))
    assert found == {"smile_roc_auc": 1.0, "age_mean_absolute_error": 2.0, "mean_roc_auc": 1.0}

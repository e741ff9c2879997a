"""Metrics of tasks of different types against scikit-learn and scipy, however the set is cut into batches."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn.metrics", reason="the references are scikit-learn and scipy")

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.losses.task_types import PIXEL_TYPES, TaskType
from hf_bilb.metrics.by_type import METRICS, default_metrics, fitting_metrics
from hf_bilb.metrics.entities import EntityF1
from hf_bilb.metrics.mixed import MixedMetrics, trivial_metrics
from hf_bilb.reporting.comparison import compare_methods
from hf_bilb.reporting.results import MetricResult, RunResults, finite
from tests.metrics.mixed_tasks import ALL, LABEL_NAMES, TAGS, TASKS, Drawn, batch, drawn, expected, longest

NUMBERS = {"a": TaskType("regression", stds=(2.0,), unit="m"), "b": TaskType("regression")}


def mixed(**settings: Any) -> MixedMetrics:
    return MixedMetrics(TASKS, **{"metrics": ALL, "label_names": LABEL_NAMES, **settings})


def stream(metrics: MixedMetrics, data: Drawn, size: int, padded: bool = False) -> dict[str, float]:
    *first, last = data.batches(size, padded)
    for part in first:
        assert metrics(part, compute_result=False) == {}
    return metrics(last)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_every_metric_of_every_type_is_that_of_scikit_learn_and_scipy(missing: float) -> None:
    data = drawn(missing=missing)
    found = mixed()(batch(data.predictions, (data.labels, data.tags)))
    assert tuple(found) == mixed().keys  # no mean: there are errors among the first metrics
    entities = EntityF1(TAGS)
    entities.update(data.predictions[3], data.tags[:, :, 0])
    reference = {**expected(data), "entities_f1_entity": entities.compute()["f1_entity"]}
    assert found.keys() == reference.keys()
    for key, value in found.items():
        assert value == pytest.approx(reference[key], rel=1e-6), key


@pytest.mark.parametrize("size", [1, 7, 90])
@pytest.mark.parametrize("padded", [False, True])
def test_batches_of_any_size_and_length_give_the_same_as_one_call(size: int, padded: bool) -> None:
    data = drawn()
    whole = mixed()(batch(data.predictions, (data.labels, data.tags)))
    metrics = mixed()
    for _ in range(2):  # the second time after the first has ended
        assert stream(metrics, data, size, padded) == pytest.approx(whole, rel=1e-10)


def test_arrays_as_without_batch_eval_metrics() -> None:
    data = drawn()
    arrays = batch(tuple(p.numpy() for p in data.predictions), (data.labels.numpy(), data.tags.numpy()))
    assert mixed()(arrays) == mixed()(batch(data.predictions, (data.labels, data.tags)))


def test_errors_are_in_the_unit_and_their_title_and_direction_are_told() -> None:
    labels, outputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    metrics = MixedMetrics(NUMBERS, {"a": ("mae", "mse", "rmse"), "b": ["mae"]})
    assert metrics(batch(outputs, labels)) == pytest.approx(
        {"a_mae": 0.5, "a_mse": 0.5, "a_rmse": math.sqrt(0.5), "b_mae": 1.0}
    )
    told = [(info.key, info.task, info.name, info.unit, info.higher_is_better, info.ideal) for info in metrics.infos]
    assert told == [
        ("a_mae", "a", "MAE", "m", False, None),
        ("a_mse", "a", "MSE", "(m)^2", False, None),
        ("a_rmse", "a", "RMSE", "m", False, None),
        ("b_mae", "b", "MAE", "", False, None),
    ]


def test_the_layouts_of_predictions_and_labels() -> None:
    outputs, labels = torch.randn(5, 2), torch.randn(5, 2)
    together = MixedMetrics(NUMBERS)
    reference = together(batch(outputs, labels))
    assert together(batch((outputs, torch.zeros(5, 9)), (labels,))) == reference  # further outputs of the model
    one = MixedMetrics({"a": NUMBERS["a"]})
    of_a = {key: value for key, value in reference.items() if key.startswith("a_")}
    assert one(batch(outputs[:, 0], labels[:, 0])) == one(batch(outputs[:, :1], labels[:, :1])) == of_a
    data = drawn()
    columns = (data.labels, data.tags)
    whole = mixed()(batch(data.predictions, columns))
    assert mixed()(batch((*data.predictions, torch.zeros(90, 9)), columns)) == whole
    assert mixed()(batch((data.predictions, torch.zeros(90, 9)), columns)) == whole
    swapped = mixed(label_names=("tag_labels", "labels"))
    assert swapped(batch(data.predictions, (data.tags, data.labels))) == whole
    topic = MixedMetrics({"topic": TASKS["topic"]})
    alone = topic(batch(data.predictions[1], data.labels[:, 1]))
    assert alone == topic(batch((data.predictions[1],), data.labels[:, 1:2])) != {}


def test_tags_alone() -> None:
    data = drawn()
    metrics = MixedMetrics({"entities": TASKS["entities"]}, label_names=("tag_labels",))
    found = metrics(batch(data.predictions[3], data.tags[:, :, :1]))
    assert list(found) == ["entities_f1_entity", "entities_accuracy", "entities_f1_macro", "mean_score"]
    assert found["entities_accuracy"] == pytest.approx(expected(data)["entities_accuracy"])


# --- what is not there, and what went wrong -----------------------------------------------------------------------


def test_what_is_not_defined_is_left_out() -> None:
    tasks = {
        "none": TaskType("regression"),
        "constant": TaskType("regression"),
        "one_class": TaskType("multi_label", 2),
        "class": TaskType("classification", 2),
    }
    labels = torch.tensor([[torch.nan, 2.0, 1.0, 1.0, 0.0], [torch.nan, 2.0, 0.0, 1.0, 0.0]])
    outputs = (torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), torch.zeros(2, 2))
    asked = {"constant": ["mae", "r2", "nmse", "pearson"], "class": ["roc_auc", "accuracy"]}
    found = MixedMetrics(tasks, asked)(batch(outputs, labels))
    assert found == {
        "constant_mae": 1.0,
        "constant_pearson": 0.0,
        "one_class_f1": 1.0,
        "one_class_roc_auc": 1.0,  # of the one label that has both classes
        "one_class_accuracy": 1.0,
        "class_accuracy": 1.0,
    }
    assert MixedMetrics(tasks)(batch(outputs, torch.full((2, 5), torch.nan))) == {}


def test_missing_integers_and_a_number_that_is_minus_a_hundred() -> None:
    tasks = {"number": TaskType("regression"), "flag": TaskType("multi_label"), "kind": TaskType("classification", 3)}
    outputs = (torch.zeros(3, 1), torch.ones(3, 1), torch.eye(3))
    labels = torch.tensor([[-100.0, -100.0, -100.0], [0.0, 1.0, 1.0], [0.0, 1.0, torch.nan]])
    chosen = {"number": ["mae"], "flag": ["accuracy"], "kind": ["accuracy"]}
    found = MixedMetrics(tasks, chosen)(batch(outputs, labels))
    assert found == {"number_mae": pytest.approx(100 / 3), "flag_accuracy": 1.0, "kind_accuracy": 1.0}


def test_a_model_that_diverged() -> None:
    data = drawn()
    diverged = tuple(torch.full_like(p, torch.nan) for p in data.predictions)
    found = mixed()(batch(diverged, (data.labels, data.tags)))
    assert tuple(found) == mixed().keys
    for key, value in found.items():
        task, metric = next((name, key[len(name) + 1 :]) for name in TASKS if key.startswith(f"{name}_"))
        if TASKS[task].type == "regression" or metric == "normalized_entropy":
            assert math.isnan(value), key
        else:
            assert value <= 0, key
    labelled = (~data.labels[:, 0].isnan()).nonzero()[0]
    one_row = tuple(p.clone().index_fill_(0, labelled, torch.nan) for p in data.predictions)
    found = mixed()(batch(one_row, (data.labels, data.tags)))
    assert math.isnan(found["stars_mae"]) and 0 < found["topic_accuracy"] < 1


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (90, 2), r"^task 'stars': predictions \(90, 2\) and labels \(90, 1\), expected both \[B, 1\] \(regression"),
        (1, (90, 3), r"^task 'topic': predictions \(90, 3\) and labels \(90,\), expected \[B, 4\] and \[B\] \(classif"),
        (3, (90, 9, 2), r"^task 'entities': .* expected \[B, T, 3\] and \[B, T\] \(token_classification\)$"),
        (3, (90, 8, 3), r"^task 'entities': predictions \(90, 8, 3\)"),
        (5, (90,), r"^task 'flags': predictions \(90,\) and labels \(90, 3\), expected both \[B, 3\] \(multi_label\)$"),
    ],
)
def test_predictions_whose_shape_does_not_fit(place: int, shape: tuple[int, ...], message: str) -> None:
    data = drawn()
    predictions = list(data.predictions)
    predictions[place] = torch.zeros(shape)
    metrics = mixed()
    with pytest.raises(MetricError, match=message):
        metrics(batch(tuple(predictions), (data.labels, data.tags)))


def test_other_batches_that_do_not_fit() -> None:
    data = drawn()
    columns = (data.labels, data.tags)
    for predictions, label_ids, message in (
        (
            data.predictions[:3],
            columns,
            r"^predictions: got a tuple of 3, expected a tuple with a tensor for each",
        ),
        (data.predictions[0], columns, r"^predictions: got Tensor, expected a tuple"),
        ((*data.predictions[:7], None), columns, r"^predictions of task 'ad': got NoneType, expected a tensor"),
        (data.predictions, data.labels, r"^label_ids: got 1 entries, expected labels, tag_labels$"),
        (data.predictions, None, r"^label_ids: got None, expected labels, tag_labels$"),
        (data.predictions, (data.labels[:, :9], data.tags), r"^labels: got \(90, 9\), expected \[B, 10\], the columns"),
        (data.predictions, (data.labels, data.tags[:, :, :1]), r"^tag_labels: got \(90, 9, 1\), expected \[B, T, 2\]"),
    ):
        with pytest.raises(MetricError, match=message):
            mixed()(batch(predictions, label_ids))
    with pytest.raises(MetricError, match=r"^predictions: got \(4, 3\), expected \[B, 2\], a column for each of a, b$"):
        MixedMetrics(NUMBERS)(batch(torch.zeros(4, 3), torch.zeros(4, 2)))
    with pytest.raises(MetricError, match=r"^task 'a': predictions \(3, 1\) and labels \(4, 1\)"):
        MixedMetrics(NUMBERS)(batch(torch.zeros(3, 2), torch.zeros(4, 2)))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (1, 4.0, "^task 'topic': labels: 1 are not valid, expected classes 0 to 3"),
        (7, 2.0, "^task 'flags': labels: 1 are not valid, expected 0 or 1"),
    ],
)
def test_a_label_that_is_none(column: int, value: float, message: str) -> None:
    data = drawn()
    labels = data.labels.clone()
    labels[3, column] = value
    metrics = mixed()
    with pytest.raises(MetricError, match=message):
        metrics(batch(data.predictions, (labels, data.tags)))
    assert metrics(batch(data.predictions, (data.labels, data.tags)))["topic_accuracy"] > 0  # nothing was left over


def test_a_tag_that_is_none() -> None:
    data = drawn()
    data.tags[0, 0, 0] = 3
    with pytest.raises(MetricError, match=r"^task 'entities': labels: 1 are not valid"):
        mixed()(batch(data.predictions, (data.labels, data.tags)))


# --- which metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (TaskType("regression", 2), ("mae", "rmse", "r2")),
        (TaskType("classification", 2), ("accuracy", "f1")),
        (TaskType("classification", 3), ("accuracy", "f1_macro")),
        (TaskType("multi_label", 2), ("f1", "roc_auc", "accuracy")),
        (TaskType("multi_label"), ("f1", "roc_auc", "accuracy", "normalized_entropy")),
        (TaskType("token_classification", 3, names=TAGS), ("f1_entity", "accuracy", "f1_macro")),
        (TaskType("token_classification", 3, names=("NOUN", "VERB", "DET")), ("accuracy", "f1_macro")),
        (TaskType("token_classification", 2), ("accuracy", "f1")),
        (TaskType("segmentation", 3), ("miou", "pixel_accuracy")),
        (TaskType("dense_regression"), ("mae", "rmse")),
    ],
)
def test_default_metrics(task: TaskType, names: tuple[str, ...]) -> None:
    assert default_metrics(task) == names
    label_names = {"tokens": ("tag_labels",), "rows": ("labels",), "pixels": ("t",)}[task.items]
    keys = tuple(f"t_{name}" for name in names)
    mean = () if task.type.endswith("regression") else ("mean_score",)
    assert MixedMetrics({"t": task}, label_names=label_names).keys == keys + mean


def test_the_test_knows_every_metric() -> None:
    for name, task in TASKS.items():
        assert set(ALL[name]) == set(fitting_metrics(task))
    # Those of pixels: tests/metrics/test_mixed_pixels.py.
    of_rows = [names for kind, names in METRICS.items() if kind not in PIXEL_TYPES]
    assert {m for names in of_rows for m in names} == {m for names in ALL.values() for m in names}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"stars": ["maee"]}, r"^metrics\.stars: 'maee' is not known \(did you mean \"mae\"\?\); known: mae, "),
        ({"star": ["mae"]}, r"^metrics: 'star' is not known \(did you mean \"stars\"\?\)"),
        ({"stars": ["f1"]}, r"^metrics\.stars: 'f1' does not fit regression; these do: mae, rmse, r2, mse, nmse, pear"),
        ({"topic": ["f1"]}, r"^metrics\.topic: 'f1' does not fit classification with 4 classes; these do: accuracy, "),
        (
            {"words": ["f1_entity"]},
            r"^metrics\.words: 'f1_entity' does not fit token_classification with 2 tags that",
        ),
        ({"stars": "mae"}, r"^metrics\.stars: 'mae' is not valid, expected a list of one or more different names$"),
        ({"stars": []}, r"^metrics\.stars: \[\] is not valid"),
        ({"stars": ["mae", "mae"]}, r"^metrics\.stars: \['mae', 'mae'\] is not valid"),
    ],
)
def test_metrics_that_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        mixed(metrics=asked)


def test_other_arguments_that_are_refused() -> None:
    with pytest.raises(OptionError, match=r"^label_names: labels, expected 'tag_labels' among them$"):
        MixedMetrics(TASKS)
    with pytest.raises(OptionError, match=r"^tasks: is empty"):
        MixedMetrics({})
    same = {"a": TaskType("classification", 2), "a_balanced": TaskType("classification", 2)}
    with pytest.raises(OptionError, match=r"^task_names: 'a' and 'a_balanced' would both have the metric 'a_balanced_"):
        MixedMetrics(same, {"a": ["balanced_accuracy"]})


# --- figures over all tasks ---------------------------------------------------------------------------------------


def test_the_mean_is_of_scores_alone() -> None:
    tasks = {"flag": TaskType("multi_label"), "number": TaskType("regression")}
    assert "mean_score" not in MixedMetrics(tasks).keys
    scores = MixedMetrics(tasks, {"number": ["r2", "mae"]})
    assert scores.infos[-1].key == "mean_score" and scores.infos[-1].ideal == 1 and scores.infos[-1].task == ""
    outputs, labels = torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    found = scores(batch(outputs, labels))
    assert (found["flag_f1"], found["number_r2"]) == (pytest.approx(2 / 3), 0.5)
    assert found["mean_score"] == pytest.approx((2 / 3 + 0.5) / 2)
    labels[:, 1] = torch.nan
    assert scores(batch(outputs, labels))["mean_score"] == pytest.approx(2 / 3)


def run(balancer: str, metrics: MixedMetrics, values: dict[str, float]) -> RunResults:
    about = [
        MetricResult(i.key, i.task, i.name, i.unit, i.higher_is_better, finite(values.get(i.key)), None, i.ideal,
                     counted=i.counted)
        for i in metrics.infos
    ]  # fmt: skip
    return RunResults("r", "m", "d", balancer, "test", about)


def test_delta_m_takes_one_metric_of_each_task_that_can_be_a_base() -> None:
    tasks = {"number": TaskType("regression"), "kind": TaskType("classification", 3)}
    metrics = MixedMetrics(tasks, {"number": ["r2", "mae"], "kind": ["matthews", "accuracy"]})
    assert [info.key for info in metrics.infos if info.counted and info.task] == ["number_mae", "kind_accuracy"]
    only_signed = MixedMetrics(tasks, {"number": ["pearson", "r2"]})
    assert next(info.key for info in only_signed.infos if info.counted) == "number_pearson"
    single = {"number_r2": -0.2, "number_mae": 2.0, "kind_matthews": 0.0, "kind_accuracy": 0.5}
    measured = {"number_r2": -0.1, "number_mae": 1.0, "kind_matthews": -0.1, "kind_accuracy": 0.4}
    alone = {task: {0: run("ls", MixedMetrics({task: tasks[task]}, {task: metrics.metrics[task]}), single)}
             for task in tasks}  # fmt: skip
    comparison = compare_methods({"ls": {0: run("ls", metrics, measured)}}, alone, "ls")
    assert comparison.methods[0].delta_m.values[0] == pytest.approx((-50 + 20) / 2)  # MAE halved, accuracy a fifth less
    assert comparison.notes == ()


# --- the predictor that sees no input -----------------------------------------------------------------------------


def test_the_constant_predictor() -> None:
    tasks = {
        "stars": TaskType("regression", stds=(2.0,)),
        "topic": TaskType("classification", 3),
        "flags": TaskType("multi_label", 2),
        "entities": TaskType("token_classification", 3, names=TAGS),
    }
    nan = torch.nan
    train = np.array([[1, 2, 1, 0], [3, 2, 1, 0], [nan, 0, 1, nan], [nan, nan, 0, 1]], dtype=np.float32)
    test = np.array([[4, 2, 1, 0], [2, 1, 0, 0], [nan, 2, 1, 1]], dtype=np.float32)
    train_tags, test_tags = np.array([[[0], [0], [1]]]), np.array([[[0], [1]], [[0], [-100]], [[-100], [-100]]])
    found = trivial_metrics(tasks, train, test, train_tags, test_tags)
    assert list(found) == list(MixedMetrics(tasks, label_names=LABEL_NAMES).keys)
    shares = (0.75, 1 / 3)  # of positive labels, so that the first flag is always on
    assert found == pytest.approx(
        {
            "stars_mae": 2.0,  # the mean is 2, the labels are 4 and 2, the deviation 2
            "stars_rmse": math.sqrt(8),
            "stars_r2": -1.0,
            "topic_accuracy": 2 / 3,
            "topic_f1_macro": 0.4,  # 0.8 and 0
            "flags_f1": 0.4,
            "flags_roc_auc": 0.5,
            "flags_accuracy": 2 / 3,
            "entities_f1_entity": 0.0,
            "entities_accuracy": 2 / 3,
            "entities_f1_macro": 0.4,
        }
    )
    entropy = trivial_metrics(tasks, train, test, train_tags, test_tags, {"flags": ["normalized_entropy"]})
    counts = [(2, 1), (1, 2)]  # positive and negative in the test part
    ratios = [
        (p * math.log(s) + n * math.log(1 - s)) / (p * math.log(p / 3) + n * math.log(n / 3))
        for s, (p, n) in zip(shares, counts, strict=True)
    ]
    assert entropy["flags_normalized_entropy"] == pytest.approx(sum(ratios) / 2)


def test_the_mean_explains_nothing_to_the_last_bit() -> None:
    """1 - nMSE of sums over batches would be 2e-16, or -2e-16."""
    for seed in range(20):
        labels = torch.from_numpy(np.random.default_rng(seed).normal(3, 2, size=(97, 1)).astype(np.float32)).double()
        metrics = MixedMetrics({"y": TaskType("regression")}, {"y": ["r2"]})
        for part in labels.split(10):
            metrics(batch(labels.mean().expand(len(part), 1), part), compute_result=False)
        found = metrics._compute()["y_r2"]
        assert (found, math.copysign(1, found)) == (0.0, 1.0)


def test_the_constant_predictor_of_many_rows_and_of_one_output_each() -> None:
    labels = np.random.default_rng(0).normal(size=(2500, 2)).astype(np.float32)
    found = trivial_metrics(NUMBERS, labels[:500], labels[500:], metrics={"a": ["mae"], "b": ["mae", "spearman"]})
    errors = np.abs(labels[500:] - labels[:500].mean(axis=0)).mean(axis=0)
    assert found == pytest.approx({"a_mae": 2 * errors[0], "b_mae": errors[1], "b_spearman": 0.0}, rel=1e-5)
    tags = np.zeros((3, 2, 1), dtype=np.int64)
    alone = {"entities": TASKS["entities"]}
    assert trivial_metrics(alone, None, None, tags, tags)["entities_accuracy"] == 1.0
    with pytest.raises(MetricError, match=r"^task 'b': there is no label in the training part$"):
        trivial_metrics(NUMBERS, np.array([[0, np.nan]]), labels)
    for wrong, message in ((2, "labels of the training part: expected classes 0 to 1"), (np.nan, "there is no label")):
        with pytest.raises(MetricError, match=rf"^task 'spam': {message}"):
            trivial_metrics({"spam": TASKS["spam"]}, np.array([[wrong]]), np.array([[1]]))


# --- in the Trainer -----------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, data: Drawn) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, row: int) -> int:
        return row


class Answers(nn.Module):
    """Gives the drawn predictions of the rows, and an output more."""

    def __init__(self, data: Drawn) -> None:
        super().__init__()
        self.data = data
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, rows: Tensor, labels: Tensor, tag_labels: Tensor) -> dict[str, Any]:
        length = tag_labels.shape[1]
        outputs = tuple(p[rows, :length] if p.ndim == 3 else p[rows] for p in self.data.predictions)
        losses = self.weight * torch.ones(len(TASKS))
        return {"losses": losses, "num_items": torch.ones(len(TASKS)), "logits": outputs, "other": rows[:, None]}


@pytest.mark.parametrize("by_batch", [True, False])
def test_in_the_trainer(by_batch: bool, tmp_path: Path) -> None:
    from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments

    data = drawn(30)

    def collate(rows: list[int]) -> dict[str, Tensor]:
        tags = data.tags[rows]
        return {"rows": torch.tensor(rows), "labels": data.labels[rows], "tag_labels": tags[:, : longest(tags)]}

    arguments = BilevelMTLTrainingArguments(
        output_dir=str(tmp_path), balancer="ls", task_names=list(TASKS), label_names=list(LABEL_NAMES), use_cpu=True,
        per_device_eval_batch_size=8, batch_eval_metrics=by_batch, report_to=[], remove_unused_columns=False,
    )  # fmt: skip
    trainer = BilevelMTLTrainer(
        model=Answers(data), args=arguments, eval_dataset=Rows(data), data_collator=collate, compute_metrics=mixed()
    )
    found = trainer.evaluate()
    whole = mixed()(batch(data.predictions, (data.labels, data.tags)))
    assert {key: found[f"eval_{key}"] for key in whole} == pytest.approx(whole, rel=1e-6)


def test_infos_are_plain() -> None:
    metrics = mixed()
    assert tuple(info.key for info in metrics.infos) == metrics.keys
    assert all(dataclasses.asdict(info) for info in metrics.infos)

"""Tasks with one class per image beside pixel-wise ones: their metrics are scikit-learn's, whatever the batches are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sklearn.metrics
import torch
from torch import Tensor

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.metrics.dense import DenseMetrics, published_base
from tests.distributed.conftest import launch
from tests.metrics.dense_images import (
    IMAGE_TASKS,
    MIXED,
    NUM_CLASSES,
    PUBLISHED_BATCH,
    MixedImages,
    Prediction,
    expected_metrics,
    predicted,
)
from tests.metrics.dense_worker import WITH_IMAGE_TASKS

NUMBER = 23
KEYS = ("scene_accuracy", "scene_macro_f1", "room_accuracy", "room_macro_f1")


def mixed_metrics(**options: Any) -> DenseMetrics:
    given = {"batch_size": PUBLISHED_BATCH, "image_tasks": IMAGE_TASKS, **options}
    return DenseMetrics(MIXED, NUM_CLASSES, **given)


def by_sklearn(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, float]:
    """Of scene and room, from lists of the images that have a label."""
    found = {}
    for column, (name, place) in enumerate((("scene", 0), ("room", 3))):
        pairs = [
            (int(label), int(logits.argmax()))
            for label, logits in zip(labels[-1][:, column], predictions[place], strict=True)
            if label >= 0
        ]
        if pairs:
            truth, guesses = zip(*pairs, strict=True)
            found[f"{name}_accuracy"] = sklearn.metrics.accuracy_score(truth, guesses)
            found[f"{name}_macro_f1"] = sklearn.metrics.f1_score(truth, guesses, average="macro")
    return found


def streamed(metrics: DenseMetrics, predictions: Sequence[Tensor], labels: Sequence[Tensor], size: int) -> Any:
    number = len(labels[0])
    for start in range(0, number, size):
        part = slice(start, start + size)
        batch = Prediction(tuple(p[part] for p in predictions), tuple(values[part] for values in labels))
        found = metrics(batch, compute_result=start + size >= number)
    return found


@pytest.mark.parametrize("size", [1, 4, 5, NUMBER])
def test_they_are_those_of_sklearn_and_change_no_other(size: int) -> None:
    images = MixedImages(NUMBER)
    predictions, labels = predicted(images), images.labels()
    found = streamed(mixed_metrics(), predictions, labels, size)
    expected = by_sklearn(predictions, labels)
    assert tuple(expected) == KEYS and 0 < min(expected.values()) < max(expected.values()) < 1
    assert {key: found[key] for key in KEYS} == pytest.approx(expected, rel=1e-12)
    padded = (predictions[1], predictions[2], images.pixel_values)
    of_pixels = expected_metrics(padded, (*labels[:2], images.normals), PUBLISHED_BATCH)
    of_pixels = {key: value for key, value in of_pixels.items() if not key.startswith("normals")}
    assert {key: value for key, value in found.items() if key not in KEYS} == pytest.approx(of_pixels, rel=1e-12)


def test_keys_and_facts_stand_in_the_order_of_the_tasks() -> None:
    metrics = mixed_metrics()
    assert metrics.label_names == ("segmentation", "depth", "image_labels")
    assert list(metrics.image_tasks) == ["scene", "room"]  # as the columns, not as they were given
    assert metrics.keys[:2] == KEYS[:2] and metrics.keys[-2:] == KEYS[2:]
    facts = [(fact.task, fact.name, fact.unit, fact.higher_is_better, fact.ideal) for fact in metrics.facts[-2:]]
    assert facts == [("room", "accuracy", "", True, 1.0), ("room", "macro F1", "", True, 1.0)]
    images = MixedImages(NUMBER)
    assert tuple(streamed(metrics, predicted(images), images.labels(), 6)) == metrics.keys
    assert all(fact.counted for fact in metrics.facts if fact.key in KEYS)


def test_other_forms_of_a_batch_and_merged_parts() -> None:
    images = MixedImages(NUMBER)
    predictions, labels = predicted(images), images.labels()
    expected = streamed(mixed_metrics(), predictions, labels, 4)
    as_mappings = Prediction(
        dict(zip(MIXED, predictions, strict=True)), dict(zip(mixed_metrics().label_names, labels, strict=True))
    )
    as_arrays = Prediction(tuple(p.numpy() for p in predictions), tuple(values.numpy() for values in labels))
    rows = mixed_metrics().per_image(predictions, labels)
    assert {name: tuple(rows[name].shape) for name in ("scene", "room")} == {"scene": (NUMBER, 5), "room": (NUMBER, 3)}
    for given in (as_mappings, as_arrays, Prediction(rows, labels)):
        assert mixed_metrics()(given) == pytest.approx(expected, rel=1e-12)
    parts = [mixed_metrics(), mixed_metrics()]
    for metrics, part in zip(parts, (slice(0, 9), slice(9, NUMBER)), strict=True):
        metrics(Prediction(tuple(p[part] for p in predictions), tuple(v[part] for v in labels)), compute_result=False)
    parts[0].merge(parts[1])
    assert parts[0]._compute() == pytest.approx(expected, rel=1e-12)
    other = DenseMetrics(MIXED, NUM_CLASSES, batch_size=PUBLISHED_BATCH, image_tasks={**IMAGE_TASKS, "scene": 5})
    with pytest.raises(MetricError, match="merge: got 5 classes, expected 4"):
        parts[0].merge(other)


def test_a_task_without_a_label_has_no_figures_and_leaves_delta_m_alone() -> None:
    images = MixedImages(NUMBER)
    images.image_labels[:, 1] = -1
    predictions, labels = predicted(images), images.labels()
    base = published_base("nyuv2", MIXED)
    found = streamed(mixed_metrics(delta_m_base=base), predictions, labels, 4)
    assert not any(key.startswith("room") for key in found) and "delta_m" in found
    pixels_only = DenseMetrics(["segmentation", "depth"], NUM_CLASSES, base, PUBLISHED_BATCH)
    alone = streamed(pixels_only, predictions[1:3], labels[:2], 4)
    assert (found["delta_m"], found["delta_m_by_task"]) == (alone["delta_m"], alone["delta_m_by_task"])


def test_delta_m_may_relate_to_image_tasks_whatever_their_names() -> None:
    metrics = DenseMetrics(
        ["depth", "a_b"], 0, {"depth_abs_error": 1.0, "a_b_accuracy": 0.5}, 1, image_tasks={"a_b": 2}
    )
    labels = (torch.ones(2, 1, 1), torch.tensor([[0], [1]]))
    predictions = (torch.full((2, 1, 1), 1.5), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    found = metrics(Prediction(predictions, labels))
    assert (
        found["delta_m"] == found["delta_m_by_task"] == pytest.approx((100 * (0.5 - 1) / 1 - 100 * (1 - 0.5) / 0.5) / 2)
    )


def test_image_tasks_alone() -> None:
    images = MixedImages(NUMBER)
    logits, labels = predicted(images)[0], images.image_labels[:, :1]
    for given in (logits, (logits,), ((logits,),)):
        found = DenseMetrics(["scene"], 0, image_tasks={"scene": 4})(Prediction(given, labels))
        expected = by_sklearn(predicted(images), images.labels())
        assert found == pytest.approx({key: expected[key] for key in KEYS[:2]}, rel=1e-12)


def test_an_image_with_a_logit_that_is_none_counts_as_wrong() -> None:
    labels = torch.tensor([[0], [1], [1]])
    logits = torch.tensor([[2.0, 1.0], [1.0, torch.nan], [0.0, 3.0]])
    found = DenseMetrics(["room"], 0, image_tasks={"room": 2})(Prediction(logits, labels))
    expected = sklearn.metrics.f1_score([0, 1, 1], [0, 2, 1], average=None, labels=[0, 1], zero_division=0)
    assert found == pytest.approx({"room_accuracy": 2 / 3, "room_macro_f1": expected.mean()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_labels": torch.zeros(23, 1, dtype=torch.int64)}, r"labels: image_labels: got shape \(23, 1\), expect"),
        ({"image_labels": torch.full((23, 2), 3)}, "task 'room': labels: 23 are not valid, expected classes 0 to 1"),
        ({"image_labels": torch.zeros(23, 2)}, "task 'scene': labels: got torch.float32, expected integers, below 0"),
        (
            {"scene": torch.zeros(23, 3)},
            r"task 'scene': predictions \(23, 3\) and labels \(23,\), expected \[B, 4\] log",
        ),
    ],
)
def test_batches_that_do_not_fit_are_one_line(change: dict[str, Tensor], message: str) -> None:
    images = MixedImages(NUMBER)
    predictions = {**dict(zip(MIXED, predicted(images), strict=True)), **change}
    labels = {**dict(zip(mixed_metrics().label_names, images.labels(), strict=True)), **change}
    with pytest.raises(MetricError, match=message) as raised:
        mixed_metrics()(Prediction(predictions, labels))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("names", "image_tasks", "message"),
    [
        (["depth", "scene"], {}, "task_names: 'scene' is not known"),
        (["depth", "scene"], {"scene": 1}, "num_classes: 1 is not valid, expected 2 or more"),
        (
            ["segmentation", "segmentation_pixel"],
            {"segmentation_pixel": 2},
            "task_names: 'segmentation' and 'segmentation_pixel' would both have the metric 'segmentation_pixel_",
        ),
    ],
)
def test_tasks_that_do_not_fit(names: list[str], image_tasks: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DenseMetrics(names, 3, image_tasks=image_tasks)


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    runs = launch(tmp_path, "tests.metrics.dense_worker", timeout=120)
    images = MixedImages(WITH_IMAGE_TASKS)
    expected = by_sklearn(predicted(images), images.labels())
    assert tuple(expected) == KEYS
    for results in (runs.one, *runs.ranks):
        for how in ("gathered", "each rank"):
            found = results[f"image tasks/{how}"]["metrics"]
            assert {key: found[key] for key in KEYS} == pytest.approx(expected, rel=1e-12)
            assert found == pytest.approx(runs.one["image tasks/gathered"]["metrics"], rel=1e-12)

"""Metrics of pixel-wise tasks are those of the official code and of plain numpy, whatever the batches and ranks are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.metrics.dense import DenseMetrics, published_base
from hf_bilb.metrics.dense_accumulators import ANGLE_RESOLUTION, angles_between, class_iou
from tests.distributed.conftest import Runs, launch
from tests.metrics.dense_images import (
    BASE,
    NUM_CLASSES,
    PUBLISHED_BATCH,
    TASKS,
    Images,
    Prediction,
    dense_metrics,
    expected_metrics,
    predicted,
)
from tests.metrics.dense_worker import NUMBERS

PARITY = np.load(Path(__file__).parents[1] / "parity_data" / "metrics.npz")
#: Read from a histogram: up to half a cell off. All other figures are exact.
ROUGH = "normals_median_angle"


def parity(name: str) -> Tensor:
    return torch.from_numpy(PARITY[name])


def as_found(expected: dict[str, float], relative: float = 1e-12) -> dict[str, Any]:
    half_a_cell = pytest.approx(expected.get(ROUGH, 0.0), rel=0, abs=ANGLE_RESOLUTION / 2 * (1 + 1e-9))
    close = {key: pytest.approx(value, rel=relative) for key, value in expected.items()}
    return {**close, **({ROUGH: half_a_cell} if ROUGH in expected else {})}


def measure(metrics: DenseMetrics, predictions: tuple[Tensor, ...], labels: tuple[Tensor, ...], size: int) -> Any:
    number = len(labels[0])
    for start in range(0, number, size):
        part = slice(start, start + size)
        batch = Prediction(tuple(p[part] for p in predictions), tuple(values[part] for values in labels))
        last = start + size >= number
        found = metrics(batch, compute_result=last)
        assert last or found == {}
    return found


# --- the official code --------------------------------------------------------------------------------------------


def test_segmentation_of_the_official_code() -> None:
    metrics = DenseMetrics(["segmentation"], int(PARITY["seg_classes"]))
    for classes, labels in zip(parity("seg_pred")[:-1], parity("seg_label")[:-1], strict=True):
        assert metrics(Prediction(classes, labels), compute_result=False) == {}
    found = metrics(Prediction(parity("seg_pred")[-1], parity("seg_label")[-1]))
    assert found["segmentation_miou"] == pytest.approx(float(PARITY["seg_miou"]), rel=2e-7)  # which is float32
    assert found["segmentation_pixel_accuracy"] == pytest.approx(float(PARITY["seg_pixacc"]), rel=2e-7)


def test_depth_and_normals_of_the_official_code_are_those_of_a_batch() -> None:
    metrics = DenseMetrics(["depth", "normals"], 0, batch_size=3)
    predictions = {"depth": parity("depth_pred"), "normals": parity("normal_pred")}
    labels = (parity("depth_true").squeeze(1), parity("normal_true"))
    found = metrics(Prediction(predictions, labels))
    depth = dict(zip(("abs_error", "rel_error"), PARITY["depth_abs_rel"], strict=True))
    names = ("mean_angle", "median_angle", "within_11_25", "within_22_5", "within_30")
    normals = dict(zip(names, PARITY["normal_mean_median_11_22_30"], strict=True))
    expected = {f"depth_{name}": value for name, value in depth.items()}
    expected.update({f"normals_{name}": value for name, value in normals.items()})
    expected.update({f"{key}_batch_mean": value for key, value in expected.items()})
    assert found == as_found(expected)


@pytest.mark.parametrize(("data", "tasks"), [("nyuv2", TASKS), ("cityscapes", TASKS[:2])])
def test_the_published_base_and_its_signs(data: str, tasks: tuple[str, ...]) -> None:
    base = published_base(data, tasks)
    assert list(base.values()) == PARITY[f"{data}_base"].tolist()
    metrics = DenseMetrics(tasks, 13, base)
    higher = {fact.key: fact.higher_is_better for fact in metrics.facts}
    assert [higher[key] for key in base] == PARITY[f"{data}_sign_higher_better"].astype(bool).tolist()
    assert published_base(data, ["depth"]).keys() == {"depth_abs_error", "depth_rel_error"}
    with pytest.raises(OptionError, match="data: 'nyu' is not known"):
        published_base("nyu", tasks)


@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize(("data", "tasks"), [("nyuv2", TASKS), ("cityscapes", TASKS[:2])])
def test_delta_m_of_the_official_code(data: str, tasks: tuple[str, ...], row: int, monkeypatch: Any) -> None:
    metrics = DenseMetrics(tasks, 13, published_base(data, tasks))
    measured = dict(zip(metrics.delta_m_base, PARITY[f"{data}_metrics"][row].tolist(), strict=True))
    for name, accumulator in metrics.accumulators.items():
        own = {k.removeprefix(f"{name}_"): value for k, value in measured.items() if k.startswith(f"{name}_")}
        monkeypatch.setattr(accumulator, "compute", lambda own=own: own)
    assert metrics._compute()["delta_m"] == pytest.approx(PARITY[f"{data}_delta_m"][row], rel=1e-12)


# --- plain numpy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_figures_do_not_depend_on_the_batches(size: int) -> None:
    images = Images(20)
    found = measure(dense_metrics(), predicted(images), images.labels(), size)
    expected = expected_metrics(predicted(images), images.labels(), PUBLISHED_BATCH)
    del found["delta_m"], found["delta_m_by_task"]
    assert found == as_found(expected)


def test_both_forms_are_named_and_differ() -> None:
    images = Images(20)
    metrics = dense_metrics()
    found = measure(metrics, predicted(images), images.labels(), 20)
    assert tuple(found) == metrics.keys == tuple(fact.key for fact in metrics.facts)
    averaged = [key for key in found if key.endswith("_batch_mean")]
    assert len(averaged) == 7 and all(key.startswith(("depth", "normals")) for key in averaged)
    for key in averaged:
        assert abs(found[key] / found[key.removesuffix("_batch_mean")] - 1) > 1e-4


@pytest.mark.parametrize("average", ["batch_mean", "exact"])
def test_delta_m_takes_one_form_flat_and_by_task(average: Any) -> None:
    images = Images(20)
    metrics = dense_metrics(delta_m_average=average)
    found = measure(metrics, predicted(images), images.labels(), 4)
    suffix = "_batch_mean" if average == "batch_mean" else ""
    keys = [key if key.startswith("segmentation") else key + suffix for key in BASE]
    assert list(metrics.delta_m_base) == keys
    counted = [fact.key for fact in metrics.facts if fact.task and fact.counted]
    assert len(counted) == 9 and set(keys) < set(counted)
    miou, error, median, within = (
        100 * (found[key] - single) / single for key, single in zip(keys, BASE.values(), strict=True)
    )
    assert found["delta_m"] == pytest.approx((-miou + error + median - within) / 4, rel=1e-12)
    assert found["delta_m_by_task"] == pytest.approx((-miou + error + (median - within) / 2) / 3, rel=1e-12)


def test_an_image_of_another_batch_waits_for_its_own() -> None:
    """Batches of 3 are images 0-2, 3-5, ...: also when they come by twos."""
    depth, labels = torch.tensor([2.0, 3.0, 4.0, 9.0, 1.0]).view(5, 1, 1), torch.ones(5, 1, 1)
    found = measure(DenseMetrics(["depth"], 0, batch_size=3), (depth,), (labels,), 2)
    assert found["depth_abs_error_batch_mean"] == pytest.approx(((1 + 2 + 3) / 3 + (8 + 0) / 2) / 2)
    assert found["depth_abs_error"] == pytest.approx(14 / 5)


@pytest.mark.parametrize("as_numpy", [False, True])
def test_one_call_with_everything(as_numpy: bool) -> None:
    images = Images(20)
    predictions, labels = predicted(images), images.labels()
    streamed = measure(dense_metrics(), predictions, labels, 4)
    if as_numpy:  # as without batch_eval_metrics
        predictions, labels = (tuple(v.numpy() for v in values) for values in (predictions, labels))
    for given in (predictions, dict(zip(TASKS, predictions, strict=True)), (predictions, "hidden states")):
        assert dense_metrics()(Prediction(given, labels)) == pytest.approx(streamed, rel=1e-12)


def test_statistics_of_images_stand_for_predictions_and_labels() -> None:
    images = Images(20)
    metrics = dense_metrics()
    expected = measure(dense_metrics(), predicted(images), images.labels(), 4)
    rows = metrics.per_image(predicted(images), images.labels())
    assert {name: tuple(values.shape) for name, values in rows.items()} == {
        "segmentation": (20, NUM_CLASSES * (NUM_CLASSES + 1) + 2),
        "depth": (20, 4),
        "normals": (20, 48),
    }
    assert metrics(Prediction(rows, images.labels())) == pytest.approx(expected, rel=1e-12)
    assert metrics.per_image(rows, None) is rows  # data without labels: predictions as they are


def test_merged_parts_are_the_whole_in_the_exact_figures() -> None:
    images = Images(20)
    predictions, labels = predicted(images), images.labels()
    whole = measure(dense_metrics(), predictions, labels, 4)
    parts = [dense_metrics(), dense_metrics()]
    for metrics, part in zip(parts, (slice(0, 9), slice(9, 20)), strict=True):  # the batches of 3 end there too
        metrics(Prediction(tuple(p[part] for p in predictions), tuple(v[part] for v in labels)), compute_result=False)
    parts[0].merge(parts[1])
    assert parts[0]._compute() == pytest.approx(whole, rel=1e-12)
    with pytest.raises(MetricError, match="merge: got batches of 2 images, expected 3"):
        parts[0].merge(dense_metrics(batch_size=2))
    with pytest.raises(MetricError, match="merge: got the tasks"):
        parts[0].merge(DenseMetrics(["depth"], 0))


@pytest.mark.parametrize("seed", range(5))
def test_the_median_over_all_pixels_is_within_half_a_cell(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(3, 3, 40, 50, generator=generator, dtype=torch.float64)
    predictions = labels + 0.3 * torch.randn(3, 3, 40, 50, generator=generator, dtype=torch.float64)
    if seed % 2:
        labels[0, :, 0, 0] = 0  # an odd number
    found = DenseMetrics(["normals"], 0)(Prediction(predictions, labels))
    cosines = torch.nn.functional.cosine_similarity(predictions, labels, dim=1)[(labels != 0).any(dim=1)]
    exact = np.median(np.degrees(np.arccos(cosines.numpy())))
    assert abs(found["normals_median_angle"] - exact) <= ANGLE_RESOLUTION / 2 * (1 + 1e-9)


def test_small_angles_of_float32_vectors() -> None:
    angle = torch.tensor([0.0, 1e-3, 0.01, 1.0, 90.0, 179.99, 180.0], dtype=torch.float64)
    first = torch.zeros(1, 3, len(angle)).index_fill(1, torch.tensor([0]), 1.0)
    second = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin(), torch.zeros_like(angle)]).unsqueeze(0).float()
    assert angles_between(first, second)[0].tolist() == pytest.approx(angle.tolist(), abs=6e-6)
    through_acos = (first * second).sum(dim=1).clamp(-1, 1).acos().rad2deg()[0]
    assert through_acos[1] == 0  # what the cosine in float32 makes of a thousandth of a degree


# --- what is missing, and what is wrong ---------------------------------------------------------------------------


def test_a_class_that_is_nowhere_has_no_part_in_the_mean() -> None:
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert class_iou(confusion)[:2].tolist() == [3 / 4, 4 / 5] and math.isnan(class_iou(confusion)[2])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).view(1, 2, 4)
    found = DenseMetrics(["segmentation"], 3)(Prediction(torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]).view(1, 2, 4), labels))
    assert found["segmentation_miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    # Predicted alone, it is a class that is always wrong.
    found = DenseMetrics(["segmentation"], 3)(Prediction(torch.tensor([0, 0, 0, 2, 1, 1, 1, 1]).view(1, 2, 4), labels))
    assert found["segmentation_miou"] == pytest.approx((3 / 4 + 1 + 0) / 3)


def test_a_task_without_labels_has_no_figures_and_delta_m_is_left_out() -> None:
    images = Images(4)
    images.depth[:] = 0
    found = measure(dense_metrics(), predicted(images), images.labels(), 2)
    assert {key.split("_")[0] for key in found} == {"segmentation", "normals"}
    images.segmentation[:], images.normals[:] = -1, torch.nan
    assert measure(dense_metrics(), predicted(images), images.labels(), 2) == {}


def test_a_batch_without_labels_is_no_batch() -> None:
    depth, labels = torch.full((4, 2, 2), 3.0), torch.ones(4, 2, 2)
    labels[2:] = 0
    labels[0, 0, 0] = torch.nan  # missing as well
    found = measure(DenseMetrics(["depth"], 0, batch_size=2), (depth,), (labels,), 2)
    assert found["depth_abs_error_batch_mean"] == found["depth_abs_error"] == 2.0


def test_what_a_broken_model_predicts_is_wrong_and_nothing_else() -> None:
    images = Images(6)
    logits, depth, normals = predicted(images)
    logits[0, 0, 0, 0], normals[1, 0, 0, 0] = torch.nan, torch.nan
    normals[1, :, 0, 1] = 0
    images.segmentation[0, 0, 0] = 2
    images.normals[1, :, 0, :2] = torch.tensor([0.0, 0.0, 1.0]).view(3, 1)
    found = measure(dense_metrics(delta_m_base=None), (logits, depth, normals), images.labels(), 2)
    # The same with a wrong class, an opposite and a perpendicular normal.
    logits[0, :, 0, 0], normals[1, :, 0, 0] = 0, torch.tensor([0.0, 0.0, -1.0])
    logits[0, 1, 0, 0] = 1
    normals[1, :, 0, 1] = torch.tensor([1.0, 0.0, 0.0])
    expected = measure(dense_metrics(delta_m_base=None), (logits, depth, normals), images.labels(), 2)
    # A NaN is no class, so that the union of a predicted class does not grow.
    assert found.pop("segmentation_miou") > expected.pop("segmentation_miou")
    assert found == pytest.approx(expected, rel=1e-12)
    depth[0, 0, 0] = torch.nan
    images.depth[0, 0, 0] = 1.0
    found = measure(dense_metrics(), (logits, depth, normals), images.labels(), 2)
    assert all(math.isnan(found[key]) for key in found if key.startswith(("depth", "delta_m")))


def images_with(**changes: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    images = Images(3)
    for name, value in changes.items():
        getattr(images, name)[0, ..., 0, 0] = value
    return predicted(images), images.labels()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images_with(segmentation=5), "task 'segmentation': labels: 1 pixels are not valid, expected classes 0 to 4"),
        (images_with(depth=-2.0), "task 'depth': labels: 1 pixels are not valid, expected numbers above 0"),
        (images_with(depth=math.inf), "task 'depth': labels: 1 pixels are not valid"),
        (images_with(normals=math.inf), "task 'normals': labels: 1 pixels are not valid, expected finite vectors"),
    ],
)
def test_labels_that_are_none_are_one_clear_line(given: Any, message: str) -> None:
    metrics = dense_metrics()
    with pytest.raises(MetricError, match=message) as raised:
        measure(metrics, *given, 2)
    assert "\n" not in str(raised.value)
    images = Images(3)
    assert measure(metrics, predicted(images), images.labels(), 2) == measure(
        dense_metrics(), predicted(images), images.labels(), 2
    )


LOGITS, DEPTH, NORMALS = torch.zeros(2, NUM_CLASSES, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2, 3, 4, 4)
CLASSES = torch.zeros(2, 4, 4, dtype=torch.int64)
LABELS = (CLASSES, DEPTH, NORMALS)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ((LOGITS[:, :4], DEPTH, NORMALS), LABELS, r"task 'segmentation': predictions \(2, 4, 4, 4\) .* \[B, 5, H, W\]"),
        ((LOGITS, DEPTH, NORMALS), (CLASSES.float(), DEPTH, NORMALS), "task 'segmentation': labels: got torch.float32"),
        ((LOGITS, DEPTH[:, :3], NORMALS), LABELS, r"task 'depth': predictions \(2, 3, 4\) and labels \(2, 4, 4\)"),
        ((LOGITS, DEPTH, NORMALS[:, :2]), LABELS, r"task 'normals': predictions \(2, 2, 4, 4\) and labels"),
        ((LOGITS, DEPTH), LABELS, "predictions: got 2 entries, expected one for each of segmentation, depth, normals"),
        (
            {"segmentation": LOGITS, "depth": DEPTH},
            LABELS,
            "predictions: task 'normals' is missing, got segmentation, d",
        ),
        ((LOGITS, DEPTH, NORMALS), LABELS[:2], "labels: got 2 entries, expected one for each"),
        ((LOGITS, DEPTH, NORMALS), None, "label_ids: got None, expected labels of segmentation, depth, normals"),
        ((LOGITS, DEPTH, "x"), LABELS, "predictions of task 'normals': got str, expected a tensor or an array"),
    ],
)
def test_batches_that_do_not_fit_are_one_clear_line(predictions: Any, labels: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message) as raised:
        dense_metrics()(Prediction(predictions, labels))
    assert "\n" not in str(raised.value)


def test_images_of_another_size_in_one_published_batch() -> None:
    metrics = dense_metrics()
    first, second = Images(2), Images(2, size=(4, 8))
    metrics(Prediction(predicted(first), first.labels()), compute_result=False)
    with pytest.raises(MetricError, match="task 'normals': images with 32 pixels after images with 48, expected one"):
        metrics(Prediction(predicted(second), second.labels()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_names": ["segmentation", "dept"]}, "task_names: 'dept' is not known .did you mean \"depth\""),
        ({"batch_size": 0}, "batch_size: 0 is not valid, expected 1 or more"),
        ({"num_classes": 1}, "num_classes: 1 is not valid, expected 2 or more"),
        ({"delta_m_average": "mean"}, "delta_m_average: 'mean' is not known"),
        ({"delta_m_base": {}}, "delta_m_base: is empty"),
        (
            {"delta_m_base": {"depth_abs_eror": 1.0}},
            "delta_m_base: 'depth_abs_eror' is no metric .did you mean \"depth_abs_e",
        ),
        ({"delta_m_base": {"depth_abs_error_batch_mean": 1.0}}, 'is no metric .did you mean "depth_abs_error"'),
        ({"delta_m_base": {"depth_abs_error": 0.0}}, r"delta_m_base\.depth_abs_error: 0\.0 is not valid"),
        ({"task_names": ["segmentation"], "delta_m_base": {"depth_abs_error": 1.0}}, "'depth_abs_error' is no metric"),
    ],
)
def test_options_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DenseMetrics(**{"task_names": TASKS, "num_classes": NUM_CLASSES, **arguments})


# --- memory and ranks ---------------------------------------------------------------------------------------------


def held_bytes(metrics: DenseMetrics) -> int:
    """Of the tensors that a metric keeps, wherever they are, with what they are views of."""
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for entry in value:
                walk(entry)
        elif hasattr(value, "__dict__"):
            for entry in vars(value).values():
                walk(entry)

    for accumulator in metrics.accumulators.values():
        walk(accumulator)
    return sum(storages.values())


def test_no_predictions_are_kept() -> None:
    metrics = dense_metrics(batch_size=2)
    images = Images(9, size=(60, 80))
    batch = Prediction(predicted(images), images.labels())
    metrics(batch, compute_result=False)
    once = held_bytes(metrics)
    for _ in range(6):
        metrics(batch, compute_result=False)
    # 180,000 counts, and of one image that waits for the second of its batch the angles, in float64.
    assert held_bytes(metrics) == once < 8 * (180_000 + 60 * 80 + 200)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return launch(tmp_path_factory.mktemp("dense"), "tests.metrics.dense_worker", timeout=120)


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["gathered", "each rank"])
@pytest.mark.parametrize("number", NUMBERS)
def test_two_processes_give_what_one_gives(ranks: Runs, number: int, how: str) -> None:
    images = Images(number)
    expected = measure(dense_metrics(), predicted(images), images.labels(), number)
    for results in (ranks.one, *ranks.ranks):
        assert results[f"{number}/{how}"]["metrics"] == pytest.approx(expected, rel=1e-12)
    assert [results[f"{number}/{how}"]["world_size"] for results in (ranks.one, *ranks.ranks)] == [1, 2, 2]

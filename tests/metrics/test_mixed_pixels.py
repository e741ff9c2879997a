"""Metrics of tasks of pixels, next to tasks of rows, against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from transformers import EvalPrediction

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.mixed import MixedMetrics, constant_metrics

TASKS = {
    "scene": TaskType("classification", 3),
    "road": TaskType("segmentation", 5),
    "flow": TaskType("dense_regression", 2, unit="px", means=(1.0, 2.0), stds=(3.0, 0.5)),
    "height": TaskType("dense_regression"),
}
NAMES = ("labels", "road", "flow", "height")
B, H, W = 7, 6, 5


def made_up() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    missing = torch.rand(B, H, W, generator=generator) < 0.3
    outputs = (
        torch.randn(B, 3, generator=generator),
        torch.randn(B, 5, H, W, generator=generator),
        torch.randn(B, 2, H, W, generator=generator),
        torch.randn(B, 1, H, W, generator=generator),
    )
    flow = torch.randn(B, 2, H, W, generator=generator)
    flow[:, 1] = flow[:, 1].masked_fill(missing, torch.nan)
    labels = (
        torch.randint(3, (B, 1), generator=generator).float(),
        # Class 4 is in no label, class 3 in none of the predictions.
        torch.randint(4, (B, H, W), generator=generator).masked_fill(missing, -100),
        flow,
        torch.randn(B, 1, H, W, generator=generator).masked_fill(missing[:, None], torch.nan),
    )
    outputs[1][:, 3] = -9
    return outputs, labels


def measured(metrics: MixedMetrics, size: int) -> dict[str, float]:
    outputs, labels = made_up()
    for start in range(0, B, size):
        rows = slice(start, start + size)
        batch = EvalPrediction(tuple(o[rows] for o in outputs), tuple(one[rows] for one in labels))
        found = metrics(batch, compute_result=start + size >= B)
    return found


@pytest.mark.parametrize("size", [1, 3, B])
def test_they_are_scikit_learn_s_over_all_pixels(size: int) -> None:
    (_, road, flow, height), (_, classes, flows, heights) = made_up()
    asked = {"height": ["r2", "rmse", "pearson"], "flow": ["mae", "rmse"]}
    found = measured(MixedMetrics(TASKS, asked, NAMES), size)
    known = (classes >= 0).numpy()
    true, said = classes.numpy()[known], road.argmax(1).numpy()[known]
    assert found["road_miou"] == pytest.approx(sklearn.jaccard_score(true, said, average="macro"))
    assert found["road_pixel_accuracy"] == pytest.approx(sklearn.accuracy_score(true, said))
    there = ~heights.isnan()
    pair = heights[there].double().numpy(), height[there].double().numpy()
    assert found["height_r2"] == pytest.approx(sklearn.r2_score(*pair))
    assert found["height_rmse"] == pytest.approx(sklearn.root_mean_squared_error(*pair))
    assert found["height_pearson"] == pytest.approx(np.corrcoef(*pair)[0, 1])
    absolute, squared = [], []
    for channel, std in enumerate((3.0, 0.5)):
        there = ~flows[:, channel].isnan()
        pair = flows[:, channel][there].double().numpy(), flow[:, channel][there].double().numpy()
        absolute.append(std * sklearn.mean_absolute_error(*pair))
        squared.append(std * sklearn.root_mean_squared_error(*pair))
    assert found["flow_mae"] == pytest.approx(np.mean(absolute))
    assert found["flow_rmse"] == pytest.approx(np.mean(squared))


def test_what_tables_say() -> None:
    infos = {info.key: info for info in MixedMetrics(TASKS, label_names=NAMES).infos}
    assert list(infos) == ["scene_accuracy", "scene_f1_macro", "road_miou", "road_pixel_accuracy", "flow_mae",
                           "flow_rmse", "height_mae", "height_rmse"]  # fmt: skip
    assert infos["road_miou"].ideal == 1 and infos["road_miou"].counted and not infos["road_pixel_accuracy"].counted
    assert infos["flow_mae"].unit == "px" and not infos["flow_mae"].higher_is_better


def test_a_task_without_a_labelled_pixel_is_left_out_and_a_nan_is_no_better() -> None:
    outputs, labels = made_up()
    labels[1][:] = -100
    outputs[3][0] = torch.nan
    found = MixedMetrics(TASKS, label_names=NAMES)(EvalPrediction(outputs, labels))
    assert "road_miou" not in found and math.isnan(found["height_mae"]) and not math.isnan(found["flow_mae"])


def test_the_constant_predictor() -> None:
    _, labels = made_up()
    outputs = {
        "scene": torch.tensor([0.0, 1.0, 0.0]), "road": torch.tensor([0.0, 0.0, 2.0, 0.0, 1.0]),
        "flow": torch.tensor([0.5, -1.0]), "height": torch.zeros(1),
    }  # fmt: skip
    batches = zip(*(column.split(2) for column in labels), strict=True)
    found = constant_metrics(TASKS, outputs, NAMES, batches)
    known = labels[1][labels[1] >= 0]
    assert found["road_pixel_accuracy"] == pytest.approx((known == 2).double().mean().item())
    assert found["height_mae"] == pytest.approx(labels[3].double().abs().nanmean().item())
    expected = [3 * (labels[2][:, 0] - 0.5).abs().mean().item(), 0.5 * (labels[2][:, 1] + 1).abs().nanmean().item()]
    assert found["flow_mae"] == pytest.approx(np.mean(expected), rel=1e-6)


def test_what_does_not_fit_is_one_line() -> None:
    outputs, labels = made_up()
    metrics = MixedMetrics(TASKS, label_names=NAMES)
    message = (
        r"^task 'road': predictions \(7, 2, 6, 5\) and labels \(7, 6, 5\), expected \[B, 5, H, W\] and \[B, H, W\]"
    )
    with pytest.raises(MetricError, match=message):
        metrics(EvalPrediction((outputs[0], outputs[2], outputs[1], outputs[3]), labels))
    message = r"^task 'height': predictions \(7, 1, 6, 5\) and labels \(7, 2, 6, 5\), expected both \[B, 1, H, W\]"
    with pytest.raises(MetricError, match=message):
        metrics(EvalPrediction(outputs, (*labels[:3], labels[2])))
    labels[1][0, 0, 0] = 5
    with pytest.raises(MetricError, match=r"^task 'road': labels: 1 pixels are not valid, expected classes 0 to 4"):
        metrics(EvalPrediction(outputs, labels))
    with pytest.raises(OptionError, match=r"^label_names: labels, expected 'road' among them$"):
        MixedMetrics(TASKS)

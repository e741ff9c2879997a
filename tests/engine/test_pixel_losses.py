"""Losses of tasks of pixels against a loop over pixels, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import TaskType

TASKS = {
    "road": TaskType("segmentation", 3),
    "scene": TaskType("classification", 2),
    "parts": TaskType("segmentation", 4, class_weights=(0.5, 1.0, 2.0, 0.25)),
    "flow": TaskType("dense_regression", 2),
    "height": TaskType("dense_regression", unit="m"),
}
B, H, W = 3, 4, 5


def made_up(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs with gradients, and a batch of which a third of the labels is missing, and all heights of one image."""
    generator = torch.Generator().manual_seed(0)
    outputs = {}
    for name, task in TASKS.items():
        shape = (B, task.size, H, W) if task.items == "pixels" else (B, task.size)
        outputs[name] = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    missing = torch.rand(B, H, W, generator=generator) < 1 / 3
    batch = {
        "labels": torch.tensor([[1.0], [math.nan], [0.0]]),
        "road": torch.randint(3, (B, H, W), generator=generator).masked_fill(missing, -100),
        "parts": torch.randint(4, (B, H, W), generator=generator).masked_fill(missing, -1),
        "flow": torch.randn(B, 2, H, W, generator=generator),
        "height": torch.randn(B, 1, H, W, generator=generator).masked_fill(missing[:, None], torch.nan),
    }
    batch["flow"][0, 1, 2, 3] = torch.nan  # one channel of a pixel
    batch["height"][1] = torch.nan
    return outputs, batch


def by_loop(name: str, output: Tensor, labels: Tensor) -> tuple[float, float]:
    """Weighted sum of the losses, and of the weights in units of the smallest."""
    task, total, count = TASKS[name], 0.0, 0.0
    for b in range(B):
        for y in range(H):
            for x in range(W):
                if task.type == "segmentation":
                    label = int(labels[b, y, x])
                    if label < 0:
                        continue
                    scores = output[b, :, y, x].tolist()
                    weight = task.class_weights[label] / min(task.class_weights) if task.class_weights else 1.0
                    total += weight * (math.log(sum(map(math.exp, scores))) - scores[label])
                    count += weight
                    continue
                for channel in range(task.size):
                    value = float(labels[b, channel, y, x])
                    if not math.isnan(value):
                        total += abs(float(output[b, channel, y, x]) - value)
                        count += 1
    return total, count


def test_the_loop_over_pixels() -> None:
    outputs, batch = made_up()
    losses = MixedLosses(TASKS)
    found, num_items = losses({"logits": tuple(outputs.values())}, batch)
    assert torch.equal(losses.count(batch).double(), num_items)
    for k, name in enumerate(TASKS):
        if name == "scene":
            expected = functional.cross_entropy(outputs[name][[0, 2]], torch.tensor([1, 0])).item(), 2
        else:
            total, count = by_loop(name, outputs[name].detach(), batch[name])
            expected = total / count, count
        assert found[k].item() == pytest.approx(expected[0], rel=1e-12)
        assert num_items[k].item() == pytest.approx(expected[1], rel=1e-12)


def test_gradients_are_zero_where_nothing_is_known_and_finite_everywhere() -> None:
    outputs, batch = made_up()
    losses, _ = MixedLosses(TASKS)({"logits": tuple(outputs.values())}, batch)
    losses.sum().backward()
    road, flow = outputs["road"].grad, outputs["flow"].grad
    assert torch.equal(road.abs().amax(1) > 0, batch["road"] >= 0)
    assert torch.equal(flow != 0, ~batch["flow"].isnan())
    assert (outputs["height"].grad[1] == 0).all()
    assert all(output.grad.isfinite().all() for output in outputs.values())


def test_a_task_without_labels_is_absent_and_still_reached() -> None:
    outputs, batch = made_up()
    del batch["road"]
    batch["height"][:] = torch.nan
    losses, num_items = MixedLosses(TASKS)({"logits": tuple(outputs.values())}, batch)
    losses.sum().backward()
    for name in ("road", "height"):
        k = list(TASKS).index(name)
        assert losses[k] == 0 and num_items[k] == 0 and (outputs[name].grad == 0).all()


def test_half_precision_is_summed_in_float32() -> None:
    outputs, batch = made_up(torch.bfloat16)
    losses, _ = MixedLosses(TASKS)({"logits": tuple(outputs.values())}, batch)
    total, count = by_loop("flow", outputs["flow"].detach(), batch["flow"])
    assert losses.dtype == torch.float32 and losses[3].item() == pytest.approx(total / count, rel=1e-5)


def test_micro_batches_make_the_whole() -> None:
    outputs, batch = made_up()
    losses = MixedLosses(TASKS)
    whole, _ = losses({"logits": tuple(outputs.values())}, batch)
    parts = [losses({"logits": tuple(o[rows] for o in outputs.values())}, {k: v[rows] for k, v in batch.items()})
             for rows in (slice(0, 1), slice(1, 3))]  # fmt: skip
    items = torch.stack([count for _, count in parts])
    torch.testing.assert_close((torch.stack([loss for loss, _ in parts]) * items).sum(0) / items.sum(0), whole)


@pytest.mark.parametrize(
    ("column", "wrong", "message"),
    [
        ("road", torch.zeros(B, 1, H, W, dtype=torch.int64), r"^task 'road': got outputs \(3, 3, 4, 5\) and labels"),
        ("road", torch.zeros(B, H, W), r"^task 'road': got labels of torch.float32, expected class numbers \(int64\)$"),
        ("flow", torch.zeros(B, 2, H, W, dtype=torch.int64), r"^task 'flow': got labels of torch.int64, expected"),
        ("road", torch.full((B, H, W), 3), r"^labels: 3 of task 'road' is none, expected a class from 0 to 2, or -100"),
        ("flow", torch.full((B, 2, H, W), torch.inf), r"^labels: inf of task 'flow' is none, expected a finite number"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_are_one_line(column: str, wrong: Tensor, message: str) -> None:
    outputs, batch = made_up()
    with pytest.raises(TaskLossError, match=message):
        MixedLosses(TASKS)({"logits": tuple(outputs.values())}, {**batch, column: wrong})


def test_outputs_and_names_that_do_not_fit_are_one_line() -> None:
    outputs, batch = made_up()
    with pytest.raises(TaskLossError, match=r"^logits: got 3 outputs of pixels, expected .*\(road, parts, flow, h"):
        MixedLosses(TASKS)({"logits": tuple(outputs.values())[:-1]}, batch)
    swapped = [outputs[name] for name in ("parts", "scene", "road", "flow", "height")]
    with pytest.raises(TaskLossError, match=r"^task 'road': got outputs \(3, 4, 4, 5\), expected \[B, 3, H, W\]$"):
        MixedLosses(TASKS)({"logits": tuple(swapped)}, batch)
    with pytest.raises(OptionError, match=r"^tasks: 'labels' is the name of another column of a batch"):
        MixedLosses({"labels": TaskType("segmentation", 2)})
    with pytest.raises(OptionError, match=r"^tasks\.h\.class_weights: a regression task has no classes$"):
        MixedLosses({"h": TaskType("dense_regression", class_weights=(2.0,))})

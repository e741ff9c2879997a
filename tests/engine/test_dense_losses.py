"""Dense losses against the recorded official ones and numpy loops; missing labels never reach a gradient."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.dense import (
    dense_item_counts,
    dense_task_losses,
    depth_loss,
    image_class_loss,
    normals_loss,
    segmentation_loss,
    unit_vectors,
)

PARITY = Path(__file__).parents[1] / "parity_data" / "metrics.npz"
TASKS = ("segmentation", "depth", "normals")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(PARITY).items() if "_" in key}


def made_up(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Predictions and labels of 4 images; missing here and there, the last image has no label of any task."""
    generator = torch.Generator().manual_seed(3)
    outputs = {
        "segmentation": torch.randn(4, 5, 6, 7, generator=generator),
        "depth": torch.randn(4, 1, 6, 7, generator=generator),
        "normals": torch.randn(4, 3, 6, 7, generator=generator),
    }
    labels = {
        "segmentation": torch.randint(-1, 5, (4, 6, 7), generator=generator),
        "depth": torch.rand(4, 6, 7, generator=generator) + 0.1,
        "normals": unit_vectors(torch.randn(4, 3, 6, 7, generator=generator)),
    }
    hidden = torch.rand(4, 6, 7, generator=generator) < 0.3
    hidden[3] = True
    labels["segmentation"][3] = -1
    labels["depth"][hidden] = 0
    labels["normals"].movedim(1, -1)[hidden] = 0
    floats = ("depth", "normals")
    return (
        {name: value.to(dtype).requires_grad_() for name, value in outputs.items()},
        {name: value.to(dtype) if name in floats else value for name, value in labels.items()},
    )


# --- values -------------------------------------------------------------------------------------------------------


def test_the_official_losses(recorded: dict[str, Tensor]) -> None:
    loss, items = segmentation_loss(recorded["loss_seg_logp"], recorded["loss_seg_label"])
    assert loss.item() == pytest.approx(recorded["loss_seg"].item(), rel=1e-12)
    assert items == recorded["loss_seg_label"].ne(-1).sum()
    for predictions in (recorded["depth_pred"], recorded["depth_pred"].squeeze(1)):
        loss, items = depth_loss(predictions, recorded["depth_true"].squeeze(1))
        assert loss.item() == pytest.approx(recorded["loss_depth"].item(), rel=1e-12)
        assert items == recorded["depth_true"].ne(0).sum()
    loss, items = normals_loss(recorded["normal_pred"], recorded["normal_true"])
    assert loss.item() == pytest.approx(recorded["loss_normal"].item(), rel=1e-12)
    assert items == recorded["normal_true"].ne(0).any(dim=1).sum()


def test_pixel_by_pixel_in_numpy() -> None:
    outputs, labels = made_up()
    sums, counts = np.zeros(3), np.zeros(3)
    given = {name: value.detach().numpy() for name, value in outputs.items()}
    for b, y, x in np.ndindex(4, 6, 7):
        label = int(labels["segmentation"][b, y, x])
        if label >= 0:
            scores = given["segmentation"][b, :, y, x]
            sums[0] += np.log(np.exp(scores).sum()) - scores[label]
            counts[0] += 1
        depth = float(labels["depth"][b, y, x])
        if depth != 0:
            sums[1] += abs(given["depth"][b, 0, y, x] - depth)
            counts[1] += 1
        normal = labels["normals"][b, :, y, x].numpy()
        if normal.any():
            found = given["normals"][b, :, y, x]
            sums[2] += 1 - found @ normal / np.sqrt(found @ found)
            counts[2] += 1
    losses, num_items = dense_task_losses(outputs, labels, TASKS)
    np.testing.assert_allclose(losses.detach().numpy(), sums / counts, rtol=1e-12)
    assert num_items.tolist() == counts.tolist() and 0 < counts.min() < counts.max() < 4 * 42
    in_order, _ = dense_task_losses([outputs[name] for name in TASKS[::-1]], labels, TASKS[::-1])
    assert torch.equal(in_order, losses.flip(0))


def test_half_precision_is_computed_in_float32() -> None:
    outputs, labels = made_up(torch.float32)
    halves = {name: value.detach().bfloat16().requires_grad_() for name, value in outputs.items()}
    losses, num_items = dense_task_losses(halves, labels, TASKS)
    exact, _ = dense_task_losses({name: value.float() for name, value in halves.items()}, labels, TASKS)
    assert losses.dtype == num_items.dtype == torch.float32 and torch.equal(losses, exact)
    many = torch.full((2, 500, 500), 2.0)
    assert depth_loss(torch.ones_like(many).bfloat16(), many)[1] == 500_000  # bfloat16 ends counting at 256


def test_a_prediction_s_length_does_not_matter_and_zero_is_finite() -> None:
    _, labels = made_up()
    predictions = torch.randn(4, 3, 6, 7, dtype=torch.float64)
    loss, _ = normals_loss(predictions, labels["normals"])
    torch.testing.assert_close(normals_loss(7 * predictions, labels["normals"])[0], loss)
    zero = torch.zeros(4, 3, 6, 7, requires_grad=True)
    loss, _ = normals_loss(zero, labels["normals"].float())
    loss.backward()
    assert loss == 1 and zero.grad is not None and 0 < zero.grad.abs().max() <= 1
    short = 1e-9 * torch.randn(4, 3, 6, 7)
    torch.testing.assert_close(unit_vectors(short).norm(dim=1), torch.ones(4, 6, 7))


# --- missing labels -----------------------------------------------------------------------------------------------


def test_what_is_missing_changes_nothing() -> None:
    outputs, labels = made_up()
    losses, num_items = dense_task_losses(outputs, labels, TASKS)
    losses.sum().backward()
    known = {name: value.detach()[:3].requires_grad_() for name, value in outputs.items()}
    expected, counts = dense_task_losses(known, {name: value[:3] for name, value in labels.items()}, TASKS)
    assert torch.equal(losses, expected) and torch.equal(num_items, counts)
    expected.sum().backward()
    masks = {
        "segmentation": labels["segmentation"] < 0,
        "depth": labels["depth"] == 0,
        "normals": ~labels["normals"].any(dim=1),
    }
    for name in TASKS:
        gradient, of_known = outputs[name].grad, known[name].grad
        assert gradient is not None and of_known is not None and gradient.isfinite().all()
        assert torch.equal(gradient[:3], of_known) and gradient[3].eq(0).all()
        assert gradient.movedim(1, -1)[masks[name]].eq(0).all()
        assert gradient.movedim(1, -1)[~masks[name]].ne(0).any(dim=-1).all()


def test_nan_and_minus_100_are_missing_too() -> None:
    outputs, labels = made_up()
    expected, counts = dense_task_losses(outputs, labels, TASKS)
    labels["segmentation"][labels["segmentation"] == -1] = -100
    labels["depth"][labels["depth"] == 0] = torch.nan
    hidden = ~labels["normals"].any(dim=1)
    labels["normals"][:, 1][hidden] = torch.nan
    losses, num_items = dense_task_losses(outputs, labels, TASKS)
    assert torch.equal(losses, expected) and torch.equal(num_items, counts)
    losses.sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in outputs.values())


@pytest.mark.parametrize("given", ["empty", "none"])
def test_a_task_without_labels_is_absent_but_reached(given: str) -> None:
    outputs, labels = made_up()
    empty = {
        "segmentation": torch.full((4, 6, 7), -1),
        "depth": torch.zeros(4, 6, 7),
        "normals": torch.full((4, 3, 6, 7), torch.nan),
    }
    for name, k in zip(TASKS, range(3), strict=True):
        part = {**labels, name: empty[name] if given == "empty" else None}
        losses, num_items = dense_task_losses(outputs, part, TASKS)
        assert losses[k] == 0 and num_items[k] == 0 and losses.gt(0).sum() == 2
        (gradient,) = torch.autograd.grad(losses.sum(), outputs[name])
        assert gradient.eq(0).all()


# --- classes of whole images --------------------------------------------------------------------------------------


def test_images_with_a_class_beside_pixels() -> None:
    outputs, labels = made_up()
    scene = torch.randn(4, 3, dtype=torch.float64)
    losses, num_items = dense_task_losses(
        {**outputs, "scene": scene}, {**labels, "scene": torch.tensor([2, -1, 0, -1])}, ("scene", "depth"), ["scene"]
    )
    by_hand = -(scene.log_softmax(1)[0, 2] + scene.log_softmax(1)[2, 0]) / 2
    torch.testing.assert_close(losses[0], by_hand)
    assert num_items.tolist() == [2, labels["depth"].ne(0).sum()]
    assert image_class_loss(scene, torch.full((4,), -1))[0] == 0


def test_counts_before_the_forward_pass_are_those_of_the_losses() -> None:
    outputs, labels = made_up()
    names = (*TASKS, "scene", "room")
    classes = torch.tensor([[0, -1], [1, -1], [-1, -1], [2, -100]])
    given = {**labels, "scene": classes[:, 0], "room": classes[:, 1]}
    both = {**outputs, "scene": torch.randn(4, 3), "room": torch.randn(4, 2)}
    _, num_items = dense_task_losses(both, given, names, ["scene", "room"])
    count = partial(dense_item_counts, task_names=names, image_tasks=("scene", "room"))
    assert count({**labels, "image_labels": classes}).tolist() == num_items.tolist()
    assert num_items.tolist()[3:] == [3, 0]
    assert count({"depth": labels["depth"]}).tolist() == [0, num_items[1], 0, 0, 0]


# --- what is refused ----------------------------------------------------------------------------------------------


def test_shapes_and_types_that_do_not_fit_are_one_line() -> None:
    outputs, labels = made_up()
    cases = [
        ("segmentation", labels["depth"], r"segmentation: got labels of torch\.float64, expected class numbers"),
        ("segmentation", labels["normals"], r"segmentation: got predictions \(4, 5, 6, 7\) and labels \(4, 3, 6, 7\)"),
        ("depth", labels["depth"][:, :5], r"depth: got .* expected \[B, H, W\] \(or \[B, 1, H, W\]\) and \[B, H, W\]$"),
        ("normals", labels["depth"], r"normals: got .* expected \[B, 3, H, W\] both$"),
    ]
    for name, wrong, message in cases:
        with pytest.raises(TaskLossError, match=message):
            dense_task_losses(outputs, {name: wrong}, TASKS)
    with pytest.raises(TaskLossError, match=r"^task 'scene': image class: got .* expected \[B, C\] and \[B\]$"):
        dense_task_losses({"scene": torch.zeros(4, 3)}, {"scene": torch.zeros(3).long()}, ["scene"], ["scene"])
    with pytest.raises(OptionError, match=r"^task_names: 'normal' is not known \(did you mean \"normals\"\?\)"):
        dense_item_counts(labels, ["normal"])
    with pytest.raises(TaskLossError, match=r"^image_labels: got shape \(4,\), expected \[B, 1\].*\(scene\)$"):
        dense_item_counts({"image_labels": torch.zeros(4)}, ["scene"], ["scene"])


def test_masks_with_255() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 4, 4), generator=generator)
    labels[0, :2], labels[1, 3] = 255, -1
    expected = torch.nn.functional.cross_entropy(logits, labels.masked_fill(labels == -1, 255), ignore_index=255)
    names, batch = ["segmentation", "kind"], {"segmentation": labels, "image_labels": torch.tensor([[255], [1]])}
    outputs = {"segmentation": logits, "kind": logits[:, :, 0, 0]}
    by_task = {"segmentation": labels, "kind": batch["image_labels"][:, 0]}
    losses, num_items = dense_task_losses(outputs, by_task, names, ["kind"], ignore_index=255)
    assert float(losses[0]) == pytest.approx(float(expected), rel=1e-12)
    counts = [2 * 16 - 8 - 4, 1]
    assert num_items.tolist() == counts == dense_item_counts(batch, names, ["kind"], ignore_index=255).tolist()
    with pytest.raises(
        TaskLossError, match=r"^segmentation: labels: 255 is no class, expected 0 to 2; where it stands"
    ):
        dense_task_losses(outputs, by_task, names, ["kind"])

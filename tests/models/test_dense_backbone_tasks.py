"""`dense_backbone` with tasks of any types of images and pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models import DenseBackboneConfig, DenseBackboneModel, DenseBackboneOptions
from hf_bilb.models.dense.backbone import build_dense_backbone
from tests.models.files import saved_and_loaded

ENCODER = {"model_type": "dinov2", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
           "mlp_ratio": 2, "image_size": 14, "patch_size": 7}  # fmt: skip
TASKS = {
    "road": TaskType("segmentation", 3, ("sky", "road", "tree")),
    "scene": TaskType("classification", 4),
    "depth": TaskType("dense_regression", unit="m", means=(3.0,), stds=(2.0,)),
    "parts": TaskType("segmentation", 5, class_weights=(1.0, 2.0, 1.0, 1.0, 4.0)),
    "light": TaskType("regression", 2),
    "flow": TaskType("dense_regression", 2),
}
B, SIZE = 4, 14


def build(tasks: dict[str, TaskType] | None = None) -> DenseBackboneModel:
    torch.manual_seed(0)
    options = DenseBackboneOptions(ENCODER, decoder_size=8)
    return build_dense_backbone(options, tasks=TASKS if tasks is None else tasks, image_size=SIZE)


def batch(images: int = B) -> dict[str, Tensor]:
    """Of which the last image has no label at all, and the others some."""
    generator = torch.Generator().manual_seed(1)
    frame = (images, SIZE, SIZE)
    columns = {
        "pixel_values": torch.rand(images, 3, SIZE, SIZE, generator=generator),
        "labels": torch.cat([torch.randint(4, (images, 1), generator=generator).float(),
                             torch.randn(images, 2, generator=generator)], dim=1),
        "road": torch.randint(-1, 3, frame, generator=generator),
        "depth": torch.randn(images, 1, SIZE, SIZE, generator=generator),
        "parts": torch.randint(0, 5, frame, generator=generator),
        "flow": torch.randn(images, 2, SIZE, SIZE, generator=generator),
    }  # fmt: skip
    columns["labels"][-1] = columns["depth"][-1] = columns["flow"][-1] = torch.nan
    columns["road"][-1] = columns["parts"][-1] = columns["parts"][0] = -100
    columns["depth"][:, :, 3] = torch.nan
    return columns


def test_predictions_and_losses_are_those_of_the_tasks() -> None:
    model, columns = build(), batch()
    output = model(**columns)
    sizes = [(B, 3, SIZE, SIZE), (B, 4), (B, 1, SIZE, SIZE), (B, 5, SIZE, SIZE), (B, 2), (B, 2, SIZE, SIZE)]
    assert [tuple(part.shape) for part in output.logits] == sizes
    losses, num_items = MixedLosses(TASKS)(output, columns)
    torch.testing.assert_close(output.losses, losses)
    assert torch.equal(output.num_items, num_items) and output.router_features.shape == (B, 6 * 8)
    assert output.num_items[1] == 3 and output.num_items[2] == 3 * 13 * SIZE


def test_its_predictions_are_those_of_the_papers_model_with_as_many_outputs() -> None:
    """One architecture, whichever way the tasks are given."""
    names = ["segmentation", "depth", "scene"]
    typed = build({"segmentation": TASKS["road"], "depth": TASKS["depth"], "scene": TASKS["scene"]}).eval()
    torch.manual_seed(0)
    fixed = build_dense_backbone(
        DenseBackboneOptions(ENCODER, decoder_size=8), task_names=names, num_classes=3, image_tasks={"scene": 4}
    ).eval()
    assert {name: value.shape for name, value in typed.state_dict().items()} == {
        name: value.shape for name, value in fixed.state_dict().items()
    }
    fixed.load_state_dict(typed.state_dict())
    pixels = batch()["pixel_values"]
    for name, one, other in zip(names, typed(pixels).logits, fixed(pixels).logits, strict=True):
        assert torch.equal(one.squeeze(1) if name == "depth" else one, other)
    labels = batch()["road"]
    torch.testing.assert_close(
        typed(pixels, segmentation=labels).losses[0], fixed(pixels, segmentation=labels).losses[0]
    )


def test_an_image_without_labels_gives_nothing_and_every_parameter_is_reached() -> None:
    model, columns = build(), batch()
    columns["pixel_values"].requires_grad_()
    losses = model(**columns).losses
    seen = {"parts": [1, 2]}
    for name, loss in zip(TASKS, losses, strict=True):
        (gradient,) = torch.autograd.grad(loss, columns["pixel_values"], retain_graph=True)
        reached = gradient.abs().amax(dim=(1, 2, 3)).gt(0).nonzero().flatten().tolist()
        assert reached == seen.get(name, [0, 1, 2]) and gradient.isfinite().all(), name
    del columns["road"], columns["labels"]  # absent: reached all the same
    model(**columns).losses.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["encoder.embeddings.mask_token"]


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model, columns = build(), batch()
    for loaded in saved_and_loaded(model, tmp_path, ("task_names", "tasks", "image_size", "num_router_features")):
        assert loaded.config.task_types == TASKS and list(loaded.config.task_types) == list(TASKS)
        assert torch.equal(loaded(**columns).losses, model(**columns).losses)


def test_images_alone_need_no_decoder_and_single_outputs_are_one_tensor() -> None:
    model = build({"warm": TaskType("multi_label"), "light": TaskType("regression")})
    output = model(batch()["pixel_values"], labels=batch()["labels"][:, :2].clamp(0, 1))
    assert output.logits.shape == (B, 2) and output.losses.shape == (2,) and not hasattr(model, "heads")
    assert build({"road": TASKS["road"]})(batch()["pixel_values"]).logits[0].shape == (B, 3, SIZE, SIZE)


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.columns = batch(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def trained(folder: Path, batch_size: int, accumulated: int) -> tuple[BilevelMTLTrainer, DenseBackboneModel]:
    model = build().double()
    arguments = BilevelMTLTrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated, max_steps=3,
        learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", balancer="ls", report_to=[], use_cpu=True,
        label_names=["labels", "road", "depth", "parts", "flow"], save_strategy="no", max_grad_norm=0.0,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer = BilevelMTLTrainer(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(), task_item_counts=MixedLosses(TASKS).count
    )
    trainer.train()
    return trainer, model


def test_the_trainer_takes_the_columns_and_accumulation_is_exact(tmp_path: Path) -> None:
    (whole, one), (_, other) = trained(tmp_path / "a", 8, 1), trained(tmp_path / "b", 2, 4)
    first, second = (nn.utils.parameters_to_vector(model.parameters()).detach() for model in (one, other))
    assert (first - second).norm() <= 1e-12 * first.norm()
    exact = one.eval()(**Rows().columns).losses
    metrics = whole.evaluate()
    for k, name in enumerate(TASKS):
        assert metrics[f"eval_loss_{name}"] == pytest.approx(exact[k].item(), rel=1e-9)


def test_columns_that_no_task_has_are_one_line() -> None:
    model, columns = build(), batch()
    for name, values in (("rode", columns["road"]), ("image_labels", torch.zeros(B, 1)), ("scene", columns["road"])):
        with pytest.raises(TaskLossError, match=rf"^{name}: labels are given, but the model's tasks are road, scene, "):
            model(**columns, **{name: values})
    with pytest.raises(TaskLossError, match=r"^road: labels are given, but the model's tasks are segmentation, "):
        DenseBackboneModel(DenseBackboneConfig(ENCODER, decoder_size=8))(**batch())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"a": TaskType("token_classification", 2)}}, r"^tasks\.a\.type: token_classification is no task"),
        ({"tasks": {"pixel_values": TASKS["road"]}}, r"^tasks: 'pixel_values' is the name of another column"),
        ({"tasks": TASKS, "image_tasks": {"a": 2}}, r"^image_tasks: a do not go with tasks, which has all of them$"),
        ({"tasks": TASKS, "task_names": ["road"]}, r"^tasks: 'scene' is not among task_names"),
        ({"tasks": {"a": TASKS["scene"]}, "decoder_size": 1}, r"^decoder_size: 1 is not valid with image tasks"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DenseBackboneConfig(ENCODER, **changes)

"""MTAN-SegNet: all tasks in grouped convolutions against modules of their own, one task after the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.config.options import parse_options
from hf_bilb.errors import OptionError
from hf_bilb.losses.dense import dense_task_losses
from hf_bilb.models import MODELS, MtanConfig, MtanModel, SegNetOptions
from hf_bilb.models.dense.layers import SharedBatchNorm
from tests.models.files import saved_and_loaded
from tests.models.looped_dense import LoopedMtan, pairs_of_tasks, trunk_gradients, with_weights_of
from tests.models.test_segnet import TASKS, batch, unlike_the_first


def small(**changes: object) -> MtanModel:
    torch.manual_seed(0)
    return MtanModel(MtanConfig(**({"num_classes": 5, "width": 4} | changes)))


def losses_of(model: MtanModel, looped: LoopedMtan, inputs: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses, predictions in the tasks' order, of the loop over tasks."""
    outputs, _ = looped(inputs["pixel_values"])
    names = model.config.task_names
    finished = {
        name: out[:, 0] if name == "depth" else out / out.norm(dim=1, keepdim=True) if name == "normals" else out
        for name, out in zip(names, outputs, strict=True)
    }
    losses, _ = dense_task_losses(finished, inputs, names)
    return losses, [finished[name] for name in names]


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [TASKS, ["depth", "segmentation"], ["normals"]], ids=len)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_one_task_after_the_other(tasks: list[str], training: bool) -> None:
    model = small(task_names=tasks).double().train(training)
    unlike_the_first(model)
    looped = with_weights_of(model)
    inputs = batch(torch.float64)
    given = {name: inputs[name] for name in ("pixel_values", *tasks)}
    output = model(**given)
    losses, predictions = losses_of(model, looped, given)
    for ours, theirs in zip(output.logits, predictions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.losses, losses, rtol=1e-10, atol=1e-12)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[: len(tasks)]
    (output.losses @ weights).backward()
    (losses @ weights).backward()
    pairs = [*pairs_of_tasks(looped, model, grad=True), *trunk_gradients(looped, model)]
    for theirs, ours in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_running_statistics_are_those_of_one_task_after_the_other() -> None:
    model = small().double()
    unlike_the_first(model)
    looped, inputs = with_weights_of(model), batch(torch.float64)
    for _ in range(3):
        model(**inputs)
        losses_of(model, looped, inputs)
    for theirs, ours in pairs_of_tasks(looped, model):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert model.encoder_shared[0].norm.norm.num_batches_tracked == 9
    model.eval()
    _, predictions = losses_of(model, looped.eval(), inputs)
    for ours, theirs in zip(model(**inputs).logits, predictions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_router_features_are_the_pooled_maps_of_every_task_s_head() -> None:
    model = small().double().eval()
    inputs = batch(torch.float64)
    output = model(**inputs)
    _, maps = with_weights_of(model)(inputs["pixel_values"])
    assert model.config.num_router_features == 12 and maps.shape == (4, 12, 64, 32)
    torch.testing.assert_close(output.router_features, maps.mean(dim=(2, 3)), rtol=1e-10, atol=1e-12)


def test_the_papers_network_has_forty_four_million_weights() -> None:
    model = MtanModel(MtanConfig())
    expected = sum(parameter.numel() for parameter in LoopedMtan(64, [13, 1, 3]).parameters())
    # 1.77 times SegNet's 24,981,069, as the paper's Table has it
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 44_229_073
    assert round(expected / 24_981_069, 2) == 1.77
    assert model.config.num_router_features == 192
    cityscapes = MtanModel(MtanConfig(task_names=["segmentation", "depth"], num_classes=7))
    assert cityscapes.config.num_router_features == 128


def test_frames_of_any_size_from_32() -> None:
    model = small()
    for height, width in ((32, 32), (45, 61), (144, 192)):
        logits = model(**batch(height=height, width=width)).logits
        assert [tuple(part.shape) for part in logits] == [
            (4, 5, height, width),
            (4, height, width),
            (4, 3, height, width),
        ]


def test_no_task_reaches_another_one_s_branch() -> None:
    model, inputs = small(), batch()
    inputs["depth"] = torch.zeros_like(inputs["depth"])
    output = model(**inputs)
    output.losses.sum().backward()
    assert output.num_items[1] == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for block in model.decoder_attention:
        by_task = block.out.weight.grad.chunk(3)
        assert by_task[1].eq(0).all() and by_task[0].ne(0).any() and by_task[2].ne(0).any()


def test_the_first_weights_are_xavier_s_of_each_task_s_own_convolutions() -> None:
    model = small(width=16)
    looped = LoopedMtan(16, [5, 1, 3])
    for one in looped.modules():
        if isinstance(one, nn.Conv2d):
            nn.init.xavier_normal_(one.weight)
    for ours, theirs in ((model.encoder_attention, looped.enc_att), (model.decoder_attention, looped.dec_att)):
        for j in (2, 3, 4):
            expected = torch.cat([theirs[k][j][0].weight.flatten() for k in range(3)]).std().item()
            assert ours[j].of_shared.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert ours[j].of_own.weight.std().item() == pytest.approx(expected, rel=0.05)
            expected = torch.cat([theirs[k][j][3].weight.flatten() for k in range(3)]).std().item()
            assert ours[j].out.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert all(m.bias is None or m.bias.eq(0).all() for m in model.modules() if isinstance(m, nn.Conv2d))


# --- batch normalisation ------------------------------------------------------------------------------------------


def test_batch_norm_that_tasks_share_is_one_module_called_for_one_after_the_other() -> None:
    torch.manual_seed(0)
    ours, theirs = SharedBatchNorm(6).double(), nn.BatchNorm2d(6).double()
    unlike_the_first(ours)
    theirs.load_state_dict(ours.norm.state_dict())
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(SharedBatchNorm(6).double())
    synchronized.norm.load_state_dict(ours.norm.state_dict())
    assert type(synchronized.norm) is nn.SyncBatchNorm
    for training in (True, True, False):
        maps = torch.randn(3, 4 * 6, 5, 7, dtype=torch.float64)
        parts = [theirs.train(training)(part) for part in maps.chunk(4, dim=1)]
        for one in (ours, synchronized):
            torch.testing.assert_close(one.train(training)(maps), torch.cat(parts, dim=1), rtol=1e-12, atol=1e-12)
            for name, value in theirs.state_dict().items():
                torch.testing.assert_close(one.norm.state_dict()[name], value, rtol=1e-12, atol=1e-14)


def test_synchronized_batch_norm_is_torch_s_everywhere() -> None:
    plain, inputs = small(), batch()
    synchronized = small(sync_batch_norm=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronized.modules())
    synchronized.load_state_dict(plain.state_dict())
    torch.testing.assert_close(synchronized(**inputs).losses, plain(**inputs).losses)


# --- training -----------------------------------------------------------------------------------------------------


class Frames(torch.utils.data.Dataset):
    """Eight frames; the last four lack depth, the first two segmentation."""

    def __init__(self) -> None:
        first, second = batch(height=32), batch(height=32)
        self.columns = {name: torch.cat([first[name], second[name]]) for name in first}
        self.columns["depth"][4:] = 0
        self.columns["segmentation"][:2] = -1

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def test_the_trainer_trains_it_with_a_feature_router_and_evaluates_it(tmp_path: Path) -> None:
    seen: list[tuple] = []

    def look(prediction, compute_result):
        seen.append((prediction.predictions, prediction.label_ids))
        return {}

    arguments = BilevelMTLTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=3, learning_rate=1e-3,
        balancer={"name": "bilb", "preset": "nyuv2"}, label_names=TASKS, report_to=[], save_strategy="no",
        logging_steps=1, batch_eval_metrics=True, use_cpu=True,
    )  # fmt: skip
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = BilevelMTLTrainer(model, arguments, train_dataset=Frames(), eval_dataset=Frames(), compute_metrics=look)
    trainer.train()
    assert trainer.balancer.weights is not None and trainer.balancer.weights.shape == (3,)
    assert all((value != before[name]).any() for name, value in model.named_parameters() if "bias" not in name)
    metrics = trainer.evaluate()
    model.eval()
    whole = model(**Frames().columns)
    for k, name in enumerate(TASKS):
        assert metrics[f"eval_loss_{name}"] == pytest.approx(whole.losses[k].item(), rel=1e-5)
    predictions, labels = seen[-1]
    assert isinstance(predictions, tuple) and [part.shape for part in predictions] == [
        (4, 5, 32, 32), (4, 32, 32), (4, 3, 32, 32),
    ]  # fmt: skip
    assert isinstance(labels, tuple) and [part.ndim for part in labels] == [3, 3, 4]


# --- files, registry ----------------------------------------------------------------------------------------------


def test_saved_and_loaded_through_the_auto_classes_bit_for_bit(tmp_path: Path) -> None:
    model, inputs = small(), batch()
    model(**inputs)
    for loaded in saved_and_loaded(model, tmp_path):
        assert torch.equal(loaded(inputs["pixel_values"]).logits[2], model(inputs["pixel_values"]).logits[2])
        assert loaded.config.num_router_features == 12


def test_options_of_a_recipe_and_facts_of_the_data_make_a_config() -> None:
    spec = MODELS["mtan"]
    assert (spec.config_class, spec.model_class, spec.options) == (MtanConfig, MtanModel, SegNetOptions)
    options = parse_options(spec.options, {"width": 8}, "model")
    config = spec.config_class(**dataclasses.asdict(options), task_names=("segmentation", "depth"), num_classes=7)
    assert (config.width, config.num_router_features, config.num_classes) == (8, 16, 7)
    with pytest.raises(OptionError, match=r"^task_names: 'depths' is not known"):
        MtanConfig(task_names=["depths"])

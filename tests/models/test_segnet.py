"""SegNet with split heads: against the same layers put together by hand, its first weights, its files, its options."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_bilb.config.options import parse_options
from hf_bilb.errors import CheckpointError, OptionError, TaskLossError
from hf_bilb.losses.dense import dense_task_losses
from hf_bilb.models import MODELS, SegNetConfig, SegNetModel, SegNetOptions
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE
from tests.models.files import saved_and_loaded
from tests.models.looped_dense import LoopedSegNet, pairs_of_tasks, trunk_gradients, with_weights_of

TASKS = ["segmentation", "depth", "normals"]


def small(**changes: object) -> SegNetModel:
    torch.manual_seed(0)
    return SegNetModel(SegNetConfig(**({"num_classes": 5, "width": 4} | changes)))


def batch(dtype: torch.dtype = torch.float32, height: int = 64, width: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    frame = (4, height, width)
    normals = nn.functional.normalize(torch.randn(4, 3, height, width, generator=generator), dim=1)
    normals[1] = 0
    depth = torch.rand(frame, generator=generator) + 0.5
    depth[0, : height // 2] = 0
    return {
        "pixel_values": torch.rand(4, 3, height, width, generator=generator).to(dtype),
        "segmentation": torch.randint(-1, 5, frame, generator=generator),
        "depth": depth.to(dtype),
        "normals": normals.to(dtype),
    }


def unlike_the_first(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_outputs_losses_and_gradients_are_those_of_separate_heads(training: bool) -> None:
    model = small().double().train(training)
    unlike_the_first(model)
    looped = with_weights_of(model)
    inputs = batch(torch.float64)
    output = model(**inputs)
    (segmentation, depth, normals), maps = looped(inputs["pixel_values"])
    normals = normals / normals.norm(dim=1, keepdim=True)
    expected = (segmentation, depth[:, 0], normals)
    for ours, theirs in zip(output.logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.router_features, maps.mean(dim=(2, 3)), rtol=1e-10, atol=1e-12)
    losses, num_items = dense_task_losses(expected, inputs, TASKS)
    torch.testing.assert_close(output.losses, losses, rtol=1e-10, atol=1e-12)
    assert torch.equal(output.num_items, num_items)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    (output.losses @ weights).backward()
    (losses @ weights).backward()
    for theirs, ours in (*pairs_of_tasks(looped, model, grad=True), *trunk_gradients(looped, model)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_papers_network_has_twenty_five_million_weights() -> None:
    model = SegNetModel(SegNetConfig())
    expected = sum(parameter.numel() for parameter in LoopedSegNet(64, [13, 1, 3]).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 25_055_185
    assert model.config.num_router_features == 64


def test_frames_of_any_size_from_32() -> None:
    model = small()
    for height, width in ((32, 32), (45, 61), (144, 192)):
        logits = model(**batch(height=height, width=width)).logits
        assert [tuple(part.shape) for part in logits] == [
            (4, 5, height, width),
            (4, height, width),
            (4, 3, height, width),
        ]
    with pytest.raises(OptionError, match=r"^pixel_values: 31 x 40 is not valid, expected 32 x 32 or more$"):
        model(torch.rand(2, 3, 31, 40))


@pytest.mark.parametrize("tasks", [["depth"], ["normals", "segmentation"]])
def test_tasks_and_their_order_are_those_of_the_config(tasks: list[str]) -> None:
    model = small(task_names=tasks)
    inputs = batch()
    given = {name: inputs[name] for name in tasks}
    output = model(inputs["pixel_values"], **given)
    expected, num_items = dense_task_losses(output.logits, given, tasks)
    assert torch.equal(output.losses, expected) and torch.equal(output.num_items, num_items)
    channels = {"segmentation": 5, "depth": 1, "normals": 3}
    assert model.heads.outputs.weight.shape == (sum(channels[name] for name in tasks), 4)


def test_missing_labels_leave_every_gradient_finite_and_every_parameter_reached() -> None:
    model, inputs = small(), batch()
    inputs["depth"] = torch.zeros_like(inputs["depth"])
    output = model(**inputs)
    output.losses.sum().backward()
    assert output.num_items[1] == 0 and output.losses[1] == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    gradient = model.heads.outputs.weight.grad
    assert gradient[5].eq(0).all() and gradient[:5].ne(0).any() and gradient[6:].ne(0).any()


def test_a_label_column_that_is_not_given_is_an_absent_task_and_one_too_many_an_error() -> None:
    inputs = batch()
    output = small()(inputs["pixel_values"], depth=inputs["depth"])
    assert output.num_items.tolist() == [0, inputs["depth"].ne(0).sum(), 0]
    with pytest.raises(TaskLossError, match=r"^normals: labels are given.* tasks are segmentation, depth$"):
        small(task_names=TASKS[:2])(**inputs)


def test_without_labels_only_predictions_and_tuples_on_request() -> None:
    inputs, model = batch(), small().eval()
    output = model(inputs["pixel_values"])
    assert list(output) == ["logits"]
    torch.testing.assert_close(output.logits[2].norm(dim=1), torch.ones(4, 64, 32))
    losses, num_items, logits, features = model(**inputs, return_dict=False)
    assert torch.equal(losses, model(**inputs).losses) and torch.equal(logits[0], output.logits[0])
    assert num_items.shape == (3,) and features.shape == (4, 4)


def test_the_trainer_s_contract() -> None:
    assert list(inspect.signature(SegNetModel.forward).parameters) == [
        "self", "pixel_values", *TASKS, "return_dict",
    ]  # fmt: skip
    assert SegNetModel.accepts_loss_kwargs is False and SegNetModel.main_input_name == "pixel_values"
    assert SegNetConfig().keys_to_ignore_at_inference == list(KEYS_TO_IGNORE_AT_INFERENCE)


def test_the_first_weights_are_xavier_s_of_each_task_s_own_convolution() -> None:
    model = small(width=32)
    looped = LoopedSegNet(32, [5, 1, 3])
    for one in looped.modules():
        if isinstance(one, nn.Conv2d):
            nn.init.xavier_normal_(one.weight)
    # Standard deviations of a few thousand draws, ours against torch's own function.
    pairs = [
        (model.trunk.encoder_rest[2][0][0].weight, looped.enc3b[0].weight),
        (model.heads.hidden.weight, torch.cat([head[0].weight for head in looped.heads])),
    ]
    for ours, theirs in pairs:
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    weight = model.heads.outputs.weight
    for rows, size in ((weight[:5], 5), (weight[5:6], 1), (weight[6:], 3)):
        assert rows.std().item() == pytest.approx((2 / (32 + size)) ** 0.5, rel=0.35)
    assert all(m.bias.eq(0).all() for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model.heads.outputs.bias.eq(0).all()
    again = small(width=32).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_twenty_steps_lower_every_loss() -> None:
    model, inputs = small(), batch(height=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = model(**inputs).losses
    for _ in range(20):
        optimizer.zero_grad()
        model(**inputs).losses.sum().backward()
        optimizer.step()
    assert (model(**inputs).losses < 0.97 * before).all()


# --- files --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_through_the_auto_classes_bit_for_bit(tmp_path: Path) -> None:
    model, inputs = small(task_names=["depth", "segmentation"]), batch()
    del inputs["normals"]
    model(**inputs)  # running statistics that are not the first ones
    keys = ("task_names", "num_classes", "width", "num_router_features", "sync_batch_norm")
    for loaded in saved_and_loaded(model, tmp_path, keys):
        assert torch.equal(loaded(inputs["pixel_values"]).logits[0], model(inputs["pixel_values"]).logits[0])


def test_heads_that_are_missing_in_the_file_are_initialised_and_nothing_else(tmp_path: Path) -> None:
    model = small()
    model(**batch())
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("heads")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="its weights do not match SegNetModel: "):
        SegNetModel.from_pretrained(tmp_path)
    model, _ = SegNetModel.from_pretrained(tmp_path, output_loading_info=True)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert 0 < loaded["heads.outputs.weight"].abs().max() < 5 and loaded["heads.outputs.bias"].eq(0).all()


def test_synchronized_batch_norm_is_torch_s_and_alone_it_changes_nothing(tmp_path: Path) -> None:
    plain, inputs = small(), batch()
    synchronized = small(sync_batch_norm=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronized.modules())
    synchronized.load_state_dict(plain.state_dict())
    torch.testing.assert_close(synchronized(**inputs).losses, plain(**inputs).losses)
    synchronized.eval().save_pretrained(tmp_path)
    loaded = SegNetModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(inputs["pixel_values"]).logits[1], synchronized(inputs["pixel_values"]).logits[1])


# --- registry and options -----------------------------------------------------------------------------------------


def test_options_of_a_recipe_and_facts_of_the_data_make_a_config() -> None:
    spec = MODELS["segnet"]
    assert (spec.config_class, spec.model_class, spec.options) == (SegNetConfig, SegNetModel, SegNetOptions)
    options = parse_options(spec.options, {"width": 8}, "model")
    config = spec.config_class(**dataclasses.asdict(options), task_names=("depth",), num_classes=7)
    assert (config.width, config.num_router_features, config.task_names, config.num_classes) == (8, 8, ["depth"], 7)


def test_bad_options_and_configs_are_refused() -> None:
    with pytest.raises(OptionError, match=r"^model\.width: 0 is not valid, expected 1 or more$"):
        parse_options(SegNetOptions, {"width": 0}, "model")
    with pytest.raises(OptionError, match=r"^task_names: 'normal' is not known \(did you mean \"normals\"\?\)"):
        SegNetConfig(task_names=["depth", "normal"])
    with pytest.raises(OptionError, match="stands twice"):
        SegNetConfig(task_names=["depth", "depth"])
    with pytest.raises(OptionError, match=r"^num_classes: 0 is not valid"):
        SegNetConfig(num_classes=0)

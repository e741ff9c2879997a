"""The CNN of the papers: against the same layers put together by hand, its first weights, its files, its options."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_bilb import build_balancer
from hf_bilb.config.options import parse_options
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.models import MODELS, CelebaCnnConfig, CelebaCnnModel, CelebaCnnOptions
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE
from tests.models.files import saved_and_loaded

# Of FAMO's and LDC-MTL's network, in units of its first layer's width; "M" is a max-pooling by 2.
LAYERS = ((3, 1), "M", (1, 2), (2, 2), "M", (2, 4), (4, 4), "M", (4, 8), (8, 8))


def _model(**changes: object) -> CelebaCnnModel:
    torch.manual_seed(0)
    return CelebaCnnModel(CelebaCnnConfig(**({"task_names": ["a", "b", "c"], "image_size": 16, "width": 4} | changes)))


def _batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(10, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 2, (10, 3), generator=generator).float()
    labels[:4, 1] = torch.nan
    labels[:, 2] = torch.nan
    return pixels.to(dtype), labels.to(dtype)


class ByHand(nn.Module):
    """The papers' network with a head for each task and probabilities, as their description has it."""

    def __init__(self, width: int, num_tasks: int) -> None:
        super().__init__()
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for layer in LAYERS:
            if layer != "M":
                inputs, outputs = 3 if layer[0] == 3 else layer[0] * width, layer[1] * width
                self.convolutions.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
                self.norms.append(nn.BatchNorm2d(outputs))
        self.linear = nn.ModuleList(nn.Linear(8 * width, 8 * width, bias=False) for _ in range(2))
        self.linear_norms = nn.ModuleList(nn.BatchNorm1d(8 * width) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(8 * width, 1) for _ in range(num_tasks))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = iter(zip(self.convolutions, self.norms, strict=True))
        for layer in LAYERS:
            if layer == "M":
                hidden = nn.functional.max_pool2d(hidden, 2)
            else:
                convolution, norm = next(blocks)
                hidden = norm(convolution(hidden)).relu()
        hidden = hidden.mean(dim=(2, 3))
        for linear, norm in zip(self.linear, self.linear_norms, strict=True):
            hidden = norm(linear(hidden)).relu()
        return hidden, torch.cat([head(hidden).sigmoid() for head in self.heads], dim=1)


def _copy_by_kind(source: nn.Module, target: nn.Module) -> None:
    """Weights in the order of the layers; in `source` the heads are one linear layer."""
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d):
        for ours, theirs in zip(
            (m for m in source.modules() if isinstance(m, kind)),
            (m for m in target.modules() if isinstance(m, kind)),
            strict=True,
        ):
            theirs.load_state_dict(ours.state_dict())
    *hidden, heads = (m for m in source.modules() if isinstance(m, nn.Linear))
    for ours, theirs in zip(hidden, target.linear, strict=True):
        theirs.load_state_dict(ours.state_dict())
    for k, head in enumerate(target.heads):
        head.load_state_dict({"weight": heads.weight[k : k + 1], "bias": heads.bias[k : k + 1]})


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_outputs_losses_and_gradients_are_those_of_the_layers_put_together_by_hand(training: bool) -> None:
    ours = _model().double().train(training)
    for module in ours.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    theirs = ByHand(4, 3).double().train(training)
    _copy_by_kind(ours, theirs)
    pixels, labels = _batch(torch.float64)
    first, second = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    output = ours(first, labels)
    features, probabilities = theirs(second)
    torch.testing.assert_close(output.logits.sigmoid(), probabilities, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.router_features, features, rtol=1e-10, atol=1e-12)
    losses = [nn.functional.binary_cross_entropy(probabilities[:, 0], labels[:, 0])]
    losses.append(nn.functional.binary_cross_entropy(probabilities[4:, 1], labels[4:, 1]))
    torch.testing.assert_close(output.losses[:2], torch.stack(losses), rtol=1e-10, atol=1e-12)
    assert output.losses[2] == 0 and output.num_items.tolist() == [10, 6, 0]
    output.losses.sum().backward()
    sum(losses).backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-8, atol=1e-12)


def test_the_papers_network_has_five_million_weights() -> None:
    model = CelebaCnnModel(CelebaCnnConfig())
    expected = sum(parameter.numel() for parameter in ByHand(64, 40).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 5_197_160
    assert model.config.num_router_features == 512 and len(model.config.task_names) == 40
    assert model(torch.rand(2, 3, 64, 64)).logits.shape == (2, 40)


def test_missing_labels_leave_every_gradient_finite_and_every_parameter_reached() -> None:
    model = _model()
    model(*_batch()).losses.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.heads.weight.grad[2].eq(0).all() and model.heads.weight.grad[:2].ne(0).any()


def test_without_labels_only_predictions_and_tuples_on_request() -> None:
    pixels, labels = _batch()
    model = _model().eval()
    output = model(pixels)
    assert list(output) == ["logits"] and output.logits.shape == (10, 3)
    losses, num_items, logits, router_features = model(pixels, labels, return_dict=False)
    assert torch.equal(losses, model(pixels, labels).losses) and torch.equal(logits, output.logits)
    assert num_items.shape == (3,) and router_features.shape == (10, 32)


def test_the_trainer_s_contract() -> None:
    assert list(inspect.signature(CelebaCnnModel.forward).parameters) == [
        "self", "pixel_values", "labels", "return_dict",
    ]  # fmt: skip
    assert CelebaCnnModel.accepts_loss_kwargs is False and CelebaCnnModel.main_input_name == "pixel_values"
    config = CelebaCnnConfig()
    assert config.keys_to_ignore_at_inference == list(KEYS_TO_IGNORE_AT_INFERENCE)


def test_the_first_weights_are_torch_s_own() -> None:
    model = _model(width=32)
    convolution, linear = model.trunk[4], model.heads
    for module, inputs in ((convolution, 9 * 32), (linear, 256)):
        bound = inputs**-0.5  # uniform, as torch initialises convolutions and linear layers
        assert 0.95 * bound < module.weight.abs().max() <= bound
        assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert linear.bias.ne(0).all()
    again = _model(width=32).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_twenty_steps_lower_every_loss() -> None:
    torch.manual_seed(0)
    pixels, labels = torch.rand(32, 3, 16, 16), torch.randint(0, 2, (32, 3)).float()
    model = _model()
    before = model(pixels, labels).losses
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(pixels, labels).losses.sum().backward()
        optimizer.step()
    assert (model(pixels, labels).losses < 0.7 * before).all()


# --- files --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_through_the_auto_classes_bit_for_bit(tmp_path: Path) -> None:
    model = _model()
    model(*_batch())  # running statistics that are not the first ones
    for loaded in saved_and_loaded(model, tmp_path, ("task_names", "image_size", "width", "num_router_features")):
        torch.testing.assert_close(loaded(_batch()[0]).logits, model(_batch()[0]).logits, rtol=1e-6, atol=1e-6)


def test_heads_that_are_missing_in_the_file_are_initialised_and_nothing_else(tmp_path: Path) -> None:
    model = _model()
    model(*_batch())
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("heads")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="its weights do not match CelebaCnnModel: "):
        CelebaCnnModel.from_pretrained(tmp_path)
    model, _ = CelebaCnnModel.from_pretrained(tmp_path, output_loading_info=True)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert 0 < loaded["heads.weight"].abs().max() <= 32**-0.5


# --- registry and options -----------------------------------------------------------------------------------------


def test_options_of_a_recipe_and_facts_of_the_data_make_a_config() -> None:
    spec = MODELS["celeba_cnn"]
    assert (spec.config_class, spec.model_class, spec.options) == (CelebaCnnConfig, CelebaCnnModel, CelebaCnnOptions)
    options = parse_options(spec.options, {"width": 8}, "model")
    config = spec.config_class(**dataclasses.asdict(options), task_names=["x"], image_size=32)
    assert (config.width, config.num_router_features, config.task_names, config.image_size) == (8, 64, ["x"], 32)


def test_bad_options_and_configs_are_refused() -> None:
    with pytest.raises(OptionError, match=r"^model\.width: 0 is not valid, expected 1 or more \(the papers: 64\)$"):
        parse_options(CelebaCnnOptions, {"width": 0}, "model")
    with pytest.raises(OptionError, match=r"^image_size: 4 is not valid"):
        CelebaCnnConfig(image_size=4)
    with pytest.raises(OptionError, match="task_names"):
        CelebaCnnConfig(task_names=["a", "a"])


def test_a_feature_router_sees_the_representation_of_the_heads() -> None:
    model = _model().eval()
    output = model(*_batch())
    assert np.allclose(
        (output.router_features @ model.heads.weight.T + model.heads.bias).detach(), output.logits.detach(), atol=1e-6
    )


def test_shared_features_are_what_the_heads_read() -> None:
    model = CelebaCnnModel(CelebaCnnConfig(task_names=["a", "b", "c"], image_size=8, width=2))
    labels = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    output = model(torch.rand(2, 3, 8, 8), labels=labels)
    assert torch.equal(model.heads(output.shared_features), output.logits)
    assert "shared_features" in model.config.keys_to_ignore_at_inference
    balancer = build_balancer("mgda", 3, gradients="features").bind(model)
    balancer.backward(output.losses, output.num_items, shared_features=output.shared_features)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model(torch.rand(2, 3, 8, 8)).shared_features is None

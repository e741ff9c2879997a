"""The model: its losses against a loop, its heads' independence, its files, its first losses."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_bilb.config.options import parse_options
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.models import MODELS, Qm9MlpConfig, Qm9MlpModel, Qm9MlpOptions
from hf_bilb.models.heads import TaskHeads
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE
from tests.models.files import saved_and_loaded


def _model(**changes: object) -> Qm9MlpModel:
    torch.manual_seed(0)
    config = {"num_features": 6, "task_names": ["a", "b", "c"], "hidden_size": 16, "num_layers": 2, "head_size": 4}
    return Qm9MlpModel(Qm9MlpConfig(**(config | changes)))


def _batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(10, 6, generator=generator), torch.randn(10, 3, generator=generator)
    labels[:4, 1] = torch.nan
    labels[:, 2] = torch.nan
    return features.to(dtype), labels.to(dtype)


# --- losses and outputs -------------------------------------------------------------------------------------------


def test_losses_equal_a_loop_over_tasks_and_labels() -> None:
    model = _model().double()
    features, labels = _batch(torch.float64)
    output = model(features, labels)
    for task in range(3):
        errors = [
            (output.logits[row, task] - labels[row, task]).item() ** 2
            for row in range(10)
            if not labels[row, task].isnan()
        ]
        assert output.losses[task].item() == pytest.approx(np.mean(errors) if errors else 0.0, rel=1e-12)
        assert output.num_items[task].item() == len(errors)
    assert output.router_features.shape == (10, 16) and output.auxiliary_loss is None


def test_missing_labels_leave_every_gradient_finite_and_every_parameter_reached() -> None:
    model = _model()
    model(*_batch()).losses.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.heads.weight.grad[2].eq(0).all()  # no label of task c
    assert model.heads.weight.grad[:2].ne(0).all()


def test_without_labels_only_predictions() -> None:
    features, labels = _batch()
    model = _model()
    output = model(features)
    assert list(output) == ["logits"] and output.logits.shape == (10, 3)
    assert torch.equal(output.logits, model(features, labels).logits)


def test_return_dict() -> None:
    features, labels = _batch()
    model = _model()
    losses, num_items, logits, router_features = model(features, labels, return_dict=False)
    assert torch.equal(losses, model(features, labels).losses)
    assert torch.equal(logits, model(features, return_dict=False)[0])
    assert num_items.shape == (3,) and router_features.shape == (10, 16)


def test_the_trainer_s_contract() -> None:
    parameters = inspect.signature(Qm9MlpModel.forward).parameters
    assert list(parameters) == ["self", "features", "labels", "return_dict"]
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
    assert Qm9MlpModel.accepts_loss_kwargs is False
    config = Qm9MlpConfig()
    assert config.keys_to_ignore_at_inference == list(KEYS_TO_IGNORE_AT_INFERENCE)
    assert config.task_names == ["mu", "alpha", "homo", "lumo", "r2", "zpve", "U0", "U", "H", "G", "Cv"]


def test_float64_gradients_agree_with_finite_differences() -> None:
    model = _model(hidden_size=5, head_size=2, num_layers=1).double()
    features, labels = _batch(torch.float64)
    names = [name for name, _ in model.named_parameters()]
    values = tuple(parameter.detach().clone().requires_grad_() for parameter in model.parameters())

    def losses(*parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (features, labels)).losses

    assert torch.autograd.gradcheck(losses, values)


def test_dropout_acts_in_training_only() -> None:
    features, _ = _batch()
    model = _model(dropout=0.5)
    assert not torch.equal(model.train()(features).logits, model(features).logits)
    assert torch.equal(model.eval()(features).logits, model(features).logits)


# --- heads --------------------------------------------------------------------------------------------------------


def test_heads_equal_separate_networks() -> None:
    heads = TaskHeads(5, num_tasks=3, head_size=4).double()
    features = torch.randn(7, 5, dtype=torch.float64)
    for task, prediction in enumerate(heads(features).unbind(dim=1)):
        units = slice(4 * task, 4 * (task + 1))
        hidden = nn.functional.silu(features @ heads.hidden.weight[units].T + heads.hidden.bias[units])
        torch.testing.assert_close(prediction, hidden @ heads.weight[task] + heads.bias[task], rtol=1e-12, atol=1e-12)


def test_a_task_s_loss_reaches_no_other_task_s_head() -> None:
    model = _model()
    model(*_batch()).losses[0].backward()
    gradient = model.heads.hidden.weight.grad.view(3, 4, 16)
    assert gradient[0].abs().sum() > 0 and gradient[1:].eq(0).all()


# --- first values -------------------------------------------------------------------------------------------------


def test_first_losses_are_the_variance_of_the_labels() -> None:
    torch.manual_seed(0)
    model = Qm9MlpModel(Qm9MlpConfig())
    losses = model(torch.randn(4096, 34), torch.randn(4096, 11)).losses
    assert losses.min() > 0.9 and losses.max() < 1.15


def test_activations_keep_their_scale_through_the_trunk() -> None:
    model = _model(num_features=34, hidden_size=256, num_layers=6)
    second_moment = model.trunk(torch.randn(1000, 34)).square().mean()
    assert 0.05 < second_moment < 2


def test_the_seed_decides_the_first_weights() -> None:
    first, again = _model().state_dict(), _model().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.manual_seed(1)
    other = Qm9MlpModel(_model().config).state_dict()
    assert not torch.equal(first["heads.weight"], other["heads.weight"]) and first["heads.bias"].eq(0).all()


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_through_the_auto_classes_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = _model(dropout=0.1).to(dtype).eval()
    nn.init.normal_(model.heads.bias)  # not what initialisation would give again
    keys = ("num_features", "task_names", "hidden_size", "num_layers", "head_size", "dropout")
    for loaded in saved_and_loaded(model, tmp_path, keys):
        features, labels = _batch(dtype)
        assert torch.equal(loaded(features, labels).losses, model(features, labels).losses)


def test_weights_that_are_missing_in_the_file_are_initialised(tmp_path: Path) -> None:
    model = _model()
    state = {name: value for name, value in model.state_dict().items() if name != "heads.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="its weights do not match Qm9MlpModel: 1 is missing"):
        Qm9MlpModel.from_pretrained(tmp_path)
    loaded, _ = Qm9MlpModel.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(loaded.trunk[0].weight, model.trunk[0].weight)
    assert loaded.heads.weight.isfinite().all() and 0.01 < loaded.heads.weight.std() < 0.2


# --- registry and options -----------------------------------------------------------------------------------------


def test_options_of_a_recipe_and_facts_of_the_data_make_a_config() -> None:
    spec = MODELS["qm9_mlp"]
    assert (spec.config_class, spec.model_class, spec.options) == (Qm9MlpConfig, Qm9MlpModel, Qm9MlpOptions)
    options = parse_options(spec.options, {"hidden_size": 32, "dropout": "1e-1"}, "model")
    config = spec.config_class(**dataclasses.asdict(options), num_features=7, task_names=["x"])
    assert (config.hidden_size, config.dropout, config.num_features, config.task_names) == (32, 0.1, 7, ["x"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 0}, "model.hidden_size: 0 is not valid, expected 1 or more"),
        ({"num_layers": 0}, "model.num_layers: 0 is not valid, expected 1 or more"),
        ({"dropout": 1.0}, "model.dropout: 1.0 is not valid, expected 0 <= dropout < 1"),
        ({"hiden_size": 8}, 'model.hiden_size: unknown option, value 8 (did you mean "hidden_size"?)'),
    ],
)
def test_bad_options_name_the_key_and_the_value(values: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(Qm9MlpOptions, values, "model")
    assert str(caught.value) == message


def test_bad_configs_are_refused() -> None:
    with pytest.raises(OptionError, match="task_names"):
        Qm9MlpConfig(task_names=["a", "a"])
    with pytest.raises(OptionError, match="num_features: 0"):
        Qm9MlpConfig(num_features=0)


def test_twenty_steps_lower_every_loss() -> None:
    features, labels = torch.randn(256, 6), torch.randn(256, 3)
    model = _model()
    before = model(features, labels).losses
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model(features, labels).losses.sum().backward()
        optimizer.step()
    assert (model(features, labels).losses < before).all()


# --- predictions in units -----------------------------------------------------------------------------------------


def test_a_saved_model_predicts_in_units_from_raw_descriptors(tmp_path: Path) -> None:
    scales = {
        "feature_means": [1.0] * 6,
        "feature_stds": [2.0] * 6,
        "label_means": [10.0, 20.0, 30.0],
        "label_stds": [0.5, 1.0, 100.0],
    }
    features, _ = _batch()
    _model(**scales).save_pretrained(tmp_path)
    model = Qm9MlpModel.from_pretrained(tmp_path)
    expected = model(features).logits.detach() * torch.tensor([0.5, 1.0, 100.0]) + torch.tensor([10.0, 20.0, 30.0])
    torch.testing.assert_close(model.predict(features * 2.0 + 1.0), expected)


def test_a_model_without_scales_says_so() -> None:
    with pytest.raises(ValueError, match="scales"):
        _model().predict(_batch()[0])

"""Any torch model: found by file or module, called with what it names, trained, saved, resumed; errors in a line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_bilb.config.options import parse_options
from hf_bilb.data import DATA_SETS
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.experiments.build import build_model, task_loss_func
from hf_bilb.experiments.recipe import parse_recipe
from hf_bilb.experiments.train import run_recipe
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models import MODELS
from hf_bilb.models.torch_module import TorchModuleOptions, build_torch_module, check_columns

ROOT = Path(__file__).resolve().parents[2]
DICTATED = {"num_features": 5, "task_names": ["a", "b", "c"], "label_means": [0.0, 0.0, 0.0]}

NETWORK = """
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Sizes:
    hidden: int


class Net(nn.Module):
    def __init__(self, num_features, num_tasks, sizes, dropout):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(num_features, sizes.hidden), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(sizes.hidden, num_tasks)

    def forward(self, features):
        return self.head(self.body(features))


class OtherName(Net):
    def forward(self, feature):
        return super().forward(feature)


class Wide(Net):
    def forward(self, features):
        return super().forward(features).repeat(1, 2)


def build(num_features: int, num_tasks: int, hidden: int = 8, dropout: float = 0.0) -> nn.Module:
    return Net(num_features, num_tasks, Sizes(hidden), dropout)


def by_names(task_names, *, width):
    return nn.Linear(width, len(task_names))


def no_module(num_features):
    return [num_features]


def other_name(num_features, num_tasks):
    return OtherName(num_features, num_tasks, Sizes(4), 0.0)


def wide(num_features, num_tasks):
    return Wide(num_features, num_tasks, Sizes(4), 0.0)


class Several(Net):
    def forward(self, features):
        return super().forward(features).split([2, 1], dim=1)


def several(num_features, tasks, task_names):
    assert task_names == list(tasks)
    return Several(num_features, sum(task.size for task in tasks.values()), Sizes(4), 0.0)


def fails(num_features):
    return nn.Linear(num_features, -1)


number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a network and data in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(80, 21))
    np.savez("arm.npz", data=np.concatenate([inputs, inputs @ generator.normal(size=(21, 7))], axis=1))
    return tmp_path


def build(factory: str, **arguments: Any) -> nn.Module:
    return build_torch_module(TorchModuleOptions(factory, arguments), **DICTATED)


def refused(call: Any) -> str:
    with pytest.raises(OptionError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- finding and calling ------------------------------------------------------------------------------------------


def test_a_file_beside_gets_what_it_names(folder: Path) -> None:
    model = build("network.py:build", hidden=6)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "body.0.weight": (6, 5), "body.0.bias": (6,), "head.weight": (3, 6), "head.bias": (3,),
    }  # fmt: skip
    assert build(str(folder / "network.py") + ":build").head.weight.shape == (3, 8)
    assert build("network.py:by_names", width=4).weight.shape == (3, 4)


def test_a_module_that_can_be_imported() -> None:
    model = build("torch.nn:Linear", in_features=5, out_features=3)
    features = torch.randn(7, 5)
    expected = nn.functional.linear(features, model.weight, model.bias)
    assert torch.equal(model(features)["logits"], expected)


def test_the_weights_follow_the_seed_as_the_networks_own_do(folder: Path) -> None:
    torch.manual_seed(3)
    model = build("network.py:build")
    torch.manual_seed(3)
    again = build("network.py:build")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_what_cannot_be_found_or_called_is_one_line(folder: Path) -> None:
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "needs.py").write_text("import no_such_package\n")
    assert refused(lambda: build("netwrk.py:build")).startswith(
        "model.factory: there is no file 'netwrk.py' (did you mean \"network.py\"?), seen from "
    )
    assert refused(lambda: build("network.py:biuld")) == (
        "model.factory: network.py has no 'biuld' (did you mean \"build\"?)"
    )
    assert refused(lambda: build("network.py:number")).startswith(
        "model.factory: 'number' in network.py is int, expected"
    )
    assert refused(lambda: build("network.py:no_module")) == (
        "model.factory: network.py:no_module returned list, expected an nn.Module"
    )
    assert "broken.py cannot be imported: SyntaxError: " in refused(lambda: build("broken.py:build"))
    assert "needs.py cannot be imported: ModuleNotFoundError: No module named 'no_such_package'" in refused(
        lambda: build("needs.py:build")
    )
    assert "no_such.module cannot be imported: ModuleNotFoundError" in refused(lambda: build("no_such.module:build"))
    assert refused(lambda: build("network.py:build", hiden=6)) == (
        "model.arguments: network.py:build takes (num_features: 'int', num_tasks: 'int', hidden: 'int' = 8, "
        "dropout: 'float' = 0.0) -> 'nn.Module': got an unexpected keyword argument 'hiden' (did you mean \"hidden\"?)"
        "; the data offer num_features, task_names, label_means, num_tasks"
    )
    assert "missing a required argument: 'width'" in refused(lambda: build("network.py:by_names"))
    assert refused(lambda: build("network.py:build", num_tasks=4)) == (
        "model.arguments.num_tasks: comes from the data (3), a recipe cannot set it"
    )


def test_what_the_networks_own_code_raises_comes_through(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="negative dimension"):
        build("network.py:fails")


@pytest.mark.parametrize("factory", ["network.py", ":build", "network.py:", "network.py:build()", ""])
def test_the_form_of_a_factory_is_checked_with_the_recipe(factory: str) -> None:
    message = refused(lambda: parse_options(TorchModuleOptions, {"factory": factory}, "model"))
    assert message.startswith(f"model.factory: {factory!r} is not valid, expected path/to/file.py:function or ")


def test_a_forward_that_asks_for_another_column(folder: Path) -> None:
    batch = {"features": torch.zeros(2, 5), "labels": torch.zeros(2, 3)}
    check_columns(build("network.py:build"), batch, ("labels",))
    assert refused(lambda: check_columns(build("network.py:other_name"), batch, ("labels",))) == (
        "model.factory: forward of OtherName takes 'feature', which is no column of a batch; expected some of features "
        '(did you mean "features"?)'
    )
    labels_too = SimpleNamespace(forward=lambda features, labels: None)
    assert "'labels', which is no column" in refused(lambda: check_columns(labels_too, batch, ("labels",)))  # type: ignore[arg-type]


def test_predictions_of_another_shape(folder: Path) -> None:
    message = refused(lambda: build("network.py:wide")(torch.zeros(2, 5)))
    assert message == (
        "model.factory: the module of network.py:wide returned shape (2, 6), expected a tensor [B, 3], a column for "
        "each task"
    )
    assert "returned shape (3,)" in refused(lambda: build("network.py:build")(torch.zeros(5)))


def test_tasks_with_several_outputs_are_a_tensor_each(folder: Path) -> None:
    def several(*tasks: TaskType) -> nn.Module:
        named = dict(zip("xy", tasks, strict=True))
        return build_torch_module(TorchModuleOptions("network.py:several"), num_features=5, tasks=named)

    logits = several(TaskType("classification", 2), TaskType("regression"))(torch.zeros(4, 5))["logits"]
    assert [tuple(part.shape) for part in logits] == [(4, 2), (4, 1)]
    assert refused(lambda: several(TaskType("regression"), TaskType("regression", 2))(torch.zeros(4, 5))) == (
        "model.factory: the module of network.py:several returned shape (4, 2), shape (4, 1), expected a tuple of 2 "
        "tensors, one for each task, with 1, 2 outputs"
    )


# --- training -----------------------------------------------------------------------------------------------------


def recipe(balancer: str = "bilb", epochs: int = 2, **trainer: Any) -> Any:
    return parse_recipe(
        {
            "model": {"name": "torch_module", "factory": "network.py:build", "arguments": {"dropout": 0.2}},
            "data": {"name": "sarcos", "file": "arm.npz", "tasks": ["joint_1", "joint_2", "joint_3"]},
            "balancer": balancer,
            "trainer": {
                "output_dir": "run", "use_cpu": True, "num_train_epochs": epochs, "per_device_train_batch_size": 16,
                "per_device_eval_batch_size": 7, "learning_rate": 0.05, "lr_scheduler_type": "constant",
                "logging_steps": 1, "eval_strategy": "epoch", "save_strategy": "epoch", "disable_tqdm": True, **trainer,
            },
            "evaluation": {"plots": False},
        },
        "arm",
    )  # fmt: skip


def test_a_run_its_figures_and_a_resumed_one(folder: Path) -> None:
    whole = run_recipe(recipe(epochs=2, output_dir="whole"))
    run_recipe(recipe(epochs=1))
    (folder / "run" / "results.json").unlink()
    resumed = run_recipe(recipe(epochs=2), resume=True)
    assert resumed.training["resumed_from"] == "checkpoint-4" and resumed.training["steps"] == 8
    saved = load_file("run/model.safetensors")
    assert set(saved) == {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}
    other = load_file("whole/model.safetensors")
    assert all(torch.equal(saved[name], other[name]) for name in saved)
    assert [m.value for m in resumed.metrics] == [m.value for m in whole.metrics]
    # The saved weights in the plain network, outside of everything: the figures of the results.
    data = DATA_SETS["sarcos"].load(
        DATA_SETS["sarcos"].options(file="arm.npz", tasks=("joint_1", "joint_2", "joint_3"))
    )
    network = nn.Sequential(nn.Linear(21, 8), nn.Tanh(), nn.Linear(8, 3))
    network.load_state_dict(
        {name.replace("body.0", "0").replace("head", "2"): tensor for name, tensor in saved.items()}
    )
    test = data.test[:]
    with torch.no_grad():
        squares = (network(test["features"]) - test["labels"]).square().mean(0)
    errors = squares / test["labels"].var(0, correction=0)
    assert [m.value for m in whole.metrics] == pytest.approx(errors.tolist(), rel=1e-4)
    assert [m.key for m in whole.metrics] == ["nmse_joint_1", "nmse_joint_2", "nmse_joint_3"]
    assert json.loads((folder / "whole" / "results.json").read_text())["model"] == "torch_module"
    assert whole.losses["test"]["joint_2"] == pytest.approx(float(squares[1]), rel=1e-4)


def test_a_single_task_and_two_tasks_start_from_the_data_alone(folder: Path) -> None:
    raw = recipe().to_dict()
    raw["data"]["tasks"] = ["joint_5"]
    raw["trainer"]["max_steps"] = 2
    results = run_recipe(parse_recipe(raw, "arm"))
    assert [m.key for m in results.metrics] == ["nmse_joint_5"] and results.metrics[0].value is not None
    assert load_file("run/model.safetensors")["head.weight"].shape == (1, 8)


def test_a_data_set_without_losses_of_its_own_is_refused(folder: Path) -> None:
    spec = DATA_SETS["sarcos"]
    data = spec.load(spec.options(file="arm.npz"))
    assert task_loss_func(recipe(), data) is data.task_loss_func
    without = SimpleNamespace(task_loss_func=None)
    assert refused(lambda: task_loss_func(recipe(), without)) == (  # type: ignore[arg-type]
        "model.name: 'torch_module' returns predictions alone, and the data set 'sarcos' has no losses for them"
    )
    with_losses = SimpleNamespace(model={"name": "qm9_mlp"})
    assert task_loss_func(with_losses, data) is None  # type: ignore[arg-type]


def test_build_model_looks_at_the_columns(folder: Path) -> None:
    raw = recipe().to_dict()
    raw["model"] = {"name": "torch_module", "factory": "network.py:other_name", "arguments": {}}
    spec = DATA_SETS["sarcos"]
    message = refused(lambda: build_model(parse_recipe(raw, "x"), spec.load(spec.options(file="arm.npz"))))
    assert "takes 'feature', which is no column of a batch" in message


SHARED = """
import torch
from torch import nn


class Joints(nn.Module):
    def __init__(self, num_features, num_tasks):
        super().__init__()
        encoder = nn.Sequential(nn.Linear(num_features, 8), nn.Tanh())
        self.joints = nn.ModuleList(nn.Sequential(encoder, nn.Linear(8, 1)) for _ in range(num_tasks))

    def forward(self, features):
        return torch.cat([joint(features) for joint in self.joints], 1)


class Text(Joints):
    def get_extra_state(self):
        return "text"

    def set_extra_state(self, state):
        pass


def joints(num_features, num_tasks):
    return Joints(num_features, num_tasks)


def text(num_features, num_tasks):
    return Text(num_features, num_tasks)
"""


def test_an_encoder_that_the_tasks_share(folder: Path) -> None:
    (folder / "shared.py").write_text(SHARED)
    raw = recipe(load_best_model_at_end=True).to_dict()
    raw["model"] = {"name": "torch_module", "factory": "shared.py:joints", "arguments": {}}
    whole = run_recipe(parse_recipe({**raw, "trainer": {**raw["trainer"], "output_dir": "whole"}}, "arm"))
    run_recipe(parse_recipe({**raw, "trainer": {**raw["trainer"], "num_train_epochs": 1}}, "arm"))
    (folder / "run" / "results.json").unlink()
    resumed = run_recipe(parse_recipe(raw, "arm"), resume=True)
    assert [m.value for m in resumed.metrics] == [m.value for m in whole.metrics]
    saved, other = load_file("run/model.safetensors"), load_file("whole/model.safetensors")
    assert len(saved) == 2 + 3 * 2  # the encoder once, a head for each of three joints
    assert saved.keys() == other.keys() and all(torch.equal(saved[name], other[name]) for name in saved)


def test_a_network_that_cannot_be_saved_is_refused_before_training(folder: Path) -> None:
    (folder / "shared.py").write_text(SHARED)
    raw = recipe(save_strategy="no").to_dict()
    raw["model"] = {"name": "torch_module", "factory": "shared.py:text", "arguments": {}}
    with pytest.raises(CheckpointError, match="the model cannot be saved: _extra_state is of type str"):
        run_recipe(parse_recipe(raw, "arm"))


@pytest.mark.parametrize("name", ["adult", "census", "sarcos"])
def test_the_networks_of_the_recipes(name: str) -> None:
    options = parse_options(
        MODELS["torch_module"].options, {"factory": str(ROOT / "recipes" / name / "network.py") + ":build"}, "model"
    )
    model = build_torch_module(options, num_features=12, task_names=["a", "b"])
    features = torch.randn(9, 12)
    logits = model(features)["logits"]
    assert logits.shape == (9, 2)
    # Every row on its own, every task with gradients.
    model.eval()
    assert torch.allclose(model(features[3:4])["logits"], model(features)["logits"][3:4], atol=1e-6)
    for column in range(2):
        gradients = torch.autograd.grad(
            model(features)["logits"][:, column].sum(), model.parameters(), allow_unused=True
        )
        assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0

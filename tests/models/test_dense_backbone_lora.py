"""`dense_backbone` with LoRA: adapters in the encoder; decoder and heads are trained and saved in addition to them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

import hf_bilb
from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.config.options import parse_options
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.experiments.train import run_recipe
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models import DenseBackboneModel, DenseBackboneOptions
from hf_bilb.models.dense.backbone import build_dense_backbone
from hf_bilb.models.lora import LoraOptions
from hf_bilb.storage.adapter_weights import save_beside
from tests.data.own.masks import write_scenes

SIZE, B = 14, 4
TASKS = {
    "road": TaskType("segmentation", 3),
    "scene": TaskType("classification", 4),
    "depth": TaskType("dense_regression"),
}
#: What the data dictate: tasks of one's own, and the papers'.
DICTATED: dict[str, dict[str, Any]] = {
    "own": {"tasks": TASKS, "image_size": SIZE},
    "papers": {"task_names": ["scene", "segmentation", "depth"], "num_classes": 3, "image_tasks": {"scene": 4}},
}
NAMES = {"own": ("labels", "road", "depth"), "papers": ("image_labels", "segmentation", "depth")}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    dinov2 = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=14,
                          patch_size=7)  # fmt: skip
    Dinov2Model(dinov2).save_pretrained(root / "dinov2")
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(resnet).save_pretrained(root / "resnet")
    return root


def build(encoder: Path, tasks: str = "own", **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    options = DenseBackboneOptions(str(encoder), decoder_size=8, lora=LoraOptions(r=2, **lora))
    model = build_dense_backbone(options, **DICTATED[tasks])
    assert isinstance(model, PeftModel)
    return model


def batch(tasks: str = "own") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    of_images, of_pixels, depth = NAMES[tasks]
    scene = torch.randint(4, (B, 1), generator=generator)
    values = torch.rand(B, SIZE, SIZE, generator=generator) + 0.5
    return {
        "pixel_values": torch.rand(B, 3, SIZE, SIZE, generator=generator),
        of_images: scene.float() if tasks == "own" else scene,
        of_pixels: torch.randint(3, (B, SIZE, SIZE), generator=generator),
        depth: values[:, None] if tasks == "own" else values,
    }


def train_a_little(model: PeftModel, columns: dict[str, Tensor]) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    found = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**columns).losses.sum()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def save(model: PeftModel, folder: Path) -> None:
    """As a recipe's run does."""
    model.eval().save_pretrained(folder)
    save_beside(model, folder)  # ResNet's running statistics
    model.get_base_model().config.save_pretrained(folder)


@pytest.mark.parametrize("tasks", ["own", "papers"])
@pytest.mark.parametrize(("encoder", "target"), [("dinov2", "all-linear"), ("resnet", ("convolution",))])
def test_adapters_decoder_and_heads_are_trained_and_load_again(
    encoders: Path, tmp_path: Path, encoder: str, target: object, tasks: str
) -> None:
    model, columns = build(encoders / encoder, tasks, target_modules=target), batch(tasks)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_encoder = {name for name in trained if name.startswith("base_model.model.encoder.")}
    assert in_encoder and all("lora_" in name for name in in_encoder)
    # What the same model without adapters has outside its encoder, all of it and nothing else.
    plain = build_dense_backbone(DenseBackboneOptions(str(encoders / encoder), decoder_size=8), **DICTATED[tasks])
    outside = {name for name, _ in plain.named_parameters() if not name.startswith("encoder.")}
    found = {name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
             for name in trained - in_encoder}  # fmt: skip
    assert found == outside and any(name.startswith("projections.0.") for name in outside)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    untrained = model(**columns).logits
    losses = train_a_little(model, columns)
    assert losses[-1] < 0.9 * losses[0]
    assert {n for n, parameter in model.named_parameters() if not torch.equal(parameter, before[n])} == trained
    save(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    for auto in (DenseBackboneModel, AutoModel):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded, PeftModel) and not loaded.training
        output = loaded(**columns)
        assert all(map(torch.equal, output.logits, model(**columns).logits))
        assert torch.equal(output.losses, model(**columns).losses)
        assert not any(map(torch.equal, output.logits, untrained))
        config, expected = loaded.get_base_model().config, model.get_base_model().config
        assert list(config.task_types.items()) == list(expected.task_types.items())
        for key in ("tasks", "task_names", "stages", "image_size", "decoder_size", "num_classes", "image_tasks"):
            assert getattr(config, key) == getattr(expected, key), key


@pytest.mark.parametrize("layer", ["projections.1", "branches", "branch_norm", "heads", "image_norm"])
def test_a_layer_that_the_files_do_not_hold_is_noticed(encoders: Path, tmp_path: Path, layer: str) -> None:
    model = build(encoders / "dinov2", target_modules=("q_proj",))
    save(model, tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    state, said = load_file(weights), json.loads(config.read_text())
    gone = [name for name in state if f"base_model.model.{layer}." in name]
    assert gone and layer in said["modules_to_save"]
    save_file({name: tensor for name, tensor in state.items() if name not in gone}, weights)
    with pytest.raises(CheckpointError, match=f"do not match the model: .*{re.escape(layer)}"):
        DenseBackboneModel.from_pretrained(tmp_path)
    # The weights are there, but peft is not told to load them.
    save_file(state, weights)
    said["modules_to_save"].remove(layer)
    config.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=f"do not match the model: .*{re.escape(layer)}"):
        DenseBackboneModel.from_pretrained(tmp_path)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return B

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in batch().items()}


def test_the_trainer_trains_it(encoders: Path, tmp_path: Path) -> None:
    model = build(encoders / "dinov2", target_modules=("q_proj",))
    arguments = BilevelMTLTrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=4, learning_rate=0.02, balancer="ls", report_to=[],
        use_cpu=True, label_names=list(NAMES["own"]), save_strategy="no",
    )  # fmt: skip
    trainer = BilevelMTLTrainer(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(), task_item_counts=MixedLosses(TASKS).count
    )
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert all(last[f"eval_loss_{name}"] < first[f"eval_loss_{name}"] for name in TASKS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder": {"model_type": "resnet"}, "lora": {}}, r"^model\.lora: adapters need pretrained weights"),
        ({"encoder": "x", "quantization": "4bit"}, r"^model\.quantization: 4bit weights cannot be trained"),
        ({"encoder": "x", "lora": {"config": {"modules_to_save": []}}}, r"^model\.lora\.config\.modules_to_save: the"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(values: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(DenseBackboneOptions, values, "model")


def test_layers_and_machines_that_do_not_do_are_one_line(encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"^model\.lora\.target_modules: peft has no choice for 'resnet', expected"):
        build(encoders / "resnet")
    with pytest.raises(
        OptionError, match=r"^model\.lora\.target_modules: 'all-linear' is no layer of 'resnet'; it has"
    ):
        build(encoders / "resnet", target_modules="all-linear")
    with pytest.raises(OptionError, match=r"^model\.lora\.target_modules: 'branches' is no layer of 'dinov2'"):
        build(encoders / "dinov2", target_modules=("branches",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = DenseBackboneOptions("nowhere", lora=LoraOptions(), quantization="8bit")
    with pytest.raises(OptionError, match=r"^model\.quantization: 8bit needs a CUDA GPU, and there is none"):
        build_dense_backbone(options, **DICTATED["own"])


RECIPE = """
data:
  name: table
  files: {folder}/scenes.csv
  cache_dir: {folder}/cache
  split: {{validation: 0.2, test: 0.2}}
  inputs: {{image: image}}
  image_size: 28
  tasks:
    road: {{type: segmentation, column: mask, classes: [sky, road, tree]}}
    scene: {{type: classification}}
model: {{name: dense_backbone, encoder: {encoder}, decoder_size: 8, lora: {{r: 2, target_modules: all-linear}}}}
balancer: bilb
trainer: {{output_dir: {folder}/run, num_train_epochs: 2, per_device_train_batch_size: 4, report_to: none}}
evaluation: {{plots: false}}
"""


def test_the_run_of_a_recipe_is_loaded(encoders: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, count=20)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, encoder=encoders / "dinov2"))
    results = run_recipe(read_recipe(tmp_path / "recipe.yaml", ()))
    assert results.training["trained_parameters"] < results.training["parameters"]
    run = tmp_path / "run"
    assert (run / "adapter_model.safetensors").is_file() and not (run / "model.safetensors").exists()
    loaded, again = hf_bilb.load(run).model, DenseBackboneModel.from_pretrained(run)
    assert isinstance(loaded, PeftModel) and isinstance(again, PeftModel)
    pixels = torch.rand(2, 3, 28, 28)
    assert all(map(torch.equal, loaded(pixels).logits, again(pixels).logits))
    assert list(again.get_base_model().config.task_types) == ["road", "scene"]

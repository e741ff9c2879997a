"""Pretrained image encoders with a head per task: small ViT and ResNet saved to a folder, their files, their errors."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from hf_bilb.config.options import parse_options
from hf_bilb.errors import MissingPackageError, OptionError
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models import MODELS, MultiTaskImageConfig, MultiTaskImageModel, MultiTaskImageOptions
from hf_bilb.models.image_encoder import build_multi_task_image
from hf_bilb.models.lora import LoraOptions
from hf_bilb.storage.adapter_weights import save_beside
from tests.models.files import saved_and_loaded

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
TASKS = {"a": TaskType("multi_label"), "b": TaskType("multi_label"), "c": TaskType("multi_label")}
HEADS = ("head_a", "head_b", "head_c")


def processor(folder: Path, **changes: object) -> None:
    facts = {"do_normalize": True, "image_mean": MEAN, "image_std": STD, "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **facts, **changes})
    )


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with small encoders of random weights."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTConfig(**sizes, image_size=16, patch_size=8)
    ViTModel(vit).save_pretrained(root / "vit")
    ViTModel(vit, add_pooling_layer=False).save_pretrained(root / "vit_without_pooler")
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 20], depths=[1, 1], layer_type="basic")
    ResNetModel(resnet).save_pretrained(root / "resnet")
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(root / "bert")
    processor(root / "vit")
    return root


def build(encoder: Path | str, image_size: int = 16, **options: object) -> MultiTaskImageModel:
    torch.manual_seed(1)
    return build_multi_task_image(MultiTaskImageOptions(str(encoder), **options), tasks=TASKS, image_size=image_size)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(6, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 2, (6, 3), generator=generator).float()
    labels[:2, 1] = torch.nan
    return pixels, labels


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "pooling", "size"),
    [("vit", "mean", 12), ("vit", "pooler", 12), ("resnet", "mean", 20), ("resnet", "pooler", 20)],
)
def test_predictions_are_heads_on_the_pooled_output_of_the_encoder(
    encoders: Path, encoder: str, pooling: str, size: int
) -> None:
    model = build(encoders / encoder, pooling=pooling).eval()
    pixels, labels = _batch()
    pretrained = {"vit": ViTModel, "resnet": ResNetModel}[encoder].from_pretrained(encoders / encoder).eval()
    # By hand, colour by colour; the ResNet's folder has no image processor.
    normal = torch.stack([(pixels[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1) if encoder == "vit" else pixels
    output = pretrained(pixel_values=normal)
    hidden = output.last_hidden_state
    if pooling == "pooler":
        pooled = output.pooler_output.reshape(6, size)
    else:
        pooled = sum(hidden.unbind(1)) / 5 if encoder == "vit" else hidden.sum(dim=(2, 3)) / hidden[0, 0].numel()
    heads = [model.get_submodule(name) for name in HEADS]
    logits = torch.stack([pooled @ head.weight[0] + head.bias for head in heads], dim=1)
    found = model(pixels, labels)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.router_features, pooled)
    assert model.config.num_router_features == size
    loss = nn.functional.binary_cross_entropy_with_logits(logits[2:, 1], labels[2:, 1])
    torch.testing.assert_close(found.losses[1], loss)
    assert found.num_items.tolist() == [6, 4, 6]


@pytest.mark.parametrize(("encoder", "pooling"), [("vit", "mean"), ("vit", "pooler"), ("resnet", "mean")])
def test_every_parameter_is_reached(encoders: Path, encoder: str, pooling: str) -> None:
    model = build(encoders / encoder, pooling=pooling)
    model(*_batch()).losses.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_without_labels_only_predictions_and_tuples_on_request(encoders: Path) -> None:
    model = build(encoders / "vit").eval()
    pixels, labels = _batch()
    assert list(model(pixels)) == ["logits"]
    losses, _, logits, features = model(pixels, labels, return_dict=False)
    assert losses.shape == (3,) and torch.equal(logits, model(pixels).logits) and features.shape == (6, 12)


def test_dropout_acts_in_training_only(encoders: Path) -> None:
    model = build(encoders / "resnet", dropout=0.5)
    model.encoder.eval()
    pixels, _ = _batch()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)
    model.eval()
    assert torch.equal(model(pixels).logits, model(pixels).logits)


def test_an_image_processor_that_does_not_normalise_leaves_pixels_as_they_are(encoders: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(encoders / "resnet").save_pretrained(tmp_path)
    processor(tmp_path, do_normalize=False)
    assert build(tmp_path).config.image_mean == [0, 0, 0]
    processor(tmp_path)
    assert (build(tmp_path).config.image_mean, build(tmp_path).config.image_std) == (MEAN, STD)


def test_another_size_than_the_processor_s_is_said(
    encoders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    AutoModel.from_pretrained(encoders / "resnet").save_pretrained(tmp_path)
    for size in ({"height": 32, "width": 32}, {"shortest_edge": 32}, 32):
        caplog.clear()
        processor(tmp_path, size=size)
        build(tmp_path)
        assert f"was made for images of {size}, data.image_size is 16" in caplog.text
    caplog.clear()
    build(encoders / "vit")
    assert not caplog.text
    build(encoders / "resnet")
    assert "has no image processor: its pixels stay in [0, 1]" in caplog.text


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["vit", "resnet"])
def test_saved_and_loaded_through_the_auto_classes(encoders: Path, tmp_path: Path, encoder: str) -> None:
    model = build(encoders / encoder)
    model(*_batch())  # ResNet's running statistics
    keys = ("task_names", "tasks", "image_size", "image_mean", "image_std", "pooling", "num_features", "encoder_name")
    for loaded in saved_and_loaded(model, tmp_path, keys):
        torch.testing.assert_close(loaded(_batch()[0]).logits, model(_batch()[0]).logits)
        assert loaded.config.encoder_config.model_type == encoder


def test_a_package_with_a_model(encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "made_up_model", SimpleNamespace(get_model_path=lambda: encoders / "vit"))
    model = build("package:made_up_model")
    assert model.config.encoder_name == "package:made_up_model"
    with pytest.raises(MissingPackageError, match=r"^model\.encoder: 'package:no_such_model_1': the package"):
        build("package:no_such_model_1")


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "image_size", "pooling", "message"),
    [
        ("vit", 24, "mean", "data.image_size: 24 is not valid for model.encoder '{}/vit', expected 16: Input image"),
        ("vit_without_pooler", 16, "pooler", "model.encoder: '{}/vit_without_pooler' cannot be loaded: its files lack "
         "pooler.dense.bias, pooler.dense.weight; with pooling: mean it needs no pooler"),
        ("bert", 16, "mean", "model.encoder: '{}/bert' takes input_ids, expected an image encoder"),
        ("nowhere", 16, "mean", "model.encoder: there is no folder '{}/nowhere'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    encoders: Path, encoder: str, image_size: int, pooling: str, message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        build(encoders / encoder, image_size, pooling=pooling)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(message.replace("{}", str(encoders)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model.encoder: is required"),
        ({"encoder": "x", "pooling": "cls"}, 'model.pooling: \'cls\' is not valid, expected one of "mean", "pooler"'),
        ({"encoder": "x", "dropout": 1}, "model.dropout: 1"),
        ({"encoder": "x", "width": 4}, "model.width: unknown option, value 4"),
    ],
)
def test_bad_options_are_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(MultiTaskImageOptions, values, "model")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_mean": [0.5]}, r"^image_mean: \[0\.5\] is not valid, expected a number for each of 3 colours$"),
        ({"image_std": [1, 0, 1]}, r"^image_std: \[1, 0, 1\] is not valid, expected numbers above 0$"),
        ({"pooling": "max"}, r"^pooling: 'max' is not valid, expected one of mean, pooler$"),
        ({"tasks": {}}, r"^tasks: is empty"),
        (
            {"tasks": {"a": TaskType("token_classification", 2)}},
            r"^tasks\.a\.type: token_classification is no task of image_encoder, expected one of regression, class",
        ),
    ],
)
def test_bad_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MultiTaskImageConfig(**values)


def test_the_registry_builds_it_from_options_and_data(encoders: Path) -> None:
    spec = MODELS["image_encoder"]
    options = parse_options(spec.options, {"encoder": str(encoders / "resnet")}, "model")
    assert dataclasses.asdict(options) == {
        "encoder": str(encoders / "resnet"), "pooling": "mean", "dropout": 0.0, "lora": None, "quantization": None,
    }  # fmt: skip
    tasks = {"x": TaskType("multi_label"), "y": TaskType("regression")}
    assert spec.build(options, tasks=tasks, image_size=32)(torch.rand(2, 3, 32, 32)).logits.shape == (2, 2)


def test_tasks_of_several_outputs(encoders: Path) -> None:
    tasks = {"place": TaskType("regression", 2), "kind": TaskType("classification", 3), "b": TaskType("multi_label")}
    model = build_multi_task_image(MultiTaskImageOptions(str(encoders / "vit")), tasks=tasks, image_size=16).eval()
    pixels, _ = _batch()
    labels = torch.tensor([[0.5, -1.0, 2.0, 1.0]]).repeat(6, 1)
    labels[0, 2] = torch.nan
    output = model(pixels, labels)
    assert [tuple(part.shape) for part in output.logits] == [(6, 2), (6, 3), (6, 1)]
    assert output.num_items.tolist() == [12, 5, 6]
    expected = nn.functional.cross_entropy(output.logits[1][1:], torch.full((5,), 2))
    torch.testing.assert_close(output.losses[1], expected)


# --- LoRA ---------------------------------------------------------------------------------------------------------


def lora_model(encoder: Path, **options: object) -> PeftModel:
    model = build(encoder, lora=LoraOptions(r=2, **options))
    assert isinstance(model, PeftModel)
    return model


@pytest.mark.parametrize(("encoder", "target"), [("vit", "q_proj"), ("resnet", "convolution")])
def test_lora_trains_adapters_and_heads_and_they_load_again(
    encoders: Path, tmp_path: Path, encoder: str, target: str
) -> None:
    model = lora_model(encoders / encoder, target_modules=(target,))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert sum("modules_to_save" in name for name in trained) == 2 * len(TASKS)
    pixels, labels = _batch()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    found = []
    for _ in range(10):
        optimizer.zero_grad()
        found.append(model(pixels, labels).losses.sum())
        found[-1].backward()
        optimizer.step()
    assert found[-1].item() < 0.9 * found[0].item()
    model.eval().save_pretrained(tmp_path)
    save_beside(model, tmp_path)  # ResNet's running statistics, as the Trainer does
    model.get_base_model().config.save_pretrained(tmp_path)
    loaded = MultiTaskImageModel.from_pretrained(tmp_path)
    assert isinstance(loaded, PeftModel) and torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_layers_for_lora_have_to_be_named_where_peft_has_no_choice(encoders: Path) -> None:
    with pytest.raises(OptionError, match=r"^model\.lora\.target_modules: peft has no choice for 'vit', expected some"):
        lora_model(encoders / "vit")


def test_a_whole_model_is_loaded(encoders: Path, tmp_path: Path) -> None:
    model = build(encoders / "vit").eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(MultiTaskImageModel.from_pretrained(tmp_path)(_batch()[0]).logits, model(_batch()[0]).logits)


def test_quantised_weights_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(OptionError, match=r"^model\.quantization: 8bit weights cannot be trained, expected lora"):
        parse_options(MultiTaskImageOptions, {"encoder": "x", "quantization": "8bit"}, "model")
    with pytest.raises(OptionError, match=r"^model\.quantization: 4bit needs a CUDA GPU"):
        build("nowhere", quantization="4bit", lora=LoraOptions())

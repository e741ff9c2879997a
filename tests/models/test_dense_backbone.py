"""A backbone with dense heads and heads for whole images: what it computes, its files, partial labels, its errors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoBackbone,
    AutoConfig,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.config.options import parse_options
from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.dense import dense_item_counts
from hf_bilb.models import MODELS, DenseBackboneConfig, DenseBackboneModel, DenseBackboneOptions
from hf_bilb.models.dense.backbone import build_dense_backbone
from tests.models.files import saved_and_loaded

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
TASKS = ["segmentation", "depth", "normals"]
MIXED = ["scene", "segmentation", "depth", "room"]
IMAGE_TASKS = {"room": 2, "scene": 3}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with small encoders of random weights."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 16}
    Dinov2Model(Dinov2Config(**{**sizes, "mlp_ratio": 2}, image_size=28, patch_size=7)).save_pretrained(root / "dinov2")
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16], depths=[1, 1, 1], layer_type="basic")
    ResNetForImageClassification(resnet).save_pretrained(root / "resnet")
    swin = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4)
    SwinModel(swin).save_pretrained(root / "swin")
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(root / "bert")
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(root / "vit")
    facts = {"do_normalize": True, "image_mean": MEAN, "image_std": STD}
    (root / "resnet" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **facts})
    )
    return root


def build(encoder: Path | str | dict, tasks: list[str] | None = None, **options: object) -> DenseBackboneModel:
    torch.manual_seed(1)
    names = TASKS if tasks is None else tasks
    images = {name: IMAGE_TASKS[name] for name in IMAGE_TASKS if name in names}
    settings = DenseBackboneOptions(str(encoder) if isinstance(encoder, Path) else encoder, decoder_size=8, **options)
    return build_dense_backbone(settings, task_names=names, num_classes=5, image_tasks=images)


def batch(height: int = 40, width: int = 33, images: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    frame = (images, height, width)
    normals = functional.normalize(torch.randn(images, 3, height, width, generator=generator), dim=1)
    return {
        "pixel_values": torch.rand(images, 3, height, width, generator=generator),
        "segmentation": torch.randint(-1, 5, frame, generator=generator),
        "depth": torch.rand(frame, generator=generator) + 0.5,
        "normals": normals,
    }


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["resnet", "dinov2", "swin"])
def test_the_decoder_is_the_one_described_each_task_on_its_own(encoders: Path, encoder: str) -> None:
    model, pixels = build(encoders / encoder).double().eval(), batch()["pixel_values"].double()
    for norm in (model.common_norm, model.branch_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    nn.init.normal_(model.heads.bias)  # as it begins, where the branch is zero a normal is too
    mean, std = (MEAN, STD) if encoder == "resnet" else ([0.0] * 3, [1.0] * 3)
    normal = torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    config = AutoConfig.from_pretrained(encoders / encoder)
    stages = {"resnet": [1, 2, 3], "swin": [1, 2], "dinov2": [1, 2, 3, 5]}[encoder]
    config.out_features = [f"stage{i}" for i in stages]
    backbone = AutoBackbone.from_config(config).double().eval()
    backbone.load_state_dict(model.encoder.state_dict())
    maps = backbone(normal).feature_maps
    assert len(maps) == len(stages)
    enlarge = partial(functional.interpolate, mode="bilinear", align_corners=False)
    joined = torch.cat([enlarge(part, size=(10, 9)) for part in maps], dim=1)
    weight = torch.cat([projection.weight for projection in model.projections], dim=1)
    bias = sum(projection.bias for projection in model.projections)
    norm = model.common_norm
    common = functional.group_norm(functional.conv2d(joined, weight, bias), 8, norm.weight, norm.bias).relu()
    output = model(pixels)
    features, rows = [], 0
    for k, (name, size) in enumerate(zip(TASKS, (5, 1, 3), strict=True)):
        own, out = slice(8 * k, 8 * k + 8), slice(rows, rows + size)
        branch = functional.conv2d(common, model.branches.weight[own], model.branches.bias[own], padding=1)
        branch = functional.group_norm(branch, 8, model.branch_norm.weight[own], model.branch_norm.bias[own]).relu()
        head = functional.conv2d(branch, model.heads.weight[out, :, None, None], model.heads.bias[out])
        expected = enlarge(head, size=(40, 33))
        expected = expected[:, 0] if name == "depth" else expected
        expected = expected / expected.norm(dim=1, keepdim=True) if name == "normals" else expected
        torch.testing.assert_close(output.logits[k], expected, rtol=1e-10, atol=1e-10)
        features.append(branch.mean(dim=(2, 3)))
        rows = out.stop
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in batch().items()}
    found = model(**inputs).router_features
    torch.testing.assert_close(found, torch.cat(features, dim=1), rtol=1e-10, atol=1e-12)
    assert model.config.num_router_features == found.shape[1] == 24


@pytest.mark.parametrize("encoder", ["resnet", "dinov2", "swin"])
def test_pretrained_weights_are_those_of_the_folder(encoders: Path, encoder: str) -> None:
    model = build(encoders / encoder)
    pretrained = {"resnet": ResNetForImageClassification, "dinov2": Dinov2Model, "swin": SwinModel}[encoder]
    expected = pretrained.from_pretrained(encoders / encoder).state_dict()
    strip = {"resnet": "resnet.", "swin": "", "dinov2": ""}[encoder]
    expected = {name.removeprefix(strip): value for name, value in expected.items()}
    found = {name.removeprefix("swin."): value for name, value in model.encoder.state_dict().items()}
    same = [name for name in found if name in expected]
    assert len(same) > 20 and all(torch.equal(found[name], expected[name]) for name in same)
    new = [name for name in found if name not in expected]
    assert all(name.startswith("hidden_states_norms") for name in new) and (bool(new) == (encoder == "swin"))


def test_stages_can_be_chosen_and_decide_the_encoder_s_maps(encoders: Path) -> None:
    assert build(encoders / "dinov2", stages=("stage5", "stage2")).config.stages == ["stage2", "stage5"]
    assert len(build(encoders / "resnet", stages=("stage2",)).projections) == 1
    with pytest.raises(OptionError, match=r"^model\.stages: 'stage9' is not known.*known: stage1, stage2, stage3$"):
        build(encoders / "resnet", stages=("stage9",))


def test_a_config_instead_of_a_folder_gives_fresh_weights() -> None:
    encoder = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = build(encoder, ["depth"])
    assert isinstance(model.encoder, ResNetBackbone) and model.config.image_mean == [0.0, 0.0, 0.0]
    assert model(batch()["pixel_values"]).logits[0].shape == (4, 40, 33)


# --- tasks of pixels and of whole images, partial labels ----------------------------------------------------------


def partly_labelled(**sizes: int) -> dict[str, Tensor]:
    """Four images: with everything; depth and scene alone; segmentation and room alone; nothing at all."""
    columns = batch(**sizes)
    del columns["normals"]
    columns["depth"][2:] = 0
    columns["segmentation"][1] = columns["segmentation"][3] = -1
    columns["image_labels"] = torch.tensor([[2, 1], [0, -1], [-1, 0], [-1, -1]])
    return columns


def test_images_and_pixels_at_once_each_image_with_labels_of_its_own(encoders: Path) -> None:
    model, columns = build(encoders / "resnet", MIXED), partly_labelled()
    assert list(model.config.image_tasks) == ["scene", "room"]  # in the order of the task names
    output = model(**columns)
    scene, segmentation, depth, room = output.logits
    assert scene.shape == (4, 3) and room.shape == (4, 2) and output.router_features.shape == (4, 32)
    labelled = columns["segmentation"][[0, 2]].ge(0).sum()
    assert output.num_items.tolist() == [2, labelled, 2 * 40 * 33, 2]
    losses = [
        functional.cross_entropy(scene[:2], torch.tensor([2, 0])),
        functional.cross_entropy(segmentation[[0, 2]], columns["segmentation"][[0, 2]], ignore_index=-1),
        (depth[:2] - columns["depth"][:2]).abs().mean(),
        functional.cross_entropy(room[[0, 2]], torch.tensor([1, 0])),
    ]
    torch.testing.assert_close(output.losses, torch.stack(losses))
    count = partial(dense_item_counts, task_names=MIXED, image_tasks=["scene", "room"])
    assert count(columns).tolist() == output.num_items.tolist()


def test_image_tasks_read_the_encoder_s_last_maps_each_for_itself(encoders: Path) -> None:
    model = build(encoders / "resnet", MIXED).double().eval()
    columns = {key: value.double() if value.is_floating_point() else value for key, value in partly_labelled().items()}
    pixels = columns["pixel_values"]
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    pooled = model.encoder((pixels - mean) / std).feature_maps[-1].mean(dim=(2, 3))
    nn.init.uniform_(model.image_norm.weight, 0.5, 1.5)
    nn.init.normal_(model.image_norm.bias)
    parts = model.image_branches(pooled).split(8, dim=1)
    normed = [
        (part - part.mean(1, keepdim=True)) / (part.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for part in parts
    ]
    hidden = (torch.cat(normed, dim=1) * model.image_norm.weight + model.image_norm.bias).relu()
    output = model(**columns)
    for k, rows, own in ((0, slice(0, 3), slice(0, 8)), (3, slice(3, 5), slice(8, 16))):
        expected = hidden[:, own] @ model.image_heads.weight[rows].T + model.image_heads.bias[rows]
        torch.testing.assert_close(output.logits[k], expected)
        torch.testing.assert_close(output.router_features[:, 8 * k : 8 * k + 8], hidden[:, own])


@pytest.mark.parametrize("encoder", ["resnet", "swin"])
def test_image_tasks_alone_need_no_decoder_and_reach_every_parameter_as_others_do(encoders: Path, encoder: str) -> None:
    model, mixed = build(encoders / encoder, ["scene"]), build(encoders / encoder, MIXED)
    assert len(model.config.stages) == 1 and model.config.stages[0] == mixed.config.stages[-1]
    own = {"encoder", "image_branches", "image_norm", "image_heads"}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == own
    model.image_branches.weight.data = mixed.image_branches.weight.data[:8].clone()
    model.image_heads.weight.data = mixed.image_heads.weight.data[:3].clone()
    pixels, labels = batch()["pixel_values"], torch.tensor([[2], [0], [-1], [1]])
    output = model.eval()(pixels, image_labels=labels)
    torch.testing.assert_close(output.logits[0], mixed.eval()(pixels).logits[0])
    expected = functional.cross_entropy(output.logits[0][[0, 1, 3]], torch.tensor([2, 0, 1]))
    torch.testing.assert_close(output.losses, expected.unsqueeze(0))
    assert output.num_items.tolist() == [3] and output.router_features.shape == (4, 8)
    output.losses.sum().backward()
    mixed(**partly_labelled()).losses.sum().backward()
    # Swin's backbone has a last normalisation of its own, which nothing reads.
    bare = [{n for n, p in m.named_parameters() if p.grad is None} for m in (model, mixed)]
    assert bare[0] == bare[1]


def test_image_features_do_not_die_under_adam() -> None:
    """All means of maps behind a ReLU are above zero: without a normalisation one sign moves all features of a task, up
    or down with the classes that happen to come."""
    encoder = {
        "model_type": "resnet", "layer_type": "basic", "embedding_size": 16, "hidden_sizes": [16, 128], "depths": [1, 1]
    }  # fmt: skip
    torch.manual_seed(0)
    model = build_dense_backbone(
        DenseBackboneOptions(encoder, decoder_size=16), task_names=["dark"], num_classes=5, image_tasks={"dark": 2}
    )
    pixels = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        output = model(pixels, image_labels=torch.full((16, 1), step // 10 % 2))
        output.losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (output.router_features.amax(dim=0) > 0).float().mean() > 0.25  # without: all dead


def test_an_image_without_a_task_s_labels_gives_that_task_nothing(encoders: Path) -> None:
    model, columns = build(encoders / "dinov2", MIXED), partly_labelled()
    columns["pixel_values"].requires_grad_()
    losses = model(**columns).losses
    seen = {0: [0, 1], 1: [0, 2], 2: [0, 1], 3: [0, 2]}  # task -> images with a label
    for k, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, columns["pixel_values"], retain_graph=True)
        reached = gradient.abs().amax(dim=(1, 2, 3)).gt(0).nonzero().flatten().tolist()
        assert reached == seen[k] and gradient.isfinite().all()
    losses.sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == ["encoder.embeddings.mask_token"]  # of DINOv2's pretraining


class Images(torch.utils.data.Dataset):
    """Partly labelled images, twice each; of another size DINOv2 would interpolate its positions, in float32."""

    def __init__(self) -> None:
        columns = partly_labelled(height=28, width=28)
        self.columns = {name: torch.cat([value, value]) for name, value in columns.items()}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def trained(folder: Path, model: DenseBackboneModel, batch_size: int, accumulated: int = 1) -> BilevelMTLTrainer:
    arguments = BilevelMTLTrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated, max_steps=3,
        learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", balancer="ls", report_to=[], use_cpu=True,
        label_names=["segmentation", "depth", "image_labels"], save_strategy="no", logging_steps=1, max_grad_norm=0.0,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer = BilevelMTLTrainer(
        model, arguments, train_dataset=Images(), eval_dataset=Images(),
        task_item_counts=partial(dense_item_counts, task_names=MIXED, image_tasks=["scene", "room"]),
    )  # fmt: skip
    trainer.train()
    return trainer


def test_the_trainer_takes_partial_labels_and_accumulation_is_exact(encoders: Path, tmp_path: Path) -> None:
    models = [build(encoders / "dinov2", MIXED).double() for _ in range(2)]
    before = {name: value.detach().clone() for name, value in models[0].named_parameters()}
    whole, parts = trained(tmp_path / "a", models[0], 8), trained(tmp_path / "b", models[1], 2, accumulated=4)
    one, other = (nn.utils.parameters_to_vector(model.parameters()).detach() for model in models)
    assert (one - other).norm() <= 1e-12 * one.norm()
    for name, parameter in models[0].named_parameters():
        assert name.endswith("mask_token") or not torch.equal(parameter, before[name]), name
    logged = [[entry for entry in run.state.log_history if "loss" in entry] for run in (whole, parts)]
    for one, other in zip(*logged, strict=True):
        for name in MIXED:
            assert one[f"loss/{name}"] == pytest.approx(other[f"loss/{name}"], rel=1e-9)
    metrics, exact = whole.evaluate(), models[0].eval()(**Images().columns).losses
    for k, name in enumerate(MIXED):
        assert metrics[f"eval_loss_{name}"] == pytest.approx(exact[k].item(), rel=1e-9)
    predicted = whole.predict(Images())
    assert [part.shape for part in predicted.predictions] == [(8, 3), (8, 5, 28, 28), (8, 28, 28), (8, 2)]


def test_image_labels_that_do_not_fit_are_one_line(encoders: Path) -> None:
    model, columns = build(encoders / "resnet", MIXED), partly_labelled()
    columns["image_labels"] = columns["image_labels"][:, :1]
    with pytest.raises(TaskLossError, match=r"^image_labels: got shape \(4, 1\), expected \[B, 2\].*\(scene, room\)$"):
        model(**columns)


# --- the encoder's own --------------------------------------------------------------------------------------------


def test_gradient_checkpointing_is_passed_on_and_changes_no_gradient(encoders: Path) -> None:
    inputs, found = batch(), []
    for checkpointing in (False, True):
        model = build(encoders / "dinov2").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing and model.encoder.is_gradient_checkpointing
        model(**inputs).losses.sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 50
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_bfloat16_autocast_gives_float32_losses(encoders: Path) -> None:
    model = build(encoders / "dinov2")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch())
    exact = model(**batch())
    assert output.losses.dtype == torch.float32 and output.logits[2].dtype == torch.float32
    torch.testing.assert_close(output.losses, exact.losses, rtol=0.05, atol=0.05)


# --- files --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_through_the_auto_classes_bit_for_bit(encoders: Path, tmp_path: Path) -> None:
    model, columns = build(encoders / "resnet", MIXED, stages=("stage1", "stage3")), partly_labelled()
    model(**columns)
    keys = ("task_names", "image_tasks", "stages", "image_mean", "image_std", "decoder_size", "encoder_name")
    for loaded in saved_and_loaded(model, tmp_path, keys):
        assert torch.equal(loaded(**columns).losses, model(**columns).losses)
        assert loaded.config.encoder_config.out_features == ["stage1", "stage3"]
        assert list(loaded.config.image_tasks) == ["scene", "room"] and loaded.config.image_mean == MEAN


# --- registry and options -----------------------------------------------------------------------------------------


def test_options_of_a_recipe() -> None:
    spec = MODELS["dense_backbone"]
    assert (spec.config_class, spec.model_class) == (DenseBackboneConfig, DenseBackboneModel)
    options = parse_options(spec.options, {"encoder": "microsoft/resnet-50", "stages": ["stage2"]}, "model")
    assert options == DenseBackboneOptions("microsoft/resnet-50", ("stage2",), 128)
    assert parse_options(spec.options, {"encoder": {"model_type": "resnet"}}, "model").encoder["model_type"] == "resnet"
    with pytest.raises(OptionError, match=r"^model\.decoder_size: 0 is not valid, expected 1 or more$"):
        parse_options(spec.options, {"encoder": "x", "decoder_size": 0}, "model")


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("bert", r"^model\.encoder: 'bert' is no backbone of transformers' AutoBackbone, expected one such as resnet"),
        ("vit", r"^model\.encoder: 'vit' is no backbone of transformers' AutoBackbone"),
        ("nothing", r"^model\.encoder: there is no folder '.*nothing'$"),
    ],
)
def test_encoders_that_do_not_do_are_one_line(encoders: Path, encoder: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        build(encoders / encoder)
    assert "\n" not in str(caught.value)


def test_a_file_without_all_weights_is_refused(encoders: Path, tmp_path: Path) -> None:
    model = ResNetBackbone.from_pretrained(encoders / "resnet")
    state = {name: value for name, value in model.state_dict().items() if "stages.1" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(OptionError, match=r"^model\.encoder: .* cannot be loaded: its files lack encoder\.stages\.1"):
        build(tmp_path)


def test_bad_configs_are_refused() -> None:
    cases: list[tuple[dict, str]] = [
        ({"image_tasks": {"scene": 3}}, r"^image_tasks: 'scene' is not among task_names"),
        ({"task_names": ["depth"], "image_tasks": {"depth": 3}}, r"^image_tasks: 'depth' is the name of a task with"),
        ({"task_names": []}, r"^task_names: is empty"),
        ({"task_names": ["depht"]}, r"^task_names: 'depht' is not known \(did you mean \"depth\"\?\)"),
        ({"task_names": ["depth", "a"], "image_tasks": {"a": 0}}, r"^image_tasks\.a: 0 is not valid"),
        (
            {"task_names": ["a"], "image_tasks": {"a": 2}, "decoder_size": 1},
            r"^decoder_size: 1 is not valid with image",
        ),
        ({"image_std": [1, 1, 0]}, r"^image_std: .* expected numbers above 0$"),
        ({"image_mean": [1]}, r"^image_mean: .* expected a number for each of 3 colours$"),
    ]
    for changes, message in cases:
        with pytest.raises(OptionError, match=message):
            DenseBackboneConfig(**changes)
    with pytest.raises(OptionError, match=r"^model\.encoder\.model_type: is required, got hidden_size$"):
        build({"hidden_size": 3})

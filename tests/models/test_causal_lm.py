"""Causal language models with K tasks: what reaches the model, packing, accumulation, LoRA, resuming, errors."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_bilb.config.options import parse_options
from hf_bilb.data.text.instruction_rows import PackExamples
from hf_bilb.data.text.rows import PadTokens
from hf_bilb.errors import OptionError
from hf_bilb.experiments.build import build_model, resolve_data_options
from hf_bilb.experiments.recipe import parse_recipe, read_recipe
from hf_bilb.experiments.train import run_recipe
from hf_bilb.losses.tokens import TokenLosses
from hf_bilb.models import MODELS
from hf_bilb.models.causal_lm import CausalLmOptions, add_adapters, build_causal_lm
from hf_bilb.models.token_influence import check_packing
from tests.data.language_files import write_jsonl, write_language_model
from tests.models.language_training import LLAMA, TASKS, VOCAB, by_row, data_of, flat, model_of, trainer_of

ROOT = Path(__file__).resolve().parents[2]
GLUE = ROOT.parent / "shared" / "data" / "glue"
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
OPT = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1,
       "num_attention_heads": 2}  # fmt: skip
DICTATED = {"vocab_size": VOCAB, "max_length": 16, "packed": False, "special_tokens": {}}


# --- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_padded_batches_have_the_losses_of_single_examples(config: dict[str, Any], attention: str) -> None:
    model = model_of(config, attention=attention).eval()
    rows, packable = data_of(24), data_of(24, packed=True)
    expected = by_row(model, rows)
    assert all(expected.values())
    losses, found, gradients = TokenLosses(3), [], []
    for batch in (PadTokens(2)(list(rows)), PackExamples(2)(list(packable))):
        names = [name for name in batch if name not in ("token_labels", "task_ids")]
        found.append(losses(model(**{name: batch[name] for name in names}), batch))
        model.zero_grad()
        (found[-1][0] * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    tolerance = 1e-11 if attention == "sdpa" else 1e-6  # the eager one takes its softmax in float32
    for means, counts in found:
        assert counts.tolist() == [len(expected[task]) for task in TASKS]
        wanted = torch.tensor([sum(own) / len(own) for own in expected.values()], dtype=torch.float64)
        torch.testing.assert_close(means, wanted, rtol=tolerance, atol=0)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) <= tolerance


def test_no_label_reaches_the_model(tmp_path: Path) -> None:
    model, seen = model_of(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    for packed in (False, True):
        trainer_of(tmp_path, model, data_of(8, packed), max_steps=1, balancer="ls").train()
    assert seen[0] == {"input_ids", "attention_mask"}
    assert seen[1] == {"input_ids", "position_ids", "use_cache"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("balancer", "over"), [("ls", "micro_batch"), ("ls", "window"), ("bilb", "window")])
def test_four_micro_batches_are_one_batch(tmp_path: Path, balancer: str, over: str, packed: bool) -> None:
    ends, logs = [], []
    for accumulation in (1, 4):
        trainer = trainer_of(
            tmp_path / str(accumulation),
            model_of(),
            data_of(48, packed),
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
            balance_over=over,
            balancer=balancer,
        )
        before = flat(trainer.model)
        trainer.train()
        ends.append(flat(trainer.model))
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 3
    assert float((ends[0] - before).norm()) > 0.1
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) <= 1e-12
    if over == "window":  # of micro-batches without some task, F is another one
        assert logs[0] == pytest.approx(logs[1], rel=1e-12)


def test_evaluation_is_exact_in_tokens_and_keeps_no_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(22)
    trainer = trainer_of(tmp_path, model_of(), data, data, per_device_eval_batch_size=5)
    kept, original = [], trainer.prediction_step
    monkeypatch.setattr(
        trainer, "prediction_step", lambda *args, **kwargs: kept.append(original(*args, **kwargs)) or kept[-1]
    )
    found = trainer.evaluate()
    expected = {task: sum(own) / len(own) for task, own in by_row(trainer.model, data).items()}
    for task, loss in expected.items():
        assert found[f"eval_loss_{task}"] == pytest.approx(loss, rel=1e-12)
        assert found[f"eval_perplexity_{task}"] == pytest.approx(math.exp(loss), rel=1e-12)
    assert found["eval_loss"] == pytest.approx(sum(expected.values()) / 3, rel=1e-12)
    assert len(kept) == 5 and all(logits is None and labels is None for _, logits, labels in kept)
    assert trainer.predict(data).predictions.shape[::2] == (22, VOCAB)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        trainer = trainer_of(tmp_path, model_of(), data_of(8, True), max_steps=2, gradient_checkpointing=checkpointing)
        trainer.train()
        assert any(getattr(part, "gradient_checkpointing", False) for part in trainer.model.modules()) == checkpointing
        ends.append(flat(trainer.model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


# --- recipes ------------------------------------------------------------------------------------------------------


def recipe_of(tmp_path: Path, output: str, model: dict[str, Any], **data: Any) -> Any:
    file = tmp_path / "train.jsonl"
    if not file.is_file():
        write_jsonl(file)
    raw = {
        "model": {"name": "causal_lm", **model},
        "data": {"name": "instructions", "jsonl": {"train": str(file)}, "max_length": 48, "packed": True, **data},
        "balancer": {"name": "bilb", "learning_rate": 0.05},
        "trainer": {
            "output_dir": str(tmp_path / output), "seed": 1, "max_steps": 4, "learning_rate": 1e-2,
            "per_device_train_batch_size": 6, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2,
            "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "disable_tqdm": True,
            "task_sampling": {"strategy": "uniform", "batches": "mixed"},
        },
        "evaluation": {"plots": False},
    }  # fmt: skip
    return parse_recipe(raw, "mixture")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_language_model(tmp_path_factory.mktemp("pretrained")))


def logged(folder: Path) -> list[dict[str, Any]]:
    """The training losses and coefficients that a run has logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = ("loss", "coefficient", "weight")
    return [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in history if "loss" in entry]


def test_a_recipe_with_lora_trains_adapters_alone_and_resumes_exactly(tmp_path: Path, pretrained: str) -> None:
    model = {"model": pretrained, "lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}
    results = run_recipe(recipe_of(tmp_path, "run", model))
    assert {metric.key for metric in results.metrics} == {f"perplexity_{task}" for task in TASKS}
    for metric in results.metrics:
        loss = results.losses["test"][metric.task]
        assert metric.value == pytest.approx(math.exp(loss), rel=1e-9)
        assert metric.trivial is not None

    # The folder is an ordinary one: base model and adapters, and their tokenizer.
    base = AutoModelForCausalLM.from_pretrained(pretrained)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "<eos>"
    adapters = {name: value for name, value in loaded.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 2 * 2 and results.training["trained_parameters"] == sum(
        value.numel() for value in adapters.values()
    )
    assert all(value.abs().max() > 0 for value in adapters.values())  # B starts at zero
    trained = {name.replace(".base_layer", ""): value for name, value in loaded.named_parameters()}
    for name, value in base.named_parameters():
        assert torch.equal(trained[name], value)

    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    run_recipe(recipe_of(tmp_path, "again", model), resume=True)
    assert logged(tmp_path / "again") == logged(tmp_path / "run")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_a_recipe_with_a_fresh_model_resumes_exactly(tmp_path: Path) -> None:
    config = {**LLAMA, "max_position_embeddings": 48}
    data = {"tokenizer": {"vocab_size": 400}}
    results = run_recipe(recipe_of(tmp_path, "run", {"config": config}, **data))
    assert results.training["trained_parameters"] == results.training["parameters"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert len(tokenizer) == loaded.config.vocab_size and loaded.config.eos_token_id == tokenizer.eos_token_id

    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    run_recipe(recipe_of(tmp_path, "again", {"config": config}, **data), resume=True)
    assert logged(tmp_path / "again") == logged(tmp_path / "run")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_data_of_another_kind_are_refused(tmp_path: Path, pretrained: str) -> None:
    recipe = recipe_of(tmp_path, "run", {"model": pretrained})

    class Rows:
        model_arguments = {"num_features": 3}  # noqa: RUF012

    with pytest.raises(OptionError, match=r"^model\.name: 'causal_lm' is no model for these data"):
        build_model(recipe, Rows())


# --- building -----------------------------------------------------------------------------------------------------


def test_lora_freezes_the_model_and_chooses_layers(pretrained: str) -> None:
    dictated = {**DICTATED, "vocab_size": 300}
    model = build_causal_lm(CausalLmOptions(model=pretrained, lora=parse_lora(r=2)), **dictated)
    assert isinstance(model, PeftModel)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == {"q_proj", "v_proj"}
    wrong = (
        r"target_modules: 'q_prj' is no layer of 'llama' \(did you mean \"q_proj\"\?\); it has down_proj, gate_proj, k"
    )
    with pytest.raises(OptionError, match=wrong):
        build_causal_lm(CausalLmOptions(model=pretrained, lora=parse_lora(target_modules=["q_prj"])), **dictated)


@pytest.mark.parametrize("given", ["all-linear", ["all-linear"]], ids=str)
def test_every_linear_layer_but_the_last_is_adapted_as_by_peft_itself(given: object) -> None:
    model = add_adapters(model_of(), parse_lora(r=2, target_modules=given))
    theirs = get_peft_model(model_of(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    ours, expected = ({n for n, _ in one.named_parameters() if ".lora_" in n} for one in (model, theirs))
    assert ours == expected and not any("lm_head" in name for name in ours)
    more = add_adapters(model_of(), parse_lora(r=2, target_modules=["all-linear", "lm_head"]))
    assert {n for n, _ in more.named_parameters() if ".lora_" in n and n not in ours} == {
        f"base_model.model.lm_head.lora_{part}.default.weight" for part in "AB"
    }
    with pytest.raises(OptionError, match=r"^model\.lora\.target_modules: 'all-liner' is not valid, .*all-linear"):
        parse_lora(target_modules="all-liner")


def test_adapters_train_on_packed_rows_as_on_padded_ones(tmp_path: Path) -> None:
    """Position ids and `use_cache` pass through peft's model, whose forward names neither."""
    ends = []
    for packed in (False, True):
        model = add_adapters(model_of(), parse_lora(r=2, target_modules=["q_proj", "down_proj"])).double()
        torch.manual_seed(1)
        adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in adapters:
            torch.nn.init.normal_(parameter, std=0.5)
        before = flat(model).clone()
        settings = {"per_device_train_batch_size": 8, "balancer": "bilb", "learning_rate": 10.0}
        trainer_of(tmp_path, model, data_of(24, packed), **settings).train()
        ends.append(flat(model))
        assert float((ends[-1] - before).norm()) > 0.1
    assert float((ends[0] - ends[1]).norm() / (ends[0] - before).norm()) <= 1e-12


def parse_lora(**options: Any) -> Any:
    return parse_options(MODELS["causal_lm"].options, {"model": "x", "lora": options}, "model").lora


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_loaded_in_the_dtype_asked_for(pretrained: str, dtype: str) -> None:
    options = CausalLmOptions(model=pretrained, dtype=dtype, attention="eager")
    model = build_causal_lm(options, **{**DICTATED, "vocab_size": 300})
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == "eager"
    source = AutoModelForCausalLM.from_pretrained(pretrained)
    for ours, theirs in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_a_fresh_model_has_what_its_config_says() -> None:
    special = {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": None}
    model = build_causal_lm(CausalLmOptions(config=LLAMA), **{**DICTATED, "special_tokens": special})
    assert (model.config.vocab_size, model.config.hidden_size, model.config.eos_token_id) == (VOCAB, 16, 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_mixes_packed_examples_is_refused(attention: str) -> None:
    for config in (LLAMA, GPT2):
        model = model_of(config, attention=attention)
        check_packing(model)
        assert model.training
    with pytest.raises(OptionError, match=rf"^data\.packed: 'opt' with attention '{attention}' lets packed examples"):
        build_causal_lm(CausalLmOptions(config=OPT, attention=attention), **{**DICTATED, "packed": True})
    build_causal_lm(CausalLmOptions(config=OPT, attention=attention), **DICTATED)


def test_a_cache_asked_for_mixes_nothing(tmp_path: Path) -> None:
    """With `use_cache` in its config the model would take a packed row for a single example."""
    ends = []
    for use_cache in (False, True):
        trainer = trainer_of(tmp_path, model_of(), data_of(8, True), max_steps=1, use_cache=use_cache)
        assert trainer.model.config.use_cache == use_cache
        trainer.train()
        ends.append(flat(trainer.model))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^model\.model: one of model \(a name\) and config .* neither is set$"),
        ({"model": "x", "config": LLAMA}, r"^model\.model: .* both are set"),
        ({"config": {"hidden_size": 8}}, r"^model\.config\.model_type: is required"),
        ({"config": LLAMA, "lora": {"r": 2}}, r"^model\.lora: adapters need pretrained weights"),
        ({"config": LLAMA, "dtype": "float8"}, r"^model\.dtype: 'float8' is not valid"),
        ({"config": {**LLAMA, "model_type": "lama"}}, r"^model\.config\.model_type: 'lama' is no architecture"),
        ({"config": {**LLAMA, "hiden_size": 8}}, r"^model\.config\.hiden_size: .*\(did you mean \"hidden_size\"\?\)$"),
        ({"config": {**LLAMA, "hidden_size": "wide"}}, r"^model\.config: .*'hidden_size' expected int"),
        ({"config": {**LLAMA, "vocab_size": 30}}, r"^data\.tokenizer: has 50 entries, but .* the fresh model has 30$"),
        ({"config": {**LLAMA, "max_position_embeddings": 8}}, r"^data\.max_length: 16 is not valid, expected at most"),
        ({"model": "/no/such/folder"}, r"^model\.model: '/no/such/folder' cannot be loaded"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    spec = MODELS["causal_lm"]
    with pytest.raises(OptionError, match=message) as caught:
        spec.build(parse_options(spec.options, copy.deepcopy(options), "model"), **DICTATED)
    assert "\n" not in str(caught.value)


def test_an_encoder_is_no_causal_language_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    LlamaModel(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=60)).save_pretrained(
        tmp_path
    )
    with pytest.raises(OptionError, match=r"is no causal language model: its files lack lm_head\.weight$"):
        build_causal_lm(CausalLmOptions(model=str(tmp_path)), **DICTATED)


# --- the project's recipes ----------------------------------------------------------------------------------------


def test_the_recipe_takes_files_of_ones_own_as_it_says() -> None:
    path = ROOT / "recipes" / "instructions" / "bilb.yaml"
    recipe = read_recipe(path, ["data.glue=null", "data.tasks=null", "data.jsonl={train: my.jsonl}"])
    assert recipe.data["jsonl"] == {"train": "my.jsonl", "validation": None, "test": None}
    chat = read_recipe(path, ["model.model=Qwen/Qwen2.5-0.5B-Instruct", "data.chat=true"])
    # The tokenizer is the model's.
    assert resolve_data_options(chat).tokenizer == "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.data
@pytest.mark.skipif(not GLUE.is_dir(), reason="needs GLUE's TSV files in ../shared/data/glue")
@pytest.mark.parametrize("recipe", ["ls_small", "bilb_small"])
def test_the_small_recipes_train(tmp_path: Path, recipe: str) -> None:
    settings = [
        f"data.glue.folder={GLUE}", "data.tasks=[rte, stsb]", "data.max_train=200", "trainer.max_steps=3",
        "trainer.eval_steps=3", "trainer.save_steps=3", f"trainer.output_dir={tmp_path}", "trainer.use_cpu=true",
        "trainer.logging_steps=1", "trainer.disable_tqdm=true", "evaluation.split=validation",
    ]  # fmt: skip
    results = run_recipe(read_recipe(ROOT / "recipes" / "instructions" / f"{recipe}.yaml", settings))
    assert results.training["steps"] == 3
    assert [metric.key for metric in results.metrics] == ["perplexity_rte", "perplexity_stsb"]
    assert {"table.md", "losses.png", "weights.png", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in tmp_path.iterdir()
    }

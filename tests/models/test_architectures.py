"""Losses per task of unmodified causal language models of many architectures, padded and packed, against the examples
one by one, and which models are refused before training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hf_bilb.data.text.instruction_rows import InstructionRows, PackExamples
from hf_bilb.data.text.rows import PadTokens
from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.tokens import TokenLosses
from hf_bilb.models.causal_lm import CausalLmOptions, build_causal_lm
from hf_bilb.models.token_influence import check_packing
from tests.models.language_training import LLAMA, TASKS, VOCAB, data_of

SIZES = {name: value for name, value in LLAMA.items() if name != "model_type"}
ONE_HEAD_EACH = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
       "attn_pdrop": 0.0}  # fmt: skip
EXPERTS = {**SIZES, "num_experts_per_tok": 2}
BERT = {**ONE_HEAD_EACH, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL_BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0, "max_position_embeddings": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A fresh model's config, and what of it is exact in float64; `single`: it runs, or computes, in float32."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    packable: bool = True
    single: bool = False
    attention: str | None = None

    def build(self, packed: bool = False, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        options = CausalLmOptions(config={"model_type": self.model_type, **self.config, **changes},
                                  attention=self.attention)  # fmt: skip
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        return build_causal_lm(options, vocab_size=VOCAB, max_length=16, packed=packed, special_tokens=special)


CASES = {
    "qwen2": Case("qwen2", SIZES),
    "qwen3": Case("qwen3", {**SIZES, "head_dim": 8}),
    "mistral, sliding window": Case("mistral", {**SIZES, "head_dim": 8, "sliding_window": 4}),
    "gemma2, capped logits": Case("gemma2", {**SIZES, "head_dim": 8, "sliding_window": 4}, single=True),
    "gemma3": Case("gemma3_text", {**SIZES, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0},
                   single=True),
    "gpt_neox": Case("gpt_neox", ONE_HEAD_EACH),
    "gpt_bigcode": Case("gpt_bigcode", GPT),
    "phi, eager": Case("phi", SIZES, attention="eager", single=True),
    "olmo2": Case("olmo2", SIZES),
    "mixtral": Case("mixtral", {**EXPERTS, "num_local_experts": 4}, single=True),
    "olmoe, eager": Case("olmoe", {**EXPERTS, "num_experts": 4}, single=True, attention="eager"),
    "opt": Case("opt", {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2,
                        "num_attention_heads": 2, "dropout": 0.0}, packable=False),
    "falcon": Case("falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}, packable=False),
    "falcon, alibi": Case("falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                                     "alibi": True}, packable=False),
    "bloom": Case("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}, packable=False, single=True),
    "mamba": Case("mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, packable=False, single=True),
    "lfm2": Case("lfm2", {**SIZES, "layer_types": ["conv", "full_attention"]}, packable=False, single=True),
    "bert, decoder": Case("bert", {**BERT, "is_decoder": True}, packable=False),
    "bart, decoder": Case("bart", SMALL_BART, packable=False),
}  # fmt: skip


def spread(model: nn.Module) -> nn.Module:
    """Weights far from the small ones of a fresh model, so that every token matters to those that see it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return model.eval()


def one_by_one(model: nn.Module, rows: InstructionRows) -> Tensor:
    """`[K]`, every example by itself, without padding and without a mask, every token by itself."""
    found: list[list[Tensor]] = [[] for _ in TASKS]
    for row in rows:
        tokens = torch.from_numpy(row["input_ids"]).long()
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].double()
        for t, label in enumerate(row["token_labels"].tolist()):
            if label != -100:
                found[row["task_ids"]].append(functional.cross_entropy(logits[t - 1], torch.tensor(label)))
    return torch.stack([torch.stack(own).mean() for own in found])


def gradient(model: nn.Module, losses: Tensor) -> Tensor:
    model.zero_grad()
    (losses * torch.tensor([1.0, -2.0, 0.5], dtype=losses.dtype)).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def of_batch(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    columns = {name: column for name, column in batch.items() if name not in ("token_labels", "task_ids")}
    return TokenLosses(3)(model(**columns), batch)[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_are_those_of_single_examples_or_the_model_is_refused(case: Case) -> None:
    model = spread(case.build() if case.single else case.build().double())
    tolerance = 1e-5 if case.single else 1e-12
    rows = data_of(24)
    expected = one_by_one(model, rows)
    expected_gradient = gradient(model, expected)

    def differs(batch: dict[str, Any]) -> bool:
        losses = of_batch(model, batch)
        found = gradient(model, losses)
        return bool(
            ((losses - expected).abs() > tolerance * expected).any()
            or (found - expected_gradient).norm() > tolerance * expected_gradient.norm()
        )

    assert not differs(PadTokens(2)(list(rows)))
    if case.packable:
        assert not differs(PackExamples(2)(list(data_of(24, packed=True))))
        case.build(packed=True)
        return
    # Of few examples: the tables of positions of some models are short.
    assert differs(PackExamples(2)(list(data_of(3, packed=True))))
    with pytest.raises(OptionError, match=rf"^data\.packed: '{case.model_type}' with attention .* packed: false$"):
        case.build(packed=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "olmoe, eager"])
def test_experts_that_take_tokens_together_let_no_example_see_another(name: str, dtype: str) -> None:
    """They round differently with other tokens in the row, which is no influence."""
    for seed in range(5):
        model = CASES[name].build()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        check_packing(model.to(getattr(torch, dtype)))


# --- refused whatever the batches are -----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "electra"])
def test_an_encoder_that_sees_what_it_is_to_predict_is_refused(model_type: str) -> None:
    wrong = rf"^model: '{model_type}' sees the tokens that it is to predict, expected a causal .* is_decoder: true\)$"
    with pytest.raises(OptionError, match=wrong):
        Case(model_type, BERT).build()
    model = Case(model_type, {**BERT, "is_decoder": True}).build()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_for_experts_is_not_left_out_in_silence() -> None:
    case = CASES["mixtral"]
    with pytest.raises(OptionError, match=r"^model: 'mixtral' has a loss for its experts, which would be left out"):
        case.build(output_router_logits=True)
    model = case.build()
    batch = PadTokens(2)(list(data_of(4)))
    outputs = model(input_ids=batch["input_ids"], output_router_logits=True)
    with pytest.raises(TaskLossError, match=r"^aux_loss: the model's loss for its experts would be left out"):
        TokenLosses(3)(outputs, batch)


def test_a_model_with_a_mask_of_fixed_size_takes_no_packed_row() -> None:
    case = Case("gpt_neo", {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4,
                            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32})  # fmt: skip
    with pytest.raises(RuntimeError, match="size of tensor"):
        of_batch(case.build(), PackExamples(2)(list(data_of(24, packed=True))))
    with pytest.raises(OptionError, match=r"^data\.packed: 'gpt_neo' .* takes no row of more than 32 tokens, expected"):
        case.build(packed=True)


# --- FlashAttention -----------------------------------------------------------------------------------------------


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where FlashAttention is installed; on the CPU it would fail."""
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *_, **__: name)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen2", None),
        ("mistral, sliding window", None),
        ("mixtral", None),
        ("opt", None),
        # Position ids do not reach its attention, although with sdpa it masks by them.
        ("gpt_bigcode", "lets packed examples see each other"),
        ("lfm2", "lets packed examples see each other"),
        ("mamba", "lets packed examples see each other"),
        ("bart, decoder", "counts positions on from one packed example to the next"),
        ("falcon", "cannot be tried with a packed row: "),
    ],
)
def test_with_flash_attention_position_ids_must_reach_it(name: str, message: str | None) -> None:
    case = Case(CASES[name].model_type, CASES[name].config, attention="flash_attention_2")
    if message is None:
        assert case.build(packed=True).config._attn_implementation == "flash_attention_2"
        return
    with pytest.raises(
        OptionError, match=rf"^data\.packed: '{case.model_type}' with attention 'flash_attention_2' {message}"
    ):
        case.build(packed=True)


@pytest.mark.usefixtures("flash")
def test_an_encoder_is_refused_with_flash_attention_as_well() -> None:
    with pytest.raises(OptionError, match=r"^model: 'bert' sees the tokens that it is to predict"):
        Case("bert", BERT, attention="flash_attention_2").build()
    assert Case("bert", {**BERT, "is_decoder": True}, attention="flash_attention_2").build().training


def test_a_model_that_cannot_be_tried_is_let_through_with_a_warning(
    flash: None, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES["falcon"]
    Case(case.model_type, case.config, attention="flash_attention_2").build()
    assert "falcon: could not be tried before training: " in caplog.text

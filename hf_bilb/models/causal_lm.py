"""Any causal language model of `AutoModelForCausalLM`, unmodified, whole or with LoRA.

The model returns logits alone: labels never reach its forward, and the K losses are made of the logits once, by
`hf_bilb.losses.tokens`. Gradient checkpointing is the Trainer's (`trainer.gradient_checkpointing: true`). What is saved
is an ordinary checkpoint: `AutoModelForCausalLM.from_pretrained(folder)` loads it, adapters included, with the base
model that they belong to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME as ADAPTER_CONFIG

from hf_bilb.config.options import check_one_of, nearest
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.models.base import align
from hf_bilb.models.lora import LoraOptions, lora_config
from hf_bilb.models.quantization import (
    Quantization,
    check_needs_lora,
    loading_arguments,
    quantization_config,
)
from hf_bilb.models.spec import PlainModelSpec
from hf_bilb.models.token_influence import check_causal, check_packing
from hf_bilb.storage.adapter_weights import with_adapters
from hf_bilb.storage.tensor_files import Differences

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class CausalLmOptions:
    """What a recipe's `model:` section may set. Exactly one of `model` and `config` is set.

    Attributes:
        model: a name on the hub (`Qwen/Qwen2.5-0.5B`), or a folder.
        config: a fresh model with random weights: its `model_type` and whatever else its config has
            (`{model_type: llama, hidden_size: 64, ...}`); the vocabulary is that of the tokenizer.
        dtype: of the weights. Mixed precision is the Trainer's (`trainer.bf16: true` with float32 weights).
        attention: `sdpa`, `eager`, `flash_attention_2`, or what else transformers takes; null = its choice.
        lora: options of LoRA, with which only the adapters are trained; null = everything is.
        quantization: `4bit` or `8bit`, of the weights under LoRA; needs a CUDA GPU and bitsandbytes.

    Raises:
        OptionError: both or none of `model` and `config`, adapters on a fresh model, or quantised weights without
            adapters.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    dtype: DType = "float32"
    attention: str | None = None
    lora: LoraOptions | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_one_of("model (a name) and config (of a fresh model)", model=self.model, config=self.config)
        if self.config is not None and "model_type" not in self.config:
            raise OptionError("config.model_type: is required, expected an architecture such as llama")
        if self.config is not None and self.lora is not None:
            raise OptionError("lora: adapters need pretrained weights to stand on, expected null for a fresh model")
        check_needs_lora(self.quantization, self.lora)


def build_causal_lm(
    options: CausalLmOptions,
    *,
    vocab_size: int,
    max_length: int,
    packed: bool,
    special_tokens: Mapping[str, int | None],
) -> PreTrainedModel | PeftModel:
    """The model of a recipe.

    Args:
        options: the recipe's.
        vocab_size: entries of the tokenizer that made the data; the model must have as many.
        max_length: tokens of the data's longest example; the model must take as many.
        packed: several examples share a row, see `hf_bilb.data.text.instruction_rows`.
        special_tokens: `bos_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer, for a fresh model's config.

    Raises:
        OptionError: a model that cannot be loaded, does not fit the data, is not causal, or lets packed examples see
            each other (`models.token_influence`); layers for LoRA that it does not have;
            quantised weights without a GPU.
        MissingPackageError: bitsandbytes is not installed.

    Cost, in addition to loading: a forward and a backward pass of four tokens, and as much again for `packed`.
    """
    dtype = getattr(torch, options.dtype)
    if options.model is not None:
        loading = loading_arguments(quantization_config(options.quantization))
        model = _pretrained(options.model, dtype, options.attention, **loading)
        where = f"the model {options.model!r}"
    else:
        assert options.config is not None  # CausalLmOptions asks for one of the two
        model = _fresh({"vocab_size": vocab_size, **options.config}, special_tokens, dtype, options.attention)
        where = "the fresh model"
    entries = model.get_input_embeddings().weight.shape[0]
    if vocab_size > entries:
        raise OptionError(f"data.tokenizer: has {vocab_size} entries, but the vocabulary of {where} has {entries}")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and 0 < positions < max_length:  # of XLNet, which has no limit, it is -1
        raise OptionError(
            f"data.max_length: {max_length} is not valid, expected at most {positions}, the positions of {where}"
        )
    check_causal(model)
    if packed:
        check_packing(model)
    return model if options.lora is None else add_adapters(model, options.lora)


def _pretrained(
    name: str, dtype: torch.dtype | Literal["auto"], attention: str | None, **loading: Any
) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, output_loading_info=True, **loading
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # the last one: other shapes than the config's
        raise OptionError(f"model.model: {name!r} cannot be loaded: {_one_line(error)}") from None
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise OptionError(f"model.model: {name!r} is no causal language model: its files lack {missing}")
    align(model)
    return model


def _fresh(
    given: Mapping[str, Any], special_tokens: Mapping[str, int | None], dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    kind = given["model_type"]
    try:
        known = AutoConfig.for_model(kind)
    except ValueError:
        raise OptionError(f"model.config.model_type: {kind!r} is no architecture that transformers knows") from None
    names = {*known.to_dict(), *known.attribute_map}
    for key in given:
        if key not in names:  # the config would keep it, and nothing would read it
            raise OptionError(f"model.config.{key}: is no option of {kind!r}{nearest(key, names)}")
    try:
        config: PretrainedConfig = AutoConfig.for_model(**{**special_tokens, **given})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, TypeError, ImportError, StrictDataclassError) as error:
        raise OptionError(f"model.config: {_one_line(error)}") from None
    return model


def _one_line(error: Exception) -> str:
    # Of what is no language model, transformers goes on to name the 150 architectures that are.
    return " ".join(str(error).split()).partition(" Model type should be one of")[0]


# --- LoRA ---------------------------------------------------------------------------------------------------------


def add_adapters(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """Freeze the model and add adapters to its linear layers.

    Raises:
        OptionError: it has no layer of such a name, or peft knows none for it.
    """
    config = lora_config(options, model, model.config.model_type, task_type="CAUSAL_LM")
    # Reentrant gradient checkpointing drops the gradients of layers whose inputs need none.
    model.enable_input_require_grads()
    return get_peft_model(model, config)


def load_causal_lm(folder: str | Path) -> PreTrainedModel | PeftModel:
    """Load what a run left in its folder: the whole model, or the adapters on top of the model they were made for.

    Raises:
        CheckpointError: weights that no file holds, or that do not match.
        OptionError: the model that the adapters belong to cannot be loaded.
    """
    adapters = Path(folder) / ADAPTER_CONFIG
    if not adapters.is_file():
        return _whole(folder)
    name = json.loads(adapters.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise OptionError(f"{adapters}: does not say which model (base_model_name_or_path) the adapters belong to")
    try:
        base = _pretrained(name, "auto", None)
    except OptionError as error:
        cause = str(error).removeprefix("model.model: ")
        raise OptionError(f"{folder}: the model that its adapters belong to, {cause}") from None
    return with_adapters(base, folder)


def _whole(folder: str | Path) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {_one_line(error)}") from None
    if differences := Differences(sorted(info["missing_keys"]), sorted(info["unexpected_keys"])):
        raise CheckpointError(f"{folder}: its weights do not match {type(model).__name__}: {differences}")
    align(model)
    return model.eval()


SPEC = PlainModelSpec(options=CausalLmOptions, build=build_causal_lm)

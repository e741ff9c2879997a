"""Low-rank adapters, by peft: their options in a recipe, and which layers of a model they go into."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from hf_bilb.config.options import bounded, check_bounds, nearest
from hf_bilb.errors import CheckpointError, MissingPackageError, OptionError
from hf_bilb.models.base import check_dropout
from hf_bilb.models.pretrained import EncoderModel
from hf_bilb.models.quantization import Quantization, quantization_config
from hf_bilb.storage.adapter_weights import with_adapters

logger = logging.getLogger(__name__)

_LINEAR = (nn.Linear, Conv1D)
_ADAPTED = (*_LINEAR, nn.Conv2d)
#: peft's word for every linear layer but a language model's last one.
ALL_LINEAR = "all-linear"

#: Fields of `LoraConfig` that something else says.
_DECIDED = {
    "r": "is said by r",
    "lora_alpha": "is said by alpha",
    "lora_dropout": "is said by dropout",
    "target_modules": "is said by target_modules",
    "modules_to_save": "the heads are saved, and a decoder; nothing else is trained in full",
    "task_type": "follows from the model",
    "inference_mode": "a run trains",
    "base_model_name_or_path": "follows from the model",
    "revision": "follows from the model",
    "peft_type": "is LoRA",
}


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adaptation (Hu et al., ICLR 2022, arXiv 2106.09685), by peft: W + alpha / r B A with W frozen.

    Attributes:
        r: rank.
        alpha: scale.
        dropout: before A, in [0, 1).
        target_modules: ends of the names of the linear or convolution layers that are adapted; `all-linear`, alone or
            in the list: every linear layer, but for the last one of a language model; null = peft's choice for the
            architecture (query and value of the attention, mostly). It has none for most image models.
        config: any other field of `peft.LoraConfig` and its value, such as `use_dora`, `use_rslora`, `bias`,
            `rank_pattern` (`{layer: rank}`), `alpha_pattern`, `exclude_modules`, `layers_to_transform`.
    """

    r: int = bounded(8, at_least=1, expected="1 or more")
    alpha: float = bounded(16.0, above=0)
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_bounds(self)
        check_dropout(self.dropout)
        if self.target_modules == ():
            raise OptionError("target_modules: is empty, expected names of layers, or null for peft's choice")
        known = [one.name for one in fields(LoraConfig) if one.init and one.name not in _DECIDED]
        for key in self.config:
            if key in _DECIDED:
                raise OptionError(f"config.{key}: {_DECIDED[key]}")
            if key not in known:
                raise OptionError(f"config.{key}: peft.LoraConfig has no such field{nearest(str(key), known)}")


def lora_config(
    options: LoraOptions,
    adapted: PreTrainedModel,
    kind: str,
    task_type: str | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> LoraConfig:
    """What `peft.get_peft_model` takes.

    Args:
        options: the recipe's.
        adapted: the part of the model that adapters go into.
        kind: its `model_type`, by which peft chooses layers.
        task_type: peft's name for what the model is for; None = no model of its own for it.
        modules_to_save: what is trained and saved in addition to the adapters.

    Raises:
        OptionError: `adapted` has no layer of such a name, or peft knows none for it; peft refuses `config`.
    """
    targets = options.target_modules or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    targets = (targets,) if isinstance(targets, str) else targets
    names = [name for name, _ in adapted.named_modules()]
    linear = {name.rpartition(".")[2] for name, part in adapted.named_modules() if isinstance(part, _ADAPTED)}
    listed = ", ".join(sorted(linear))
    if targets is None:
        raise OptionError(f"model.lora.target_modules: peft has no choice for {kind!r}, expected some of {listed}")
    layers: list[str] = []
    for target in targets:
        found = _linear_layers(adapted) if target == ALL_LINEAR else [target]
        if not any(f".{name}".endswith(f".{end}") for name in names for end in found):
            near = nearest(target, linear)
            raise OptionError(f"model.lora.target_modules: {target!r} is no layer of {kind!r}{near}; it has {listed}")
        layers += found
    try:
        return LoraConfig(
            task_type=task_type,
            r=options.r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=layers,
            modules_to_save=None if modules_to_save is None else list(modules_to_save),
            **options.config,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise OptionError(f"model.lora.config: peft refuses it: {error}") from error


def _linear_layers(adapted: PreTrainedModel) -> list[str]:
    last = adapted.get_output_embeddings()
    return [name for name, part in adapted.named_modules() if isinstance(part, _LINEAR) and part is not last]


# --- models around an encoder -------------------------------------------------------------------------------------


def add_encoder_lora(model: EncoderModel, options: LoraOptions) -> PeftModel:
    """Freeze the encoder, add adapters to its layers, and train and save all other layers in addition to them.

    Raises:
        OptionError: the encoder has no layer of such a name, or peft knows none for it.
    """
    # By these peft chooses the layers for quantised weights.
    for key in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(model, key, getattr(model.encoder, key, False))
    kind = model.config.encoder_config.model_type
    return get_peft_model(model, lora_config(options, model.encoder, kind, modules_to_save=_outside_the_encoder(model)))


def _outside_the_encoder(model: EncoderModel) -> list[str]:
    """The layers with weights that are not the encoder's: heads, decoder. Of a list each layer, as peft wraps none."""
    layers: list[str] = []
    for name, part in model.named_children():
        if part is not model.encoder and any(True for _ in part.parameters()):
            layers += [f"{name}.{i}" for i in range(len(part))] if isinstance(part, nn.ModuleList) else [name]
    return layers


def load_adapted(model_class: Any, folder: Path) -> PeftModel:
    """The adapters in `folder` on top of the encoder they were made for; see `EncoderModel.from_pretrained`."""
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{folder}: holds adapters, and no {CONFIG_NAME} that says what they belong to")
    config = model_class.config_class.from_pretrained(folder)
    if config.encoder_name is None:
        raise OptionError(f"{folder}: config.json does not say which encoder (encoder_name) the adapters belong to")
    model = model_class.from_encoder(
        config.encoder_name,
        path=f"{folder}: the encoder of its adapters",
        quantization=_quantization_here(config),
        **{key: getattr(config, key) for key in model_class.encoder_arguments},
    )
    return with_adapters(model, folder)


def _quantization_here(config: PretrainedConfig) -> Quantization | None:
    """That of the config; None, with a warning, where this machine cannot have it."""
    try:
        quantization_config(config.quantization)
    except (OptionError, MissingPackageError) as error:
        logger.warning(
            "the adapters were trained on %s weights; they are loaded in full: %s", config.quantization, error
        )
        return None
    return config.quantization

"""Pretrained encoders of `AutoModel`, as a part of a model with heads of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_bilb.data.text import pretrained_path
from hf_bilb.models.base import MultiTaskModel
from hf_bilb.options import OptionError


class EncoderModel(MultiTaskModel):
    """A model around an encoder, its attribute `encoder`; what that supports is supported."""

    supports_gradient_checkpointing = True
    # The encoder decides; as wrapper this class stands in no way.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True


def as_encoder_config(given: PretrainedConfig | Mapping[str, Any] | None, model_type: str) -> PretrainedConfig:
    """A config, a mapping with its `model_type`, or None for the default of `model_type`."""
    if isinstance(given, PretrainedConfig):
        return given
    config: PretrainedConfig = AutoConfig.for_model(**{"model_type": model_type, **(given or {})})
    return config


def read_encoder_config(encoder: str, path: str) -> tuple[str, PretrainedConfig]:
    """Where the encoder lies, and its config, for float32.

    Args:
        encoder: a name on the hub, a folder, or `package:<module>`.
        path: the option it stands in, for messages.

    Raises:
        OptionError: one line, when it cannot be loaded.
        MissingPackageError: its package is not installed.
    """
    folder = pretrained_path(encoder, path)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise _not_loaded(encoder, path, error) from None
    # In float32 also where they are stored in half precision: mixed precision is the Trainer's business.
    config.dtype = torch.float32
    return folder, config


def load_encoder(encoder: str, folder: str, config: PretrainedConfig, path: str, with_pooler: bool) -> PreTrainedModel:
    """The encoder with its pretrained weights; `config` names it by `encoder` afterwards, not by a path.

    Raises:
        OptionError: one line, when it cannot be loaded or some weights are missing, and would be random.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it lists the heads that the encoder was pretrained with
    try:
        loaded, info = AutoModel.from_pretrained(
            folder, config=config, dtype=config.dtype, output_loading_info=True, **pooler_argument(config, with_pooler)
        )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            advice = "; with pooling: mean it needs no pooler" if all("pooler" in key for key in missing) else ""
            raise ValueError(f"its files lack {', '.join(missing[:3])}{advice}")
    except (OSError, ValueError) as error:
        raise _not_loaded(encoder, path, error) from None
    finally:
        transformers_logging.set_verbosity(level)
    config.name_or_path = encoder  # no path of this machine in what is saved
    return loaded


def pooler_argument(config: PretrainedConfig, with_pooler: bool) -> dict[str, bool]:
    """The argument that leaves out a pooling layer with weights, which nothing would train, where there is one."""
    encoder_class = AutoModel._model_mapping[type(config)]
    takes_it = "add_pooling_layer" in inspect.signature(encoder_class.__init__).parameters
    return {"add_pooling_layer": with_pooler} if takes_it else {}


def _not_loaded(encoder: str, path: str, error: Exception) -> OptionError:
    return OptionError(f"{path}: {encoder!r} cannot be loaded: {' '.join(str(error).split())}")

"""Pretrained encoders of `AutoModel`, as a part of a model with heads of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ADAPTER_CONFIG_NAME as ADAPTER_CONFIG
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from hf_bilb.config.pretrained import pretrained_path
from hf_bilb.errors import OptionError
from hf_bilb.models.base import MultiTaskModel
from hf_bilb.models.quantization import loading_arguments

#: What an encoder takes, and the word for such encoders.
_KINDS = {"input_ids": "a text", "pixel_values": "an image"}


class EncoderModel(MultiTaskModel):
    """A model around an encoder, its attribute `encoder`; what that supports is supported."""

    supports_gradient_checkpointing = True
    # The encoder decides; as wrapper this class stands in no way.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    #: What `from_encoder` takes of the config.
    encoder_arguments: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As `MultiTaskModel.from_pretrained`; of a folder with adapters, a `PeftModel` on top of the encoder that they
        were made for, which `encoder_name` of the config names.

        Raises:
            CheckpointError: as there; or the adapters do not match the model.
            OptionError: the encoder cannot be loaded.
            MissingPackageError: its package is not installed.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        folder = None if name is None else adapter_folder(name, kwargs)
        if folder is not None:
            from hf_bilb.models.lora import load_adapted  # which imports this module

            return load_adapted(cls, folder)
        return super().from_pretrained(*args, output_loading_info=output_loading_info, **kwargs)

    @classmethod
    def read_encoder(cls, encoder: str, path: str) -> tuple[str, PretrainedConfig]:
        """As `read_encoder_config`, of an encoder that this model can have.

        Raises:
            OptionError: as there; or it takes other inputs.
        """
        folder, config = read_encoder_config(encoder, path)
        encoder_class = _encoder_class(config)
        if encoder_class is not None and encoder_class.main_input_name != cls.main_input_name:
            kind = _KINDS[cls.main_input_name]
            raise OptionError(f"{path}: {encoder!r} takes {encoder_class.main_input_name}, expected {kind} encoder")
        return folder, config


def adapter_folder(name: str | Path, asked: Mapping[str, Any]) -> Path | None:
    """The folder of a run with adapters, downloaded where `name` is one on the hub; None: there are none.

    Args:
        name: what `from_pretrained` was called with.
        asked: its keyword arguments, of which those of the hub are read.
    """
    on_hub = {key: asked[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in asked}
    if Path(name).is_dir():
        return Path(name) if (Path(name) / ADAPTER_CONFIG).is_file() else None
    if find_adapter_config_file(str(name), **on_hub) is None:
        return None
    return Path(snapshot_download(str(name), ignore_patterns=["checkpoint-*"], **on_hub))


def as_encoder_config(given: PretrainedConfig | Mapping[str, Any] | None, model_type: str) -> PretrainedConfig:
    """A config, a mapping with its `model_type`, or None for the default of `model_type`."""
    if isinstance(given, PretrainedConfig):
        return given
    config: PretrainedConfig = AutoConfig.for_model(**{"model_type": model_type, **(given or {})})
    return config


def read_encoder_config(encoder: str, path: str) -> tuple[str, PretrainedConfig]:
    """Where the encoder lies, and its config, for float32; its weights are not looked at.

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


def load_encoder(
    encoder: str,
    folder: str,
    config: PretrainedConfig,
    path: str,
    with_pooler: bool,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The encoder with its pretrained weights; see `load_pretrained`."""
    arguments: dict[str, Any] = {**pooler_argument(config, with_pooler), **loading_arguments(quantization)}
    return load_pretrained(AutoModel, encoder, folder, config, path, **arguments)


def take_encoder(model: EncoderModel, pretrained: PreTrainedModel, quantized: bool) -> None:
    """Give a fresh model the weights of `pretrained`; quantised ones are no weights of its own encoder's layers."""
    if quantized:
        model.encoder = pretrained
    else:
        model.encoder.load_state_dict(pretrained.state_dict())


def load_pretrained(
    model_class: Any,
    encoder: str,
    folder: str,
    config: PretrainedConfig,
    path: str,
    new_layers: str | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """A model with its pretrained weights; `config` names it by `encoder` afterwards, not by a path.

    Args:
        model_class: with `from_pretrained`, which takes the `arguments`.
        encoder: a name on the hub, a folder, or `package:<module>`.
        folder, config: what `read_encoder_config` has returned.
        path: the option it stands in, for messages.
        new_layers: beginning of the names of weights that no file has; None: every one has to be there.

    Raises:
        OptionError: one line, when it cannot be loaded or some weights are missing, and would be random.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it lists the heads that the encoder was pretrained with
    try:
        loaded: PreTrainedModel
        loaded, info = model_class.from_pretrained(
            folder, config=config, dtype=config.dtype, output_loading_info=True, **arguments
        )
        missing = sorted(key for key in info["missing_keys"] if new_layers is None or not key.startswith(new_layers))
        if missing:
            advice = "; with pooling: mean it needs no pooler" if all("pooler" in key for key in missing) else ""
            raise ValueError(f"its files lack {', '.join(missing[:3])}{advice}")
    except (OSError, ValueError, RuntimeError) as error:  # the last one: other shapes than the config's
        raise _not_loaded(encoder, path, error) from None
    finally:
        transformers_logging.set_verbosity(level)
    config.name_or_path = encoder  # no path of this machine in what is saved
    return loaded


def pooler_argument(config: PretrainedConfig, with_pooler: bool) -> dict[str, bool]:
    """The argument that leaves out a pooling layer with weights, which nothing would train, where there is one."""
    encoder_class = _encoder_class(config)
    assert encoder_class is not None  # of a config that AutoModel has loaded
    takes_it = "add_pooling_layer" in inspect.signature(encoder_class.__init__).parameters
    return {"add_pooling_layer": with_pooler} if takes_it else {}


def _encoder_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """What `AutoModel` makes of a config; None: it does not know it."""
    found = AutoModel._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


# --- images -------------------------------------------------------------------------------------------------------


def check_normalization(image_mean: Sequence[float], image_std: Sequence[float]) -> None:
    """Raise `OptionError` unless both are of three colours, and the standard deviations above 0."""
    for key, values in (("image_mean", image_mean), ("image_std", image_std)):
        if len(values) != 3:
            raise OptionError(f"{key}: {list(values)} is not valid, expected a number for each of 3 colours")
    if not min(image_std) > 0:
        raise OptionError(f"image_std: {list(image_std)} is not valid, expected numbers above 0")


def read_image_processor(folder: str) -> dict[str, Any] | None:
    """The settings of the encoder's image processor; None when it has none."""
    try:
        return BaseImageProcessor.get_image_processor_dict(folder)[0]
    except OSError:
        return None


def normalization_of(processor: Mapping[str, Any] | None) -> dict[str, list[float]]:
    """`image_mean` and `image_std` of an image processor; empty when it leaves pixels in [0, 1]."""
    if processor is None or not processor.get("do_normalize", False):
        return {}
    return {key: [float(value) for value in processor[key]] for key in ("image_mean", "image_std")}


def normalized(pixel_values: Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> Tensor:
    """`[B, 3, H, W]` in [0, 1] -> each colour less its mean, over its standard deviation."""
    return (pixel_values - _by_colour(image_mean, pixel_values)) / _by_colour(image_std, pixel_values)


def _by_colour(values: Sequence[float], like: Tensor) -> Tensor:
    """`[3, 1, 1]` on the device of `like`; filled there, since a copy from the host would wait for the device."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


def _not_loaded(encoder: str, path: str, error: Exception) -> OptionError:
    return OptionError(f"{path}: {encoder!r} cannot be loaded: {' '.join(str(error).split())}")

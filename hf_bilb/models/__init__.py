"""The models that a recipe can name, known to `AutoConfig` and `AutoModel` once this package is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from hf_bilb.models.mpnn import MpnnConfig, MpnnModel, MpnnOptions
from hf_bilb.models.outputs import MultiTaskOutput
from hf_bilb.models.qm9_mlp import Qm9MlpConfig, Qm9MlpModel, Qm9MlpOptions
from hf_bilb.models.text_encoder import (
    MultiTaskTextConfig,
    MultiTaskTextModel,
    MultiTaskTextOptions,
    build_multi_task_text,
)


@dataclass(frozen=True)
class ModelSpec:
    """An entry of the registry.

    Attributes:
        config_class: takes the recipe's options and what the data dictate (`TaskData.model_arguments`).
        model_class: takes the config.
        options: dataclass of what a recipe's `model:` section may set.
        build: the options and, as keyword arguments, what the data dictate -> the model, for models that do not start
            from fresh weights; None: `model_class(config_class(**both))`.
    """

    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    options: type[Any]
    build: Callable[..., nn.Module] | None = None


MODELS: dict[str, ModelSpec] = {
    "mpnn": ModelSpec(MpnnConfig, MpnnModel, MpnnOptions),
    "multi_task_text": ModelSpec(
        MultiTaskTextConfig, MultiTaskTextModel, MultiTaskTextOptions, build=build_multi_task_text
    ),
    "qm9_mlp": ModelSpec(Qm9MlpConfig, Qm9MlpModel, Qm9MlpOptions),
}

for _name, _spec in MODELS.items():
    AutoConfig.register(_name, _spec.config_class, exist_ok=True)
    AutoModel.register(_spec.config_class, _spec.model_class, exist_ok=True)

__all__ = [
    "MODELS",
    "ModelSpec",
    "MpnnConfig",
    "MpnnModel",
    "MpnnOptions",
    "MultiTaskOutput",
    "MultiTaskTextConfig",
    "MultiTaskTextModel",
    "MultiTaskTextOptions",
    "Qm9MlpConfig",
    "Qm9MlpModel",
    "Qm9MlpOptions",
]

"""The models that a recipe can name, known to `AutoConfig` and `AutoModel` once this package is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from hf_bilb.models.outputs import MultiTaskOutput
from hf_bilb.models.qm9_mlp import Qm9MlpConfig, Qm9MlpModel, Qm9MlpOptions


@dataclass(frozen=True)
class ModelSpec:
    """An entry of the registry.

    Attributes:
        config_class: takes the recipe's options and what the data dictate (`TaskData.model_arguments`).
        model_class: takes the config.
        options: dataclass of what a recipe's `model:` section may set.
    """

    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    options: type[Any]


MODELS: dict[str, ModelSpec] = {
    "qm9_mlp": ModelSpec(Qm9MlpConfig, Qm9MlpModel, Qm9MlpOptions),
}

for _name, _spec in MODELS.items():
    AutoConfig.register(_name, _spec.config_class, exist_ok=True)
    AutoModel.register(_spec.config_class, _spec.model_class, exist_ok=True)

__all__ = ["MODELS", "ModelSpec", "MultiTaskOutput", "Qm9MlpConfig", "Qm9MlpModel", "Qm9MlpOptions"]

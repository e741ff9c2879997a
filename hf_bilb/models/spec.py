"""What the registry of models says about each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelSpec:
    """An entry of the registry; its config and model are known to `AutoConfig` and `AutoModel` from then on.

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

    def __post_init__(self) -> None:
        AutoConfig.register(self.config_class.model_type, self.config_class, exist_ok=True)
        AutoModel.register(self.config_class, self.model_class, exist_ok=True)


@dataclass(frozen=True)
class PlainModelSpec:
    """An entry for modules without a config, which return predictions alone: `TaskData.task_loss_func` has the losses.

    Attributes:
        options: dataclass of what a recipe's `model:` section may set.
        build: the options and, as keyword arguments, what the data dictate -> the module.
    """

    options: type[Any]
    build: Callable[..., nn.Module]

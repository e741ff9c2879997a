"""The models that a recipe can name, known to `AutoConfig` and `AutoModel` once this package is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from hf_bilb.models.causal_lm import CausalLmOptions, build_causal_lm
from hf_bilb.models.celeba_cnn import CelebaCnnConfig, CelebaCnnModel, CelebaCnnOptions
from hf_bilb.models.dense.backbone import (
    DenseBackboneConfig,
    DenseBackboneModel,
    DenseBackboneOptions,
    build_dense_backbone,
)
from hf_bilb.models.dense.mtan import MtanConfig, MtanModel
from hf_bilb.models.dense.segnet import SegNetConfig, SegNetModel, SegNetOptions
from hf_bilb.models.graph.mpnn import MpnnConfig, MpnnModel, MpnnOptions
from hf_bilb.models.image_encoder import (
    MultiTaskImageConfig,
    MultiTaskImageModel,
    MultiTaskImageOptions,
    build_multi_task_image,
)
from hf_bilb.models.outputs import MultiTaskOutput
from hf_bilb.models.qm9_mlp import Qm9MlpConfig, Qm9MlpModel, Qm9MlpOptions
from hf_bilb.models.text_encoder import (
    MultiTaskTextConfig,
    MultiTaskTextModel,
    MultiTaskTextOptions,
    build_multi_task_text,
)
from hf_bilb.models.torch_module import TorchModuleOptions, build_torch_module


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


@dataclass(frozen=True)
class PlainModelSpec:
    """An entry for modules without a config, which return predictions alone: `TaskData.task_loss_func` has the losses.

    Attributes:
        options: dataclass of what a recipe's `model:` section may set.
        build: the options and, as keyword arguments, what the data dictate -> the module.
    """

    options: type[Any]
    build: Callable[..., nn.Module]


MODELS: dict[str, ModelSpec | PlainModelSpec] = {
    "causal_lm": PlainModelSpec(CausalLmOptions, build_causal_lm),
    "celeba_cnn": ModelSpec(CelebaCnnConfig, CelebaCnnModel, CelebaCnnOptions),
    "dense_backbone": ModelSpec(
        DenseBackboneConfig, DenseBackboneModel, DenseBackboneOptions, build=build_dense_backbone
    ),
    "image_encoder": ModelSpec(
        MultiTaskImageConfig, MultiTaskImageModel, MultiTaskImageOptions, build=build_multi_task_image
    ),
    "mpnn": ModelSpec(MpnnConfig, MpnnModel, MpnnOptions),
    "mtan": ModelSpec(MtanConfig, MtanModel, SegNetOptions),
    "multi_task_text": ModelSpec(
        MultiTaskTextConfig, MultiTaskTextModel, MultiTaskTextOptions, build=build_multi_task_text
    ),
    "qm9_mlp": ModelSpec(Qm9MlpConfig, Qm9MlpModel, Qm9MlpOptions),
    "segnet": ModelSpec(SegNetConfig, SegNetModel, SegNetOptions),
    "torch_module": PlainModelSpec(TorchModuleOptions, build_torch_module),
}

for _name, _spec in MODELS.items():
    if isinstance(_spec, ModelSpec):
        AutoConfig.register(_name, _spec.config_class, exist_ok=True)
        AutoModel.register(_spec.config_class, _spec.model_class, exist_ok=True)

__all__ = [
    "MODELS",
    "CelebaCnnConfig",
    "CelebaCnnModel",
    "CelebaCnnOptions",
    "DenseBackboneConfig",
    "DenseBackboneModel",
    "DenseBackboneOptions",
    "ModelSpec",
    "MpnnConfig",
    "MpnnModel",
    "MpnnOptions",
    "MtanConfig",
    "MtanModel",
    "MultiTaskImageConfig",
    "MultiTaskImageModel",
    "MultiTaskImageOptions",
    "MultiTaskOutput",
    "MultiTaskTextConfig",
    "MultiTaskTextModel",
    "MultiTaskTextOptions",
    "PlainModelSpec",
    "Qm9MlpConfig",
    "Qm9MlpModel",
    "Qm9MlpOptions",
    "SegNetConfig",
    "SegNetModel",
    "SegNetOptions",
    "TorchModuleOptions",
]

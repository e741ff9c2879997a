"""The models that a recipe can name, each imported when it is asked for.

One that is imported is known to `AutoConfig` and `AutoModel`; `register_models()` imports all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_bilb.config.lazy import lazy_attribute
from hf_bilb.config.registry import MODELS

if TYPE_CHECKING:
    from hf_bilb.models.causal_lm import CausalLmOptions, build_causal_lm
    from hf_bilb.models.celeba_cnn import CelebaCnnConfig, CelebaCnnModel, CelebaCnnOptions
    from hf_bilb.models.dense.backbone import DenseBackboneConfig, DenseBackboneModel, DenseBackboneOptions
    from hf_bilb.models.dense.mtan import MtanConfig, MtanModel
    from hf_bilb.models.dense.segnet import SegNetConfig, SegNetModel, SegNetOptions
    from hf_bilb.models.graph.mpnn import MpnnConfig, MpnnModel, MpnnOptions
    from hf_bilb.models.image_encoder import MultiTaskImageConfig, MultiTaskImageModel, MultiTaskImageOptions
    from hf_bilb.models.outputs import MultiTaskOutput
    from hf_bilb.models.qm9_mlp import Qm9MlpConfig, Qm9MlpModel, Qm9MlpOptions
    from hf_bilb.models.spec import ModelSpec, PlainModelSpec
    from hf_bilb.models.tabular_mlp import TabularMlpConfig, TabularMlpModel, TabularMlpOptions
    from hf_bilb.models.text_encoder import MultiTaskTextConfig, MultiTaskTextModel, MultiTaskTextOptions
    from hf_bilb.models.torch_module import TorchModuleOptions, build_torch_module

__all__ = [
    "MODELS",
    "CausalLmOptions",
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
    "TabularMlpConfig",
    "TabularMlpModel",
    "TabularMlpOptions",
    "TorchModuleOptions",
    "build_causal_lm",
    "build_torch_module",
    "register_models",
]

_CLASSES = {
    "hf_bilb.models.causal_lm": (
        "CausalLmOptions",
        "build_causal_lm",
    ),
    "hf_bilb.models.celeba_cnn": (
        "CelebaCnnConfig",
        "CelebaCnnModel",
        "CelebaCnnOptions",
    ),
    "hf_bilb.models.dense.backbone": (
        "DenseBackboneConfig",
        "DenseBackboneModel",
        "DenseBackboneOptions",
    ),
    "hf_bilb.models.dense.mtan": (
        "MtanConfig",
        "MtanModel",
    ),
    "hf_bilb.models.dense.segnet": (
        "SegNetConfig",
        "SegNetModel",
        "SegNetOptions",
    ),
    "hf_bilb.models.graph.mpnn": (
        "MpnnConfig",
        "MpnnModel",
        "MpnnOptions",
    ),
    "hf_bilb.models.image_encoder": (
        "MultiTaskImageConfig",
        "MultiTaskImageModel",
        "MultiTaskImageOptions",
    ),
    "hf_bilb.models.outputs": ("MultiTaskOutput",),
    "hf_bilb.models.qm9_mlp": (
        "Qm9MlpConfig",
        "Qm9MlpModel",
        "Qm9MlpOptions",
    ),
    "hf_bilb.models.spec": (
        "ModelSpec",
        "PlainModelSpec",
    ),
    "hf_bilb.models.tabular_mlp": (
        "TabularMlpConfig",
        "TabularMlpModel",
        "TabularMlpOptions",
    ),
    "hf_bilb.models.text_encoder": (
        "MultiTaskTextConfig",
        "MultiTaskTextModel",
        "MultiTaskTextOptions",
    ),
    "hf_bilb.models.torch_module": (
        "TorchModuleOptions",
        "build_torch_module",
    ),
}
_MODULES = {name: module for module, names in _CLASSES.items() for name in names}


def register_models() -> None:
    """Make every model of this package known to `AutoConfig` and `AutoModel`, to load a saved one without its class."""
    for name in MODELS:
        MODELS[name]


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, name, _MODULES)

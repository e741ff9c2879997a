"""hf_bilb: a drop-in Hugging Face Trainer that keeps K tasks in balance at the cost of one backward pass.

Every name below is imported when it is asked for: importing the package itself imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_bilb._version import __version__
from hf_bilb.config.lazy import lazy_attribute
from hf_bilb.errors import (
    CheckpointError,
    ExportError,
    FolderInUseError,
    HfBilbError,
    HubError,
    MetricError,
    MissingColumnError,
    MissingPackageError,
    NonFiniteLossError,
    OptionError,
    StorageError,
    TaskLossError,
    TrainerError,
)
from hf_bilb.models.auto_classes import register_when_needed

if TYPE_CHECKING:
    from hf_bilb.balancers.registry import build_balancer, list_balancers, register_balancer
    from hf_bilb.engine.balancer import LossBalancer
    from hf_bilb.engine.gradient_balancer import GradientBalancer
    from hf_bilb.engine.gradient_method import Direction, GradientOptions, GramianMethod, JacobianMethod
    from hf_bilb.engine.objective import (
        BilevelObjective,
        HistoryObjective,
        Objective,
        ObjectiveValue,
        ProgressObjective,
    )
    from hf_bilb.engine.options import BalancerOptions
    from hf_bilb.inference.load import load
    from hf_bilb.losses.contract import TaskLosses
    from hf_bilb.losses.masked import (
        masked_bce_with_logits,
        masked_cross_entropy,
        masked_l1,
        masked_mse,
        masked_task_means,
    )
    from hf_bilb.trainer.arguments import BilevelMTLTrainingArguments
    from hf_bilb.trainer.sampling import TaskSamplingOptions
    from hf_bilb.trainer.trainer import BilevelMTLTrainer

__all__ = [
    "BalancerOptions",
    "BilevelMTLTrainer",
    "BilevelMTLTrainingArguments",
    "BilevelObjective",
    "CheckpointError",
    "Direction",
    "ExportError",
    "FolderInUseError",
    "GradientBalancer",
    "GradientOptions",
    "GramianMethod",
    "HfBilbError",
    "HistoryObjective",
    "HubError",
    "JacobianMethod",
    "LossBalancer",
    "MetricError",
    "MissingColumnError",
    "MissingPackageError",
    "NonFiniteLossError",
    "Objective",
    "ObjectiveValue",
    "OptionError",
    "ProgressObjective",
    "StorageError",
    "TaskLossError",
    "TaskLosses",
    "TaskSamplingOptions",
    "TrainerError",
    "__version__",
    "build_balancer",
    "list_balancers",
    "load",
    "masked_bce_with_logits",
    "masked_cross_entropy",
    "masked_l1",
    "masked_mse",
    "masked_task_means",
    "register_balancer",
]

_NAMES = {
    "hf_bilb.balancers.registry": ("build_balancer", "list_balancers", "register_balancer"),
    "hf_bilb.engine.balancer": ("LossBalancer",),
    "hf_bilb.engine.gradient_balancer": ("GradientBalancer",),
    "hf_bilb.engine.gradient_method": ("Direction", "GradientOptions", "GramianMethod", "JacobianMethod"),
    "hf_bilb.engine.objective": (
        "BilevelObjective", "HistoryObjective", "Objective", "ObjectiveValue", "ProgressObjective",
    ),
    "hf_bilb.engine.options": ("BalancerOptions",),
    "hf_bilb.inference.load": ("load",),
    "hf_bilb.losses.contract": ("TaskLosses",),
    "hf_bilb.losses.masked": (
        "masked_bce_with_logits", "masked_cross_entropy", "masked_l1", "masked_mse", "masked_task_means",
    ),
    "hf_bilb.trainer.arguments": ("BilevelMTLTrainingArguments",),
    "hf_bilb.trainer.sampling": ("TaskSamplingOptions",),
    "hf_bilb.trainer.trainer": ("BilevelMTLTrainer",),
}  # fmt: skip
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

register_when_needed()


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, name, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

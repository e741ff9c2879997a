"""hf_bilb: a drop-in Hugging Face Trainer that keeps K tasks in balance at the cost of one backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_bilb._version import __version__
from hf_bilb.balancers import LossBalancer, build_balancer, list_balancers, register_balancer
from hf_bilb.errors import (
    CheckpointError,
    FolderInUseError,
    HfBilbError,
    MetricError,
    MissingColumnError,
    MissingPackageError,
    NonFiniteLossError,
    OptionError,
    StorageError,
    TaskLossError,
    TrainerError,
)

if TYPE_CHECKING:
    from hf_bilb.trainer.arguments import BilevelMTLTrainingArguments
    from hf_bilb.trainer.trainer import BilevelMTLTrainer

__all__ = [
    "BilevelMTLTrainer",
    "BilevelMTLTrainingArguments",
    "CheckpointError",
    "FolderInUseError",
    "HfBilbError",
    "LossBalancer",
    "MetricError",
    "MissingColumnError",
    "MissingPackageError",
    "NonFiniteLossError",
    "OptionError",
    "StorageError",
    "TaskLossError",
    "TrainerError",
    "__version__",
    "build_balancer",
    "list_balancers",
    "register_balancer",
]

# Importing transformers takes seconds; people with their own loop do not need it.
_LAZY = {"BilevelMTLTrainer": "hf_bilb.trainer.trainer", "BilevelMTLTrainingArguments": "hf_bilb.trainer.arguments"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

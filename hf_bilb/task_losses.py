"""The former place of the contract and the masked losses; take them from `hf_bilb` itself."""

from __future__ import annotations

import warnings

from hf_bilb.losses.contract import TaskLosses, as_task_losses
from hf_bilb.losses.masked import (
    masked_bce_with_logits,
    masked_cross_entropy,
    masked_l1,
    masked_mse,
    masked_task_means,
)

__all__ = [
    "TaskLosses",
    "as_task_losses",
    "masked_bce_with_logits",
    "masked_cross_entropy",
    "masked_l1",
    "masked_mse",
    "masked_task_means",
]

warnings.warn(
    "hf_bilb.task_losses has moved: take masked_mse, ... and TaskLosses from hf_bilb", DeprecationWarning, stacklevel=2
)

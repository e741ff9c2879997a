"""What the metrics of one task have in common: the streaming interface, and how predictions and labels are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.errors import MetricError


class Statistics(ABC):
    """Sufficient statistics of one task's metrics.

    State: tensors that exist from the beginning, and follow what is added to its device. Adding does not synchronise
    with the device: what only the values show (a label that is no class) is reported by `compute`.

    Attributes:
        metric_names: the keys that `compute` returns, in order.
    """

    metric_names: tuple[str, ...]

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The metrics of what was seen since `reset`; empty when no label was. One host read.

        Raises:
            MetricError: some label is none of this task.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Add what `other`, built in the same way, has seen.

        Raises:
            MetricError: it was built in another way.
        """

    def check_mergeable(self, other: object) -> None:
        """Raise `MetricError` unless `other` is of the same class."""
        if type(other) is not type(self):
            raise MetricError(f"merge: got {type(other).__name__}, expected {type(self).__name__}")


class Accumulator(Statistics):
    """Metrics of one task, batch by batch, from sufficient statistics.

    Attributes:
        higher_is_better: which way is up, the same for all of them.
    """

    higher_is_better: ClassVar[bool]

    @abstractmethod
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch: model outputs `[B]` or `[B, C]` and labels `[B]`, NaN where missing.

        Raises:
            MetricError: the shapes do not fit.
        """


def wide(values: Tensor) -> Tensor:
    """`values`, detached, in the precision to sum in: float64, or float32 where the device has no float64 (MPS)."""
    return values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)


def one_output(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `[B]`, or the first column of `[B, C]`, with labels `[B]`.

    Raises:
        MetricError: other shapes.
    """
    column = predictions[:, 0] if predictions.ndim == 2 and predictions.shape[1] > 0 else predictions
    if labels.ndim != 1 or column.shape != labels.shape:
        raise MetricError(
            f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, "
            "expected [B] or [B, C] (the first column counts) and [B]"
        )
    return column, labels


def as_vector_pair(predictions: Any, labels: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predictions and labels, numpy arrays, tensors on any device or lists, as float64 `[N]`.

    Raises:
        MetricError: they are not two vectors of one length.
    """
    first, second = _as_array(predictions), _as_array(labels)
    if first.ndim != 1 or first.shape != second.shape:
        raise MetricError(f"predictions {first.shape} and labels {second.shape}, expected both [N]")
    return first, second


def _as_array(values: Any) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        return values.detach().cpu().to(torch.float64).numpy()  # numpy has no bfloat16
    return np.asarray(values, dtype=np.float64)

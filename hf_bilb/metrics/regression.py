"""Errors of regression tasks, one number per task; labels that are NaN are missing."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def mean_absolute_error(predictions: NDArray[np.floating], labels: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean of |prediction - label| for each task.

    Args:
        predictions: `[N, K]`.
        labels: `[N, K]`, NaN where missing, in the units of the predictions.

    Returns:
        `[K]` in the same units, summed in float64; NaN for a task without any label.

    Raises:
        ValueError: when the shapes differ (they would broadcast to a plausible, wrong number).
    """
    accumulator = MeanAbsoluteError(num_tasks=labels.shape[-1])
    accumulator.update(torch.from_numpy(np.asarray(predictions)), torch.from_numpy(np.asarray(labels)))
    return accumulator.compute()


class MeanAbsoluteError:
    """The same, batch by batch: keeps K sums and K counts instead of all predictions.

    State: `sums [K]`, `counts [K]` (float64) on `device`. Does not synchronise with the device before `compute`.
    """

    def __init__(self, num_tasks: int, device: torch.device | None = None) -> None:
        self.sums = torch.zeros(num_tasks, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_tasks, dtype=torch.float64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch: both `[B, K]`, NaN labels are missing; on the device of the accumulator."""
        if predictions.shape != labels.shape or labels.shape[1:] != self.sums.shape:
            raise ValueError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, "
                f"expected both [B, {len(self.sums)}]"
            )
        there = ~labels.isnan()  # NaN only: -100 is a label like any other where labels are measurements
        errors = (predictions.detach().double() - labels.double()).abs()
        self.sums += errors.where(there, 0.0).sum(dim=0)
        self.counts += there.sum(dim=0)

    def merge(self, other: MeanAbsoluteError) -> None:
        """Add what `other` has seen."""
        self.sums += other.sums
        self.counts += other.counts

    def compute(self) -> NDArray[np.float64]:
        """`[K]` means of what was seen; NaN for a task without any label."""
        return (self.sums / self.counts).cpu().numpy()

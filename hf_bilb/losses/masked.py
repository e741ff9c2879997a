"""Losses with missing labels, vectorised over tasks; they keep the contract of `hf_bilb.losses.contract`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import TaskLossError

#: The integer label that stands for a missing one wherever nothing else is said (torch's and transformers' default).
MISSING_INTEGER = -100


def masked_task_means(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the batch for each task.

    Args:
        values: `[B, K]`, finite everywhere (mask the *inputs* of the loss, not its NaN results).
        mask: bool `[B, K]`, True where the entry counts.

    Returns:
        `losses [K]`, zero with zero gradient for a task without entries, and `num_items [K]` (float).
    """
    num_items = mask.sum(dim=0).to(torch.promote_types(values.dtype, torch.float32))
    sums = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum(dim=0)
    return sums / num_items.clamp(min=1).to(values.dtype), num_items


def masked_mse(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error per task; NaN labels are missing (-100 is a value like any other).

    Args:
        predictions: `[B, K]`.
        labels: `[B, K]`, NaN where missing, in the (squared) units of the task.

    Returns:
        `losses [K]` and `num_items [K]`.
    """
    mask, labels = _valid(predictions, labels, ~labels.isnan())
    return masked_task_means((predictions - labels).square(), mask)


def masked_l1(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute error per task; NaN labels are missing. Shapes as in `masked_mse`."""
    mask, labels = _valid(predictions, labels, ~labels.isnan())
    return masked_task_means((predictions - labels).abs(), mask)


def masked_bce_with_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy per task on logits; labels in [0, 1], NaN or -100 = missing; shapes as in `masked_mse`."""
    mask, labels = _valid(logits, labels, valid_labels(labels))
    return masked_task_means(functional.binary_cross_entropy_with_logits(logits, labels, reduction="none"), mask)


def masked_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = MISSING_INTEGER) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of one task.

    Args:
        logits: `[N, C]` or `[N, C, ...]`.
        labels: class indices `[N]` or `[N, ...]`, `ignore_index` where missing (255 in many segmentation masks).

    Returns:
        scalar loss (zero when nothing is valid) and the scalar count of valid labels.

    Raises:
        TaskLossError: on a CPU, a label that is no class and not `ignore_index`, naming it (on a GPU, which is not
            waited for, the device's own error).
    """
    num_items = labels.ne(ignore_index).sum().to(torch.promote_types(logits.dtype, torch.float32))
    total = class_losses(logits, labels, ignore_index, "sum")
    return total / num_items.clamp(min=1).to(logits.dtype), num_items


def class_losses(logits: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """`torch.nn.functional.cross_entropy`, whose error about a label that is no class says what to do."""
    try:
        return functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    except IndexError:
        num_classes = logits.shape[1] if logits.ndim > 1 else logits.shape[0]
        wrong = labels[(labels < 0).logical_or(labels >= num_classes) & labels.ne(ignore_index)]
        if wrong.numel() == 0:
            raise
        value = int(wrong[0])
        raise TaskLossError(
            f"labels: {value} is no class, expected 0 to {num_classes - 1}; where it stands for missing labels, pass "
            f"ignore_index={value} (it is {ignore_index})"
        ) from None


def valid_labels(labels: Tensor, ignore_index: int | None = None) -> Tensor:
    """Bool mask of the labels that are there: neither NaN nor -100, nor `ignore_index` where they are integers."""
    present = labels.ne(MISSING_INTEGER)
    if labels.is_floating_point():
        return present & ~labels.isnan()
    return present if ignore_index is None or ignore_index == MISSING_INTEGER else present & labels.ne(ignore_index)


def _valid(predictions: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if predictions.shape != labels.shape:
        raise TaskLossError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(predictions.shape)} like the predictions"
        )
    return mask, torch.where(mask, labels, 0).to(predictions.dtype)

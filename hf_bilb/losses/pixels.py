"""The loss of a task of pixels (`hf_bilb.losses.task_types`): its sum over the labelled pixels, and their number.

    segmentation       cross-entropy of C classes at each pixel
    dense_regression   absolute error of each of D numbers at each pixel, an item each

The absolute error is what the papers of dense prediction take for depth: a few pixels at the edges of objects, which
are off by a lot, would decide a squared one.

Labels are masked before the reduction (`hf_bilb.losses.contract`), so that no NaN reaches the graph. All is computed in
float32 at least, whatever the model computes in.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import TaskLossError
from hf_bilb.losses.masked import MISSING_INTEGER
from hf_bilb.losses.task_types import TaskType


def pixel_loss(name: str, task: TaskType, outputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the losses of one task, and number of its items.

    Args:
        name: of the task, for messages.
        task: `segmentation` or `dense_regression`.
        outputs: `[B, C, H, W]` or `[B, D, H, W]`.
        labels: `[B, H, W]` or `[B, D, H, W]`; None: all are missing.

    Returns:
        scalars; with weights of classes, both are weighted, in units of the smallest.

    Raises:
        TaskLossError: shapes or types that do not fit; on a CPU, a label that is none.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if labels is None:
        # Connected to the graph, so that its head counts as reached.
        zero = outputs[:0].sum()
        return zero, zero.detach()
    _check_shapes(name, task, outputs, labels)
    known = _known(task, labels)
    if labels.device.type == "cpu":
        _check_values(name, task, labels)
    if task.type == "segmentation":
        targets = torch.where(known, labels, MISSING_INTEGER).long()
        weight = _scaled_weights(task, outputs.dtype, outputs.device)
        total = functional.cross_entropy(outputs, targets, weight=weight, ignore_index=MISSING_INTEGER, reduction="sum")
    else:
        errors = (outputs - torch.where(known, labels, 0).to(outputs.dtype)).abs()
        total = torch.where(known, errors, 0).sum()
    return total, _items(task, labels, known)


def pixel_items(task: TaskType, labels: Tensor) -> Tensor:
    """Number of the items of a batch's labels, a scalar; with weights of classes their sum."""
    return _items(task, labels, _known(task, labels))


def _items(task: TaskType, labels: Tensor, known: Tensor) -> Tensor:
    wide = torch.float32 if labels.device.type == "mps" else torch.float64
    weights = _scaled_weights(task, wide, labels.device)
    return known.sum() if weights is None else torch.where(known, weights[labels.clamp(min=0).long()], 0).sum()


def _known(task: TaskType, labels: Tensor) -> Tensor:
    """Bool mask of the labels that are there, of their shape."""
    return labels >= 0 if task.type == "segmentation" else ~labels.isnan()


def check_pixel_outputs(outputs: Sequence[Tensor], tasks: Sequence[tuple[str, TaskType]]) -> None:
    """Raise `TaskLossError` unless there is `[B, size, H, W]` for each of the tasks."""
    if len(outputs) != len(tasks):
        names = ", ".join(name for name, _ in tasks) or "there are none"
        raise TaskLossError(f"logits: got {len(outputs)} outputs of pixels, expected one for each task ({names})")
    for part, (name, task) in zip(outputs, tasks, strict=True):
        if part.ndim != 4 or part.shape[1] != task.size:
            raise TaskLossError(f"task {name!r}: got outputs {tuple(part.shape)}, expected [B, {task.size}, H, W]")


def _check_shapes(name: str, task: TaskType, outputs: Tensor, labels: Tensor) -> None:
    expected = (len(outputs), *outputs.shape[2:]) if task.type == "segmentation" else tuple(outputs.shape)
    if tuple(labels.shape) != expected:
        raise TaskLossError(
            f"task {name!r}: got outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)}, expected labels "
            f"{list(expected)}"
        )
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if whole != (task.type == "segmentation"):
        wanted = "class numbers (int64)" if task.type == "segmentation" else "numbers (float32)"
        raise TaskLossError(f"task {name!r}: got labels of {labels.dtype}, expected {wanted}")


def _check_values(name: str, task: TaskType, labels: Tensor) -> None:
    wrong = labels >= task.size if task.type == "segmentation" else labels.isinf()
    if wrong.any():
        expected = f"a class from 0 to {task.size - 1}" if task.type == "segmentation" else "a finite number"
        missing = f"{MISSING_INTEGER}" if task.type == "segmentation" else "NaN"
        raise TaskLossError(
            f"labels: {labels[wrong][0].item():g} of task {name!r} is none, expected {expected}, or {missing} where it "
            "is missing"
        )


@functools.lru_cache(maxsize=64)
def _scaled_weights(task: TaskType, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """`[C]` in units of the smallest; None: all are 1. Kept, because a copy from the host waits for the device."""
    given = task.class_weights
    if all(weight == 1 for weight in given):
        return None
    with torch.inference_mode(False):  # what is made in inference mode cannot be used in training
        return torch.tensor([weight / min(given) for weight in given], dtype=dtype, device=device)

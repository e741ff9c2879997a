"""Losses of dense prediction, one item per pixel: segmentation, depth, surface normals; and classes of whole images.

The multi-task papers' losses (MTAN, CVPR 2019, and those after it): mean negative log-likelihood, mean absolute
difference and 1 - mean cosine, each over the pixels whose label is known, in a whole batch together. Missing, at a
pixel or in all of an image: segmentation and classes below 0 (-1 in our data), depth 0, normals (0, 0, 0); NaN is
missing too. Labels are masked before the reduction (`hf_bilb.losses.contract`), so that no NaN reaches the graph. All
is computed in float32 at least, whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_bilb.config.options import unknown_name
from hf_bilb.errors import TaskLossError
from hf_bilb.losses.masked import masked_cross_entropy

#: Tasks with a label at every pixel, named as their label columns.
DENSE_TASKS = ("segmentation", "depth", "normals")

#: Column `[B, M]` of the M tasks with one class per image, in the order of the task names (int64, below 0 = missing).
IMAGE_LABELS = "image_labels"

_MISSING_CLASS = -1
_SHORTEST = 1e-12  # vectors below this have no direction


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood over the labelled pixels.

    Args:
        logits: `[B, C, H, W]`; log-probabilities do as well.
        labels: integers `[B, H, W]`, 0 to C - 1, below 0 where not labelled.
        ignore_index: a label that stands for "not labelled" too, 255 in many masks; None = there is no other.

    Returns:
        loss (zero, with zero gradients, where no pixel is labelled) and number of labelled pixels, scalars.

    Raises:
        TaskLossError: shapes or types that do not fit; on a CPU, a label that is no class, naming it.
    """
    _check("segmentation", logits, labels, dimensions=4, expected=(logits.shape[0], *logits.shape[2:]))
    return _class_loss("segmentation", logits, labels, ignore_index)


def image_class_loss(logits: Tensor, labels: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood over the images with a class: `logits [B, C]`, int64 `labels [B]`, below 0 (or
    `ignore_index`) where missing; returns and raises as `segmentation_loss`."""
    _check("image class", logits, labels, dimensions=2, expected=(logits.shape[0],))
    return _class_loss("image class", logits, labels, ignore_index)


def depth_loss(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute difference over the measured pixels, in the units of the labels.

    Args:
        predictions: `[B, H, W]` or `[B, 1, H, W]`.
        labels: `[B, H, W]`, 0 (or NaN) where not measured: metres on NYUv2, inverse depth on Cityscapes.

    Returns and raises as `segmentation_loss`.
    """
    if predictions.ndim == 4 and predictions.shape[1] == 1:
        predictions = predictions.squeeze(1)
    _check("depth", predictions, labels, dimensions=3, expected=predictions.shape)
    predictions = _wide(predictions)
    mask = known_pixels("depth", labels)
    labels = torch.where(mask, labels, 0).to(predictions.dtype)
    return _mean((predictions - labels).abs(), mask)


def normals_loss(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """1 - mean cosine between predicted and true normals, over the known pixels.

    Args:
        predictions: `[B, 3, H, W]`, of any length: they are normalised here.
        labels: `[B, 3, H, W]`, unit vectors, (0, 0, 0) (or NaN) where not known.

    Returns and raises as `segmentation_loss`.
    """
    _check("normals", predictions, labels, dimensions=4, expected=predictions.shape)
    if predictions.shape[1] != 3:
        raise TaskLossError(f"normals: got predictions {tuple(predictions.shape)}, expected [B, 3, H, W]")
    predictions = unit_vectors(predictions)
    mask = known_pixels("normals", labels)
    labels = torch.where(mask.unsqueeze(1), labels, 0).to(predictions.dtype)
    return _mean(1 - (predictions * labels).sum(dim=1), mask)


def unit_vectors(vectors: Tensor) -> Tensor:
    """`[B, 3, H, W]` with length 1 along dimension 1, in float32 at least; a zero vector stays zero."""
    vectors = _wide(vectors)
    lengths = vectors.norm(dim=1, keepdim=True)
    # Not clamped to the smallest length: its inverse would be the gradient at zero.
    return vectors / torch.where(lengths > _SHORTEST, lengths, 1)


_LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "depth": depth_loss,
    "normals": normals_loss,
}


def dense_task_losses(
    outputs: Mapping[str, Tensor] | Sequence[Tensor],
    labels: Mapping[str, Tensor | None],
    task_names: Sequence[str],
    image_tasks: Collection[str] = (),
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The losses of K tasks.

    Args:
        outputs: the predictions, by task or in the order of `task_names`.
        labels: task -> labels; without an entry (or None) the task is absent: loss and gradients zero, no items.
        task_names: the K tasks, of `DENSE_TASKS` or `image_tasks`.
        image_tasks: those with one class per image.
        ignore_index: a class number that stands for a missing label, in addition to those below 0.

    Returns:
        `losses [K]` and `num_items [K]` (pixels, or images).

    Raises:
        TaskLossError: shapes or types that do not fit, naming the task.
        OptionError: a task that is not known.
    """
    found = []
    for index, name in enumerate(task_names):
        prediction = outputs[name] if isinstance(outputs, Mapping) else outputs[index]
        given = labels.get(name)
        if given is None:
            # Connected to the graph, so that its head counts as reached.
            zero = _wide(prediction[:0]).sum()
            found.append((zero, zero.detach()))
        elif name in image_tasks:
            found.append(_named(name, image_class_loss, prediction, given, ignore_index))
        elif name == "segmentation":
            found.append(segmentation_loss(prediction, given, ignore_index))
        else:
            check_dense_task(name)
            found.append(_LOSSES[name](prediction, given))
    losses, num_items = zip(*found, strict=True)
    return torch.stack(losses), torch.stack(num_items)


def dense_item_counts(
    batch: Mapping[str, Any],
    task_names: Sequence[str],
    image_tasks: Sequence[str] = (),
    ignore_index: int | None = None,
) -> Tensor:
    """How many items each task has in a batch, `[K]`: bound to the names, a `task_item_counts` of `TaskData`.

    Args:
        batch: with the tasks' label columns; `image_labels [B, M]` for the M `image_tasks`, in their order.
        ignore_index: as in `dense_task_losses`.

    Raises:
        OptionError: a task that is not known.
    """
    labels = labels_by_task(batch, image_tasks)
    counts = []
    for name in task_names:
        given = labels.get(name)
        if name not in image_tasks:
            check_dense_task(name)
        kind = "segmentation" if name in image_tasks else name
        counts.append(
            torch.zeros((), dtype=torch.int64) if given is None else known_pixels(kind, given, ignore_index).sum()
        )
    return torch.stack([count.to(counts[0].device) for count in counts])


def labels_by_task(columns: Mapping[str, Any], image_tasks: Sequence[str]) -> dict[str, Tensor | None]:
    """Task -> its labels in a batch: the columns of `DENSE_TASKS`, and those in the column `image_labels`.

    Raises:
        TaskLossError: `image_labels` that is not `[B, M]`.
    """
    labels: dict[str, Tensor | None] = {name: columns.get(name) for name in DENSE_TASKS}
    of_images = columns.get(IMAGE_LABELS)
    if of_images is not None:
        if of_images.ndim != 2 or of_images.shape[1] != len(image_tasks):
            raise TaskLossError(
                f"{IMAGE_LABELS}: got shape {tuple(of_images.shape)}, expected [B, {len(image_tasks)}], "
                f"a column for each of the image tasks ({', '.join(image_tasks) or 'there are none'})"
            )
        labels.update(zip(image_tasks, of_images.unbind(1), strict=True))
    return labels


def known_pixels(task: str, labels: Tensor, ignore_index: int | None = None) -> Tensor:
    """Bool mask of the labels that are there: `[B, H, W]`, or `[B]` for the classes of images ("segmentation"), of
    which `ignore_index` is none."""
    if task == "segmentation":
        known = labels >= 0
        return known if ignore_index is None else known & labels.ne(ignore_index)
    if task == "depth":
        return labels.ne(0) & ~labels.isnan()
    return labels.ne(0).any(dim=1) & ~labels.isnan().any(dim=1)


def check_dense_task(name: str, path: str = "task_names") -> None:
    """Raise `OptionError` unless `name` is one of `DENSE_TASKS`."""
    if name not in DENSE_TASKS:
        raise unknown_name(path, name, DENSE_TASKS)


def _class_loss(name: str, logits: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TaskLossError(f"{name}: got labels of {labels.dtype}, expected class numbers (int64)")
    labels = labels.long().clamp(min=_MISSING_CLASS)
    if ignore_index is not None:
        labels = labels.masked_fill(labels.eq(ignore_index), _MISSING_CLASS)
    try:
        return masked_cross_entropy(_wide(logits), labels, ignore_index=_MISSING_CLASS)
    except TaskLossError as error:
        raise TaskLossError(f"{name}: {error}") from None


def _named(
    name: str, loss: Callable[..., tuple[Tensor, Tensor]], prediction: Tensor, labels: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    try:
        return loss(prediction, labels, ignore_index)
    except TaskLossError as error:
        raise TaskLossError(f"task {name!r}: {error}") from None


def _mean(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    num_items = mask.sum().to(values.dtype)
    return torch.where(mask, values, 0).sum() / num_items.clamp(min=1), num_items


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check(name: str, predictions: Tensor, labels: Tensor, dimensions: int, expected: Sequence[int]) -> None:
    if predictions.ndim != dimensions or tuple(labels.shape) != tuple(expected):
        raise TaskLossError(
            f"{name}: got predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, expected "
            f"{_SHAPES[name]}"
        )


_SHAPES = {
    "segmentation": "[B, C, H, W] and [B, H, W]",
    "image class": "[B, C] and [B]",
    "depth": "[B, H, W] (or [B, 1, H, W]) and [B, H, W]",
    "normals": "[B, 3, H, W] both",
}

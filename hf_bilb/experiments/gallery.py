"""A few images with labels and a trained model's predictions of pixel-wise tasks, and of tasks with one class per image
in addition to them, for `hf_bilb.reporting.gallery`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from hf_bilb.data.task_data import TaskData
from hf_bilb.losses.dense import IMAGE_LABELS
from hf_bilb.reporting.gallery import DRAWN_TASKS, GalleryRow

if TYPE_CHECKING:
    from hf_bilb.data.task_data import Part
    from hf_bilb.trainer.trainer import BilevelMTLTrainer

NUM_IMAGES = 4


def drawn_tasks(data: TaskData) -> tuple[str, ...]:
    """The tasks of `data` that a gallery can draw, in order; none where the data say nothing about a gallery."""
    return tuple(name for name in data.task_names if name in DRAWN_TASKS) if data.gallery is not None else ()


def gallery_rows(trainer: BilevelMTLTrainer, part: Part, data: TaskData, count: int = NUM_IMAGES) -> list[GalleryRow]:
    """`count` images of `part`, evenly spread over it, with their labels and the model's predictions.

    Args:
        trainer: with the trained model; under several processes every rank calls this.
        part: rows with `pixel_values [3, H, W]`.
        data: the set that it is of, with a `gallery`.
        count: number of images, or all where there are fewer.

    Returns:
        the rows; none where there is no task to draw.

    Cost: the predictions of the images.
    """
    tasks = drawn_tasks(data)
    if not tasks:
        return []
    length = len(part)  # type: ignore[arg-type]
    chosen = np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()
    output = trainer.predict(Subset(part, chosen))
    predictions = dict(zip(data.task_names, _entries(output.predictions), strict=True))
    labels = dict(zip(data.label_names, _entries(output.label_ids), strict=True))
    classes = _image_classes(data, predictions, labels)
    return [
        GalleryRow(
            name=f"image {index}",
            image=np.asarray(part[index]["pixel_values"]),
            truth={task: labels[task][k] for task in tasks},
            prediction={task: _predicted(task, predictions[task][k]) for task in tasks},
            classes={task: of_images[k] for task, of_images in classes.items()},
        )
        for k, index in enumerate(chosen)
    ]


def _image_classes(
    data: TaskData, predictions: Mapping[str, NDArray[Any]], labels: Mapping[str, NDArray[Any]]
) -> dict[str, list[tuple[str | None, str]]]:
    """Task with a class per image -> true (None: no label) and predicted class of every image."""
    found = {}
    for column, (task, names) in enumerate(data.gallery.image_classes.items() if data.gallery is not None else ()):
        truth, guesses = labels[IMAGE_LABELS][:, column].tolist(), predictions[task].argmax(axis=1).tolist()
        found[task] = [(names[t] if t >= 0 else None, names[p]) for t, p in zip(truth, guesses, strict=True)]
    return found


def _entries(values: Any) -> Sequence[NDArray[Any]]:
    return values if isinstance(values, (tuple, list)) else [values]


def _predicted(task: str, values: NDArray[Any]) -> NDArray[Any]:
    """`[C, H, W]` logits -> classes `[H, W]`; `[1, H, W]` depths -> `[H, W]`."""
    if task == "segmentation":
        return np.asarray(values.argmax(axis=0))
    return values[0] if task == "depth" and values.ndim == 3 else values

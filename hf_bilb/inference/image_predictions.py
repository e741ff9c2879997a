"""What a model with tasks of pixels says of images, each in its own size.

The model's outputs have the size that images were resized to. They are brought to an image's own size by bilinear
interpolation (`torch.nn.functional.interpolate`, corners not aligned); of classes the logits are, and then the largest
one is taken, as `post_process_semantic_segmentation` of transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hf_bilb.config.options import nearest
from hf_bilb.inference.predictions import Predictions
from hf_bilb.losses.dense import unit_vectors
from hf_bilb.losses.task_types import TaskType

Size = tuple[int, int]
_CLASSES_AT_ONCE = 8  # whose logits are brought to the image's size together


class ImagePrediction:
    """What a model says of one image of height H and width W. It iterates over the names of the tasks.

    | type | `prediction[task]` | `prediction.probabilities[task]` |
    |---|---|---|
    | segmentation | `[H, W]` int64, numbers of classes | `[C, H, W]` float32 |
    | dense_regression | `[H, W]` float32 in the unit of the training data; `[D, H, W]` for D of them | - |
    | normals of NYUv2 | `[3, H, W]` float32, vectors of length 1 | - |
    | regression, classification, multi_label | as in `Predictions`, of one row | likewise |

    Maps are computed whenever they are asked for, and not kept: what is kept are the outputs in the model's size.

    Numbers are interpolated, not scaled: a depth in metres stays one in metres, and a movement in pixels is one in
    pixels of images as those of the training data.

    Attributes:
        tasks: name -> type; `tasks[name].names` are the names of classes 0, 1, ...
        size: H and W.
        outputs: task -> what the model computed, float32: `[C, h, w]`, `[D, h, w]` (depth of NYUv2: `[h, w]`), of tasks
            of rows `[size]`; before softmax, and before `output * std + mean`.
    """

    def __init__(
        self, tasks: Mapping[str, TaskType], outputs: Mapping[str, Tensor], size: Size, directions: frozenset[str]
    ) -> None:
        self.tasks = dict(tasks)
        self.size = size
        self.outputs = {name: output.numpy() for name, output in outputs.items()}
        self._directions = directions
        self._of_image = _of_image(tasks, outputs)

    def __getitem__(self, task: str) -> Any:
        self._check(task)
        if task in self._of_image:
            return self._of_image[task][0]
        output = torch.from_numpy(self.outputs[task])
        if self.tasks[task].type == "segmentation":
            return best_classes(output, self.size).numpy()
        if task in self._directions:
            return unit_vectors(upsampled(output, self.size)[None])[0].numpy()
        return numbers(self.tasks[task], output, self.size)

    @property
    def probabilities(self) -> Mapping[str, NDArray[Any]]:
        """Task -> see the class; each is computed when it is asked for."""
        names = [name for name, task in self.tasks.items() if task.type == "segmentation"]
        return _Computed((*names, *self._of_image.probabilities), self._probabilities)

    def to_columns(self, all_classes: bool = False) -> dict[str, Any]:
        """Column -> value, of the tasks of whole images: those of `Predictions.to_columns`."""
        return {name: values[0] for name, values in self._of_image.to_columns(all_classes).items()}

    def _probabilities(self, task: str) -> NDArray[Any]:
        if task in self._of_image:
            of_image: NDArray[Any] = self._of_image.probabilities[task][0]
            return of_image
        return upsampled(torch.from_numpy(self.outputs[task]), self.size).softmax(dim=0).numpy()

    def _check(self, task: str) -> None:
        if task not in self.tasks:
            raise KeyError(f"{task!r} is no task of the model{nearest(task, self.tasks)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __contains__(self, task: object) -> bool:
        return task in self.tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def keys(self) -> Iterable[str]:
        """The names of the tasks, so that `dict(prediction)` has their answers."""
        return self.tasks.keys()

    def __repr__(self) -> str:
        return f"ImagePrediction({self.size[0]} x {self.size[1]} pixels, tasks {', '.join(self)})"


class _Computed(Mapping[str, "NDArray[Any]"]):
    """Values that are computed when they are asked for."""

    def __init__(self, names: tuple[str, ...], compute: Callable[[str], NDArray[Any]]) -> None:
        self._names, self._compute = names, compute

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _of_image(tasks: Mapping[str, TaskType], outputs: Mapping[str, Tensor]) -> Predictions:
    """The tasks of whole images, as predictions of one row."""
    of_rows = {name: task for name, task in tasks.items() if task.items == "rows"}
    return Predictions.of(of_rows, {name: [outputs[name][None]] for name in of_rows}, None)


# --- to the image's size ------------------------------------------------------------------------------------------


def upsampled(maps: Tensor, size: Size) -> Tensor:
    """`[D, h, w]` (or `[h, w]`) -> `[D, H, W]`, bilinear."""
    maps = maps[None] if maps.ndim == 2 else maps
    if maps.shape[-2:] == size:
        return maps
    return functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def best_classes(logits: Tensor, size: Size) -> Tensor:
    """`[C, h, w]` -> `[H, W]` int64, the class of the largest logit, the first of several; a NaN is the largest.

    The logits of eight classes are in memory at a time, so that an image of 12 megapixels takes 1.2 GB for any C.
    """
    classes = torch.zeros(size, dtype=torch.int64)
    largest: Tensor | None = None
    for start in range(0, len(logits), _CLASSES_AT_ONCE):
        some = upsampled(logits[start : start + _CLASSES_AT_ONCE], size)
        if largest is None:
            largest, classes = some.max(dim=0)
            continue
        largest, place = torch.cat([largest[None], some]).max(dim=0)
        classes = torch.where(place == 0, classes, place + (start - 1))
    return classes


def numbers(task: TaskType, output: Tensor, size: Size) -> NDArray[np.float32]:
    """`[D, h, w]` (or `[h, w]`) -> `[D, H, W]`, of one number `[H, W]`, in the task's unit."""
    output = output[None] if output.ndim == 2 else output
    found = np.empty((len(output), *size), np.float32)
    scale = zip(task.means, task.stds, strict=True) if task.means else [(0.0, 1.0)] * len(output)
    for channel, (values, (mean, std)) in enumerate(zip(output, scale, strict=True)):
        found[channel] = upsampled(values, size)[0].double() * std + mean
    return found[0] if task.size == 1 else found

"""The best predictor of a dense data set that sees no input, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.cache import Preparation, fingerprint, prepare_arrays
from hf_bilb.data.dense.files import IMAGE
from hf_bilb.data.dense.rows import DenseRows

if TYPE_CHECKING:
    from hf_bilb.metrics.dense import DenseMetrics

#: Raise it when a figure of the predictor changes.
_TRIVIAL_VERSION = 1
_TRIVIAL_IMAGES = 200  # training images that its constants are taken from, at most


def constant_answers(rows: DenseRows, num_classes: int) -> dict[str, Tensor]:
    """What a predictor that sees no input answers for every pixel: the most frequent class `[]`, the mean depth `[]`,
    the mean direction `[3]`; of at most 200 of the images, evenly spread. (For whole images: `frequent_classes`.)"""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _TRIVIAL_IMAGES)).astype(np.int64))
    plain = DenseRows(rows.files, rows.rows)
    counts = torch.zeros(num_classes, dtype=torch.int64)
    depth, direction = torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for index in chosen.tolist():
        row = plain[index]
        if "segmentation" in row:
            counts += torch.bincount(row["segmentation"][row["segmentation"] >= 0], minlength=num_classes)
        if "depth" in row:
            depth += torch.stack([row["depth"].double().sum(), (row["depth"] != 0).sum().double()])
        if "normals" in row:
            direction += row["normals"].double().sum(dim=(1, 2))
    length = direction.norm()
    found = {
        "segmentation": counts.argmax(),
        "depth": (depth[0] / depth[1].clamp(min=1)).float(),
        "normals": (direction / length if length > 0 else torch.tensor([0.0, 0.0, -1.0])).float(),
    }
    return {name: found[name] for name in plain.files if name != IMAGE}


def frequent_classes(rows: DenseRows, image_tasks: Mapping[str, int]) -> dict[str, Tensor]:
    """What it answers for every image: the logits `[C]` of the most frequent class (of the first of them in a tie)."""
    answers = {}
    for column, (name, num_classes) in enumerate(image_tasks.items()):
        assert rows.image_labels is not None
        labels = rows.image_labels[rows.rows, column]
        counts = np.bincount(labels[labels >= 0], minlength=num_classes)
        answers[name] = torch.from_numpy(np.eye(num_classes)[counts.argmax()])
    return answers


def trivial_metrics(
    root: Path, name: str, train: DenseRows, test: DenseRows, metrics: partial[DenseMetrics]
) -> dict[str, float]:
    """The metrics on the test part; in the cache, since angles of all pixels take a minute.

    Args:
        root: of the cache.
        name: of the data set.
        train: what is known.
        test: what is answered.
        metrics: `DenseMetrics` with all its arguments.
    """
    _, num_classes = metrics.args

    def compute(_: object) -> dict[str, NDArray[Any]]:
        answers = constant_answers(train, num_classes), frequent_classes(train, metrics.keywords["image_tasks"])
        found = _measure(*answers, test, metrics())
        return {"keys": np.array(list(found), dtype=np.str_), "values": np.array(list(found.values()), np.float64)}

    key = [str(train.files), train.rows.tobytes(), str(test.files), test.rows.tobytes(), str(metrics.keywords)]
    key += [part.image_labels.tobytes() for part in (train, test) if part.image_labels is not None]
    preparation = Preparation(
        name=f"{name}-trivial-v{_TRIVIAL_VERSION}-{fingerprint(key)}",
        chunks=lambda: [None],
        compute=compute,
        size=lambda _: len(test),
        summarize=lambda arrays: {},
        description=f"{name}: best constant answer",
        unit="images",
    )
    arrays, _ = prepare_arrays(root, preparation, num_workers=1)
    return {str(key): float(value) for key, value in zip(arrays["keys"], arrays["values"], strict=True)}


def _measure(
    of_pixels: Mapping[str, Tensor], of_images: Mapping[str, Tensor], rows: DenseRows, metrics: Any
) -> dict[str, float]:
    from transformers import EvalPrediction

    found: dict[str, float] = {}
    for start in range(0, len(rows), 8):
        last = min(start + 8, len(rows))
        (batch,) = rows.__getitems__(range(start, last))
        predictions = {
            name: answer[:, None, None].expand_as(batch[name]) if answer.ndim else answer.expand_as(batch[name])
            for name, answer in of_pixels.items()
        }
        predictions.update({name: answer.expand(last - start, -1) for name, answer in of_images.items()})
        given: Any = EvalPrediction(predictions=predictions, label_ids=batch)
        found = metrics(given, compute_result=last == len(rows))
    return found

"""Made-up images with labels and predictions of pixel-wise tasks, and their metrics by numpy, pixel lists and loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_bilb.losses.dense import dense_task_losses
from hf_bilb.metrics.dense import DenseMetrics

TASKS = ("segmentation", "depth", "normals")
NUM_CLASSES = 5
PUBLISHED_BATCH = 3
BASE = {"segmentation_miou": 0.4, "depth_abs_error": 0.5, "normals_median_angle": 20.0, "normals_within_30": 0.6}


@dataclass
class Prediction:
    """The two fields of `transformers.EvalPrediction`, which takes seconds to import."""

    predictions: Any
    label_ids: Any


class Images(Dataset):
    """N images of 6 x 8: `pixel_values [3, H, W]`, labels of three tasks.

    A fifth of the labels is missing by pixel, and all of a task for some images; class 4 is nowhere.
    """

    def __init__(self, number: int, seed: int = 0, size: tuple[int, int] = (6, 8)) -> None:
        generator = np.random.default_rng(seed)
        height, width = size

        def missing(share: float = 0.2) -> np.ndarray:
            return generator.random((number, height, width)) < share

        segmentation = generator.integers(0, NUM_CLASSES - 1, (number, height, width))
        depth = generator.uniform(0.3, 9, (number, height, width))
        normals = unit(generator.normal(size=(number, 3, height, width)))
        noise = generator.normal(size=(number, 3, height, width))
        # What a model can make predictions of: label and noise are in the pixels.
        self.pixel_values = torch.from_numpy(noise)
        self.segmentation = torch.from_numpy(np.where(missing(), -1, segmentation))
        self.depth = torch.from_numpy(np.where(missing(), 0.0, depth))
        self.normals = torch.from_numpy(np.where(missing()[:, None], 0.0, normals))
        self.segmentation[1::4] = -1
        self.depth[2::5] = 0
        self.normals[::3] = 0

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: getattr(self, name)[index] for name in ("pixel_values", *TASKS)}

    def labels(self) -> tuple[Tensor, ...]:
        return self.segmentation, self.depth, self.normals


class Model(nn.Module):
    """Fixed predictions from the pixels: logits `[B, C, H, W]`, depth `[B, H, W]`, normals `[B, 3, H, W]` (any length).
    Never class 4."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("mix", torch.randn(NUM_CLASSES, 3, generator=generator, dtype=torch.float64))

    def forward(
        self,
        pixel_values: Tensor,
        segmentation: Tensor | None = None,
        depth: Tensor | None = None,
        normals: Tensor | None = None,
    ) -> dict[str, Any]:
        logits = torch.einsum("ck,bkhw->bchw", self.mix, pixel_values) * self.scale
        logits = logits.index_fill(1, torch.tensor([NUM_CLASSES - 1]), -1e6)
        predictions = (logits, 4 + pixel_values[:, 0], 2 * pixel_values + 0.5)
        if segmentation is None:
            return {"logits": predictions}
        labels = {"segmentation": segmentation, "depth": depth, "normals": normals}
        losses, num_items = dense_task_losses(predictions, labels, TASKS)
        return {"losses": losses, "num_items": num_items, "logits": predictions}


#: Tasks with one class per image between pixel-wise ones, and their numbers of classes.
MIXED = ("scene", "segmentation", "depth", "room")
IMAGE_TASKS = {"room": 2, "scene": 4}


class MixedImages(Images):
    """The same without normals and with `image_labels [2]`, of scene and room: a third is missing, scene 3 is nowhere,
    and room has no label in the last of four batches."""

    def __init__(self, number: int, seed: int = 0) -> None:
        super().__init__(number, seed)
        generator = np.random.default_rng([seed, 1])
        classes = np.stack([generator.integers(0, 3, number), generator.integers(0, 2, number)], axis=1)
        missing = generator.random((number, 2)) < 1 / 3
        missing[3 * number // 4 :, 1] = True
        self.image_labels = torch.from_numpy(np.where(missing, -1, classes))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        names = ("pixel_values", "segmentation", "depth", "image_labels")
        return {name: getattr(self, name)[index] for name in names}

    def labels(self) -> tuple[Tensor, ...]:
        return self.segmentation, self.depth, self.image_labels


class MixedModel(Model):
    """`Model` without normals, and a class per image from its mean colour: logits `[B, 4]` and `[B, 2]`."""

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        segmentation: Tensor | None = None,
        depth: Tensor | None = None,
        image_labels: Tensor | None = None,
    ) -> dict[str, Any]:
        logits, metres, _ = super().forward(pixel_values)["logits"]
        means = pixel_values.mean(dim=(2, 3))
        scene, room = means @ self.mix[:4].T, means @ self.mix[3:].T
        predictions = (scene, logits, metres, room)
        if image_labels is None:
            return {"logits": predictions}
        labels = {"segmentation": segmentation, "depth": depth, "scene": image_labels[:, 0], "room": image_labels[:, 1]}
        losses, num_items = dense_task_losses(predictions, labels, MIXED, IMAGE_TASKS)
        return {"losses": losses, "num_items": num_items, "logits": predictions}


def predicted(images: Images) -> tuple[Tensor, ...]:
    if isinstance(images, MixedImages):
        with torch.no_grad():
            return MixedModel()(images.pixel_values)["logits"]
    with torch.no_grad():
        return Model()(images.pixel_values)["logits"]


def dense_metrics(**options: Any) -> DenseMetrics:
    given = {"delta_m_base": BASE, "batch_size": PUBLISHED_BATCH, **options}
    return DenseMetrics(TASKS, NUM_CLASSES, **given)


# --- the reference ------------------------------------------------------------------------------------------------


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def expected_metrics(predictions: Sequence[Tensor], labels: Sequence[Tensor], batch: int) -> dict[str, float]:
    """All figures but Delta_m, from lists of the pixels that have labels."""
    logits, depth, normals = (values.double().numpy() for values in predictions)
    classes, true_depth, true_normals = (values.numpy() for values in labels)
    found = {**_segmentation(logits.argmax(axis=1), classes)}
    groups = [slice(start, start + batch) for start in range(0, len(classes), batch)]
    for of_task, pairs in ((_depth, (depth, true_depth)), (_normals, (normals, true_normals))):
        found.update(of_task(*pairs))
        of_groups = [of_task(*(values[group] for values in pairs)) for group in groups]
        known = [figures for figures in of_groups if figures]
        found.update({f"{key}_batch_mean": np.mean([figures[key] for figures in known]) for key in known[0]})
    return found


def _segmentation(predicted_classes: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    pairs = [(t, p) for t, p in zip(classes.ravel(), predicted_classes.ravel(), strict=True) if t >= 0]
    shares = []
    for number in range(NUM_CLASSES):
        hits = sum(t == p == number for t, p in pairs)
        either = sum(number in (t, p) for t, p in pairs)
        if either:
            shares.append(hits / either)
    right = sum(t == p for t, p in pairs)
    return {"segmentation_miou": np.mean(shares), "segmentation_pixel_accuracy": right / len(pairs)}


def _depth(depth: np.ndarray, true: np.ndarray) -> dict[str, float]:
    there = true != 0
    if not there.any():
        return {}
    errors = np.abs(depth[there] - true[there])
    return {"depth_abs_error": errors.mean(), "depth_rel_error": (errors / true[there]).mean()}


def _normals(normals: np.ndarray, true: np.ndarray) -> dict[str, float]:
    there = (true != 0).any(axis=1)
    if not there.any():
        return {}
    cosines = (unit(normals) * true).sum(axis=1)[there]
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    within = {f"normals_within_{name}": (angles < limit).mean() for name, limit in _LIMITS.items()}
    return {"normals_mean_angle": angles.mean(), "normals_median_angle": np.median(angles), **within}


_LIMITS = {"11_25": 11.25, "22_5": 22.5, "30": 30}

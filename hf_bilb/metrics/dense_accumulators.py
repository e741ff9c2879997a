"""Metrics of one task, image by image and batch by batch: segmentation, depth, surface normals, classes of images.

Every accumulator works in two steps, so that the first can run where the predictions are and only its result travels:
`per_image` makes one row of statistics of each image, `add` takes rows. Two figures come of them: that of all pixels
of the set, and the one that the papers print, the mean over evaluation batches of the figure of a batch. Which pixels
have a label is what the losses take for it (`hf_bilb.losses.dense.known_pixels`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.errors import MetricError
from hf_bilb.losses.dense import known_pixels
from hf_bilb.metrics.base import Statistics, wide
from hf_bilb.metrics.classification import AccuracyAndF1

#: The papers' limits, in degrees.
ANGLE_LIMITS = (11.25, 22.5, 30.0)
#: Width of a cell of the histogram of angles, in degrees.
ANGLE_RESOLUTION = 1e-3
_CELLS = round(180 / ANGLE_RESOLUTION)
_INVALID_ANGLE = -1.0


def class_iou(confusion: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Intersection over union of each class.

    Args:
        confusion: `[C, C]`, or `[C, C + 1]` with a last column of predictions that are no class: pixels by true class
            (rows) and predicted class.

    Returns:
        `[C]` in [0, 1]; NaN for a class that is neither in the labels nor in the predictions.
    """
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=1) + confusion[:, : len(confusion)].sum(axis=0) - hits
    with np.errstate(invalid="ignore"):  # 0 / 0: NaN is the answer
        return np.asarray(hits / union)


def angles_between(predictions: Tensor, labels: Tensor) -> Tensor:
    """Angles between vectors, in degrees from 0 to 180, in float64.

    Only directions count: neither has to have length 1. It is atan2(|p x t|, p . t), exact where acos(p . t) of float32
    is not (it cannot tell angles below 0.02 degrees from 0).

    Args:
        predictions, labels: `[B, 3, ...]`.

    Returns:
        `[B, ...]`; 90 where a vector is zero, NaN where one is.
    """
    first, second = wide(predictions).unbind(dim=1), wide(labels).unbind(dim=1)
    cross = [first[(i + 1) % 3] * second[(i + 2) % 3] - first[(i + 2) % 3] * second[(i + 1) % 3] for i in range(3)]
    sine = (cross[0].square() + cross[1].square() + cross[2].square()).sqrt()
    cosine = first[0] * second[0] + first[1] * second[1] + first[2] * second[2]
    undirected = (sine == 0) & (cosine == 0)
    return torch.rad2deg(torch.atan2(sine, cosine)).masked_fill(undirected, 90.0)


class DenseAccumulator(Statistics):
    """Metrics of one task of images. Of two that are merged an unfinished batch counts as a batch.

    Attributes:
        metric_names: of what `compute` returns over all pixels.
        averaged: whether `compute` also returns the mean over batches, `<name>_batch_mean` for each.
    """

    averaged: ClassVar[bool]

    @abstractmethod
    def per_image(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Statistics of B images, a row each, on their device.

        Raises:
            MetricError: the shapes or types do not fit.
        """

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Take in rows of `per_image`, in the order of the set."""


class Segmentation(DenseAccumulator):
    """mIoU and pixel accuracy over all pixels, from a confusion matrix.

    mIoU is the mean over the classes that the labels or the predictions of the set hold. The papers' code divides 0 by
    0 for a class that neither holds, and gets NaN for the mean; with all classes there the two are the same. The papers
    accumulate these two figures over the set as well: there is no batch mean.

    `per_image(predictions, labels)` takes logits `[B, C, H, W]` (a pixel with a NaN among them counts as wrong) or
    classes `[B, H, W]`, and labels `[B, H, W]`, integers, below 0 where not labelled.

    State: C (C + 1) + 2 counts.
    """

    metric_names = ("miou", "pixel_accuracy")
    averaged: ClassVar[bool] = False
    _counts: Tensor

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.reset()

    def per_image(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """`[B, C (C + 1) + 2]`: by class and predicted class or none; labels that are none; pixels without a label."""
        num, columns = self.num_classes, self.num_classes + 1
        self._check(predictions, labels)
        labels = labels.long()
        classes = predictions
        if predictions.is_floating_point():
            best = predictions.max(dim=1)  # twice as fast as argmax on a CPU, and NaN wins
            classes = best.indices.masked_fill(best.values.isnan(), num)
        known = known_pixels("segmentation", labels)
        valid = known & (labels < num)
        predicted = torch.where((classes >= 0) & (classes < num), classes, num)
        elsewhere = num * columns + (~known).long()
        cells = torch.where(valid, labels * columns + predicted, elsewhere).flatten(start_dim=1)
        counts = torch.zeros(len(cells), num * columns + 2, dtype=torch.int64, device=cells.device)
        return counts.scatter_add_(1, cells, torch.ones_like(cells))

    def _check(self, predictions: Tensor, labels: Tensor) -> None:
        logits = predictions.is_floating_point()
        expected = f"[B, {self.num_classes}, H, W] logits" if logits else "[B, H, W] classes"
        shape = (*labels.shape[:1], self.num_classes, *labels.shape[1:]) if logits else tuple(labels.shape)
        if labels.ndim != 3 or predictions.shape != shape:
            raise MetricError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, expected {expected} and "
                "[B, H, W]"
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise MetricError(f"labels: got {labels.dtype}, expected integers, below 0 where not labelled")

    def add(self, rows: Tensor) -> None:
        self._counts = self._counts.to(rows.device) + rows.sum(dim=0)

    def compute(self) -> dict[str, float]:
        *cells, invalid, _ = self._counts.tolist()
        if invalid:
            raise MetricError(
                f"labels: {invalid} pixels are not valid, expected classes 0 to {self.num_classes - 1}, or below 0 "
                "where not labelled"
            )
        confusion = np.array(cells).reshape(self.num_classes, self.num_classes + 1)
        if not confusion.any():
            return {}
        accuracy = np.trace(confusion) / confusion.sum()
        return {"miou": float(np.nanmean(class_iou(confusion))), "pixel_accuracy": float(accuracy)}

    def reset(self) -> None:
        self._counts = torch.zeros(self.num_classes * (self.num_classes + 1) + 2, dtype=torch.int64)

    def merge(self, other: Segmentation) -> None:
        if other.num_classes != self.num_classes:
            raise MetricError(f"merge: got {other.num_classes} classes, expected {self.num_classes}")
        self.add(other._counts.unsqueeze(0))


class ImageClasses(DenseAccumulator):
    """Accuracy and macro-averaged F1 of a task with one class per image: those of `AccuracyAndF1`.

    F1 is the mean over the classes that the labels or the predictions of the set hold, as in scikit-learn.

    `per_image(predictions, labels)` takes logits `[B, C]` (an image with a NaN among them counts as wrong) and labels
    `[B]`, integers, below 0 where missing.

    State: C (C + 1) + 2 counts.
    """

    metric_names = ("accuracy", "macro_f1")
    averaged: ClassVar[bool] = False

    def __init__(self, num_classes: int) -> None:
        self._classes = AccuracyAndF1(num_classes, average="macro")

    def per_image(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """`[B, C + 1]`: the logits, and the label, NaN where missing."""
        num = self._classes.num_classes
        if labels.ndim != 1 or predictions.shape != (len(labels), num):
            raise MetricError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, expected [B, {num}] logits "
                "and [B]"
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise MetricError(f"labels: got {labels.dtype}, expected integers, below 0 where missing")
        logits = wide(predictions)
        known = labels.to(logits).masked_fill(labels < 0, torch.nan)
        return torch.cat([logits, known.unsqueeze(1)], dim=1)

    def add(self, rows: Tensor) -> None:
        self._classes.update(rows[:, :-1], rows[:, -1])

    def compute(self) -> dict[str, float]:
        found = self._classes.compute()
        return dict(zip(self.metric_names, found.values(), strict=True)) if found else {}

    def reset(self) -> None:
        self._classes.reset()

    def merge(self, other: ImageClasses) -> None:
        self._classes.merge(other._classes)


class Depth(DenseAccumulator):
    """Mean of |p - t| (absolute error, in the labels' unit) and of |p - t| / t (relative error) over measured pixels.

    `per_image(predictions, labels)` takes `[B, H, W]` or `[B, 1, H, W]` and `[B, H, W]`, 0 or NaN where not measured.
    A prediction that is NaN makes the figures NaN.

    State: four sums, and those of the batches.
    """

    metric_names = ("abs_error", "rel_error")
    averaged: ClassVar[bool] = True
    _sums: Tensor

    def __init__(self, batch_size: int = 1) -> None:
        self._batches = BatchMeans(batch_size, len(self.metric_names), self._of_batch)
        self.reset()

    def per_image(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """`[B, 4]`: sums of both errors, measured pixels, labels that are none."""
        if predictions.ndim == 4 and predictions.shape[1] == 1:
            predictions = predictions.squeeze(1)
        if labels.ndim != 3 or predictions.shape != labels.shape:
            raise MetricError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, expected [B, H, W] or "
                "[B, 1, H, W] and [B, H, W]"
            )
        predictions, labels = wide(predictions), wide(labels)
        known = known_pixels("depth", labels)
        there = known & (labels > 0) & labels.isfinite()
        errors = (predictions - labels).abs().where(there, 0.0)
        ratios = errors / labels.where(there, 1.0)
        invalid = known & ~there
        return torch.stack([values.sum(dim=(1, 2)).to(errors) for values in (errors, ratios, there, invalid)], dim=1)

    def _of_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        sums = rows.sum(dim=0)
        return sums[:2] / sums[2], sums[2] > 0

    def add(self, rows: Tensor) -> None:
        self._sums = self._sums.to(rows) + rows.sum(dim=0)
        self._batches.add(rows)

    def compute(self) -> dict[str, float]:
        means = self._batches.means().to(self._sums)
        absolute, relative, count, invalid, *of_batches = torch.cat([self._sums, means]).tolist()
        if invalid:
            raise MetricError(
                f"labels: {invalid:.0f} pixels are not valid, expected numbers above 0, or 0 where not measured"
            )
        exact = (absolute / count, relative / count) if count else ()
        return named(self.metric_names, exact, of_batches)

    def reset(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._batches.reset()

    def merge(self, other: Depth) -> None:
        self._sums = self._sums + other._sums.to(self._sums)
        self._batches.merge(other._batches)


class Normals(DenseAccumulator):
    """Mean and median angle in degrees between predicted and true directions, and shares below 11.25, 22.5, 30 degrees.

    The median of a batch is that of its angles, as numpy takes it (the mean of the two in the middle). Over all pixels
    it is read from a histogram with cells of 0.001 degrees: it is off by at most half a cell, 0.0005 degrees (the
    papers print hundredths), and 180,000 counts (1.4 MB) stand for the 72 million angles of NYUv2's test set (290 MB
    in float32).

    `per_image(predictions, labels)` takes `[B, 3, H, W]` each, a label of zeros or with a NaN where not known. Lengths
    do not count: a prediction of zeros is 90 degrees off, one with a NaN 180.
    The official code takes a normal whose components add up to 0 for unknown, too: next to none of float normals, 0.3 %
    of some that were stored as bytes.

    State: the histogram, six sums, and of fewer than `batch_size` images the angles.
    """

    metric_names = (
        "mean_angle", "median_angle", "within_11_25", "within_22_5", "within_30",
    )  # fmt: skip
    averaged: ClassVar[bool] = True
    _sums: Tensor
    _histogram: Tensor

    def __init__(self, batch_size: int = 1) -> None:
        self._batches = BatchMeans(batch_size, len(self.metric_names), self._of_batch)
        self.reset()

    def per_image(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """`[B, H W]`: the angles, NaN where not known, -1 for a label that is none."""
        if labels.ndim != 4 or labels.shape[1] != 3 or predictions.shape != labels.shape:
            raise MetricError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, expected both [B, 3, H, W]"
            )
        angles = angles_between(predictions, labels)
        angles = angles.nan_to_num(nan=180.0).masked_fill(labels.isinf().any(dim=1), _INVALID_ANGLE)
        return angles.where(known_pixels("normals", labels), torch.nan).flatten(start_dim=1)

    def _of_batch(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        count, _, *sums = _angle_sums(angles)
        # torch takes the lower of the two in the middle.
        median = (angles.nanmedian() - (-angles).nanmedian()) / 2
        mean, *within = (total / count for total in sums)
        return torch.stack([mean, median, *within]), count > 0

    def add(self, rows: Tensor) -> None:
        self._sums = self._sums.to(rows) + torch.stack(_angle_sums(rows))
        angles = rows.flatten()
        cells = (angles.nan_to_num(nan=0.0) / ANGLE_RESOLUTION).long().clamp(0, _CELLS - 1)
        self._histogram = self._histogram.to(rows.device).scatter_add(0, cells, (~angles.isnan()).long())
        self._batches.add(rows)

    def compute(self) -> dict[str, float]:
        means = self._batches.means().to(self._sums)
        count, invalid, *sums, m1, m2, m3, m4, m5 = torch.cat([self._sums, means]).tolist()
        if invalid:
            raise MetricError(
                f"labels: {invalid:.0f} pixels are not valid, expected finite vectors, zero where not known"
            )
        if not count:
            return {}
        mean, *within = (total / count for total in sums)
        exact = (mean, self._median(), *within)
        return named(self.metric_names, exact, (m1, m2, m3, m4, m5))

    def _median(self) -> float:
        counts = self._histogram.cpu().numpy().cumsum()
        middle = [(counts[-1] - 1) // 2, counts[-1] // 2]
        cells = np.searchsorted(counts, middle, side="right")
        return float((cells + 0.5).mean() * ANGLE_RESOLUTION)

    def reset(self) -> None:
        # Known pixels, labels that are none, sum of the angles, and how many are below each limit.
        self._sums = torch.zeros(3 + len(ANGLE_LIMITS), dtype=torch.float64)
        self._histogram = torch.zeros(_CELLS, dtype=torch.int64)
        self._batches.reset()

    def merge(self, other: Normals) -> None:
        self._sums = self._sums + other._sums.to(self._sums)
        self._histogram = self._histogram + other._histogram.to(self._histogram.device)
        self._batches.merge(other._batches)


def _angle_sums(angles: Tensor) -> list[Tensor]:
    known = ~angles.isnan()
    counts = [known.sum(), (angles == _INVALID_ANGLE).sum()]
    below = [(angles < limit).sum() for limit in ANGLE_LIMITS]  # NaN is not below
    return [*(count.to(angles) for count in counts), angles.nansum(), *(count.to(angles) for count in below)]


class BatchMeans:
    """Means of M figures over batches of `batch_size` images in the order of the set.

    The images may come in batches of any size: the means belong to a batch size that somebody has published, not to
    the memory or the number of devices of whoever measures. A last batch that is short counts as a batch, and a batch
    without a label as none.

    Args:
        batch_size: images of a batch.
        num_figures: M.
        figures: rows of one batch `[n, S]` -> figures `[M]` and whether it has a label, a bool `[]`.

    State: M + 1 numbers, and rows of fewer than `batch_size` images.
    """

    _sums: Tensor
    _waiting: list[Tensor]

    def __init__(self, batch_size: int, num_figures: int, figures: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.batch_size = batch_size
        self.num_figures = num_figures
        self._figures = figures
        self.reset()

    def add(self, rows: Tensor) -> None:
        """Take in rows `[B, S]`.

        Raises:
            MetricError: S is not that of the rows before (images of another size).
        """
        if self._waiting and self._waiting[0].shape[1] != rows.shape[1]:
            raise MetricError(
                f"images with {rows.shape[1]} pixels after images with {self._waiting[0].shape[1]}, expected one size"
            )
        rows = torch.cat([*self._waiting, rows]) if self._waiting else rows
        whole = len(rows) - len(rows) % self.batch_size
        for batch in rows[:whole].split(self.batch_size):
            self._sums = self._with(batch)
        # A copy: a view would keep the rows of all images.
        self._waiting = [rows[whole:].clone()] if whole < len(rows) else []

    def _with(self, batch: Tensor) -> Tensor:
        if not len(batch):
            return self._sums
        figures, there = self._figures(batch)
        figures = torch.cat([figures.where(there, 0.0), there.to(figures).unsqueeze(0)])
        return self._sums.to(figures) + figures

    def means(self) -> Tensor:
        """`[M]`, NaN before the first batch with a label."""
        sums = self._with(torch.cat(self._waiting)) if self._waiting else self._sums
        return sums[:-1] / sums[-1]

    def reset(self) -> None:
        """Forget everything."""
        self._sums = torch.zeros(self.num_figures + 1, dtype=torch.float64)
        self._waiting = []

    def merge(self, other: BatchMeans) -> None:
        """Add the batches of `other`; an unfinished one of either counts as a batch.

        Raises:
            MetricError: it has another batch size.
        """
        if other.batch_size != self.batch_size:
            raise MetricError(f"merge: got batches of {other.batch_size} images, expected {self.batch_size}")
        for rows in (*self._waiting, *other._waiting):
            self._sums = self._with(rows)
        self._sums = self._sums + other._sums.to(self._sums)
        self._waiting = []


def named(names: tuple[str, ...], exact: tuple[float, ...], of_batches: Any) -> dict[str, float]:
    """Both forms by name: `<name>` over all pixels and `<name>_batch_mean`; nothing where no pixel has a label."""
    if not exact:
        return {}
    averaged = {f"{name}_batch_mean": value for name, value in zip(names, of_batches, strict=True)}
    return {**dict(zip(names, exact, strict=True)), **averaged}

"""Labels of pixels that a table names: masks with class numbers, and arrays of numbers.

A label is a `.npy` array or an image file: of masks `[H, W]`, of arrays `[H, W]` or `[D, H, W]` (images with several
channels do, too). It has the height and width of its row's image, and is resized with it: each pixel gets the label in
which its centre lies, so that no class and no number is made up. All are read once, in threads, into memory-mapped
arrays.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import Arrays, Preparation, fingerprint, prepare_arrays, short_hash
from hf_bilb.data.dense.files import resize_nearest
from hf_bilb.data.images.files import ImageSource, decoding
from hf_bilb.errors import OptionError
from hf_bilb.losses.masked import MISSING_INTEGER

# Part of the name of the cache: raise it when what is cached changes.
CACHE_VERSION = 1
_CHUNK = 64  # labels that are read, and then written, together
_NPY = b"\x93NUMPY"


@dataclass(frozen=True)
class Frames:
    """The images of a source's N rows, and what they are resized to.

    Attributes:
        images: of all sources.
        rows: `[N]`, which of them each row has.
        size: height and width that labels are resized to, with the images.
        cache_root: folder of the cache.
    """

    images: ImageSource
    rows: NDArray[np.int64]
    size: int
    cache_root: Path


@dataclass(frozen=True)
class PixelLabels:
    """Labels of the pixels of N rows.

    Attributes:
        file: `.npy`, the M labels: classes `[M, H, W]` int16, -100 where missing, or numbers `[M, D, H, W]` float32,
            NaN where missing.
        rows: `[N]`, which of them each row has; -1: it has none.
        facts: `[M, ...]`, what the kind of label counts in each (`LabelKind.facts`).
    """

    file: Path
    rows: NDArray[np.int64]
    facts: NDArray[np.float64]

    def facts_of(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Those of the labels of some rows, without the rows that have none."""
        found = self.rows[rows]
        return self.facts[found[found >= 0]]

    def number(self) -> NDArray[np.int64]:
        """`[N]`, how many labelled pixels (of several channels: numbers) each row has."""
        of_label = self.facts.sum(axis=1) if self.facts.ndim == 2 else self.facts[:, :, 0].sum(axis=1)
        return np.where(self.rows < 0, 0, np.append(of_label, 0)[self.rows]).astype(np.int64)


# --- kinds of labels ----------------------------------------------------------------------------------------------


class LabelKind(ABC):
    """How the labels of a task are read. Two that are equal read the same: `repr` is a part of the cache's name."""

    @abstractmethod
    def read(self, data: bytes, where: str) -> NDArray[Any]:
        """A label as it is cached, `[..., H, W]` in its own size; raises `OptionError` that begins with `where`."""

    @abstractmethod
    def facts(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """What is counted in a label."""


@dataclass(frozen=True)
class Masks(LabelKind):
    """Class numbers. Facts: `[C]`, the pixels of each class.

    Attributes:
        num_classes: C.
        ignore_index: a number that means "not labelled"; None: there is none.
    """

    num_classes: int
    ignore_index: int | None

    def read(self, data: bytes, where: str) -> NDArray[np.int16]:
        values = decode_label(data, where)
        if values.ndim == 3 and len(values) == 1:
            values = values[0]
        if values.ndim != 2:
            raise OptionError(f"{where} has {len(values)} channels, expected class numbers in one")
        missing = np.zeros(values.shape, bool) if self.ignore_index is None else values == self.ignore_index
        wrong = ~missing & ~((values >= 0) & (values < self.num_classes) & (values == np.floor(values)))
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            also = "" if self.ignore_index is None else f", or {self.ignore_index} (not labelled)"
            raise OptionError(
                f"{where} has {values[row, column]:g} at pixel [{row}, {column}], expected a class from 0 to "
                f"{self.num_classes - 1}{also}"
            )
        classes = values.astype(np.int16)  # before: a byte has no -100
        classes[missing] = MISSING_INTEGER
        return classes

    def facts(self, values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(values[values >= 0], minlength=self.num_classes).astype(np.float64)


@dataclass(frozen=True)
class Numbers(LabelKind):
    """Numbers. Facts: `[D, 5]`, of each channel its numbers' count, mean, sum of squared deviations, least and largest.

    Attributes:
        channels: D.
        missing: a number that means "not measured", in addition to NaN; None: there is none.
    """

    channels: int
    missing: float | None

    def read(self, data: bytes, where: str) -> NDArray[np.float32]:
        values = decode_label(data, where)
        values = values[None] if values.ndim == 2 else values
        if len(values) != self.channels:
            raise OptionError(f"{where} has {len(values)} channels, expected {self.channels} as the first one")
        numbers = values.astype(np.float32)
        if self.missing is not None:
            numbers[values == self.missing] = np.nan
        if np.isinf(numbers).any():
            channel, row, column = np.argwhere(np.isinf(numbers))[0].tolist()
            raise OptionError(f"{where} is infinite at [{channel}, {row}, {column}], expected finite numbers or NaN")
        return numbers

    def facts(self, values: NDArray[Any]) -> NDArray[np.float64]:
        flat = values.reshape(len(values), -1).astype(np.float64)
        known = ~np.isnan(flat)
        count = known.sum(axis=1)
        mean = np.where(known, flat, 0).sum(axis=1) / np.maximum(count, 1)
        squares = np.square(np.where(known, flat - mean[:, None], 0)).sum(axis=1)
        least = np.where(known, flat, np.inf).min(axis=1)
        return np.stack([count, mean, squares, least, np.where(known, flat, -np.inf).max(axis=1)], axis=1)


def means_and_stds(facts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and (population) standard deviation `[D]` of all numbers, from the facts `[M, D, 5]` of `Numbers`; 1 for one
    that never varies."""
    counts, means, squares, least, largest = np.moveaxis(facts, -1, 0)
    total = counts.sum(axis=0)
    mean = (counts * means).sum(axis=0) / np.maximum(total, 1)
    deviations = squares.sum(axis=0) + (counts * np.square(means - mean)).sum(axis=0)
    stds = np.sqrt(deviations / np.maximum(total, 1))
    return mean, np.where(least.min(axis=0) < largest.max(axis=0), stds, 1.0)


def decode_label(data: bytes, where: str) -> NDArray[Any]:
    """`[H, W]` or `[D, H, W]` of a `.npy` file or an image (of one with a palette: the numbers of its colours).

    Raises:
        OptionError: it is neither; begins with `where`.
    """
    if data.startswith(_NPY):
        values = load_array(data, where)
    else:
        with decoding(data, where) as image:
            image.load()
            values = np.asarray(image)
        values = np.moveaxis(values, -1, 0) if values.ndim == 3 else values
    return values.astype(np.uint8) if values.dtype == bool else values


def load_array(data: bytes, where: str) -> NDArray[Any]:
    """The numbers `[.., ..]` or `[.., .., ..]` of a `.npy` file; raises `OptionError`, which begins with `where`."""
    try:
        values: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise OptionError(f"{where} cannot be read as an array: {' '.join(str(error).split())}") from None
    if values.ndim not in (2, 3) or values.dtype.kind not in "biuf":
        raise OptionError(
            f"{where} is {values.dtype} {list(values.shape)}, expected numbers [height, width] or [channels, height, "
            "width]"
        )
    return values


def check_same_size(values: NDArray[Any], size: tuple[int, int], where: str) -> None:
    """Raise `OptionError`, which begins with `where`, unless a label `[..., H, W]` has the size of its image."""
    if values.shape[-2:] != size:
        found, expected = (" x ".join(map(str, one)) for one in (values.shape[-2:], size))
        raise OptionError(f"{where} is {found} pixels (height x width), its image {expected}")


# --- reading all of them ------------------------------------------------------------------------------------------


def prepare_labels(
    labels: ImageSource, label_rows: NDArray[np.int64], frames: Frames, kind: LabelKind, name: str
) -> PixelLabels:
    """Read the labels of N rows, from the cache where they are in it.

    Args:
        labels: the different files.
        label_rows: `[N]`, which of them each row has, -1 for none; not of all rows.
        frames: the rows' images.
        kind: how they are read.
        name: of the task, for the progress bar.

    Raises:
        OptionError: a label that cannot be read, is none, or has another height and width than its image; names file,
            row and column. Or the cache cannot be written.

    Cost: of each label once 2 bytes a pixel (masks) or 4 D, twice that on the disk for a moment.
    """
    there = np.flatnonzero(label_rows >= 0)
    # A file that several images name is checked against each of them.
    pairs, of_row = np.unique(np.stack([label_rows[there], frames.rows[there]]), axis=1, return_inverse=True)
    rows = np.full(len(label_rows), -1)
    rows[there] = of_row.reshape(-1)
    sources = [(one.key, one.fingerprint(range(len(one)))) for one in (labels, frames.images)]
    size = frames.size
    preparation = Preparation(
        name=f"labels-v{CACHE_VERSION}-{size}px-{fingerprint([kind, sources, short_hash(str(pairs.tolist()))])}",
        chunks=lambda: [pairs[:, start : start + _CHUNK] for start in range(0, pairs.shape[1], _CHUNK)],
        compute=lambda chunk: _read_chunk(labels, frames, kind, chunk),
        size=lambda chunk: int(chunk.shape[1]),
        summarize=lambda arrays: {},
        description=f"labels of {name}",
        unit="labels",
    )
    arrays, _ = prepare_arrays(frames.cache_root, preparation, num_workers=1)  # threads do the work
    return PixelLabels(frames.cache_root / preparation.name / "values.npy", rows, np.asarray(arrays["facts"]))


def _read_chunk(labels: ImageSource, frames: Frames, kind: LabelKind, pairs: NDArray[np.int64]) -> Arrays:
    def read(pair: Sequence[int]) -> tuple[NDArray[Any], NDArray[np.float64]]:
        label, image = pair
        where = f"data: {labels.describe(label)}"
        values = kind.read(labels.read(label), where)
        with decoding(frames.images.read(image), f"data: {frames.images.describe(image)}") as opened:
            width, height = opened.size
        check_same_size(values, (height, width), where)
        resized = resize_nearest(values, (frames.size, frames.size))
        return resized, kind.facts(resized)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        values, facts = zip(*threads.map(read, pairs.T.tolist()), strict=True)
    return {"values": np.stack(values), "facts": np.stack(facts)}

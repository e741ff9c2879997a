"""Images and pixelwise labels of one part of a data set: read once, in parallel, into memory-mapped arrays.

A cached array holds all images of a part: `image [N, 3, H, W]` (uint8, or float32 in [0, 1] where the files have that),
`segmentation [N, H, W]` int8 (-1: not labelled), `depth [N, H, W]` float32 (0: not measured), `normals [N, 3, H, W]`
float32 (zero vector: not known). Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import Arrays, Preparation, fingerprint, list_files, prepare_arrays
from hf_bilb.data.checks import check_folder
from hf_bilb.errors import OptionError

# Part of the name of the cache: raise it when what is cached changes.
CACHE_VERSION = 1
_AT_ONCE = 8  # images in a chunk of work
IMAGE = "image"
# How a pixel without a label looks.
_MISSING = {"segmentation": -1, "depth": 0, "normals": 0}
#: Folder of a task's files in the MTAN layout.
MTAN_FOLDERS = {"segmentation": "label", "depth": "depth", "normals": "normal"}


@dataclass(frozen=True)
class Column:
    """The images of a part, or their labels of one task.

    Attributes:
        kind: `image` or a task.
        items: for each image what `read` takes; None where it has no such label.
        read: an item -> its array as it is cached, `[..., H, W]`; in another process, so it is pickled.
        fingerprint: changes when a file does.
    """

    kind: str
    items: tuple[Any, ...]
    read: Callable[[Any], NDArray[Any]]
    fingerprint: str


def prepare_column(
    root: Path, title: str, column: Column, size: tuple[int, int], num_workers: int | None = None
) -> Path:
    """The `.npy` file that holds the whole column; computed when it is not there yet (see `prepare_arrays`).

    Args:
        root: folder of the caches.
        title: of data set and part, `nyuv2-train`; begins the name of the cache.
        column: what to read.
        size: height and width that `column.read` gives.
        num_workers: processes; None: as many as there are cores.

    Raises:
        OptionError: a file that cannot be read or holds something else; names it.

    Cost of preparing: 8 images in the memory of each process; on the disk, twice the column for a moment (2 x 1.1 GB
    for 795 images of 288 x 384). 2 to 6 s for such a column on two cores with the files in the page cache.
    """

    def chunks() -> list[_Chunk]:
        starts = range(0, len(column.items), _AT_ONCE)
        return [_Chunk(column.kind, column.items[start : start + _AT_ONCE], column.read, size) for start in starts]

    preparation = Preparation(
        name=f"{title}-v{CACHE_VERSION}-{column.kind}-{size[0]}x{size[1]}-{column.fingerprint}",
        chunks=chunks,
        compute=_read_chunk,
        size=lambda chunk: len(chunk.items),
        summarize=lambda arrays: {},
        description=f"{title}: {column.kind}",
        unit="images",
    )
    prepare_arrays(root, preparation, num_workers)
    return root / preparation.name / "values.npy"


@dataclass(frozen=True)
class _Chunk:
    kind: str
    items: tuple[Any, ...]
    read: Callable[[Any], NDArray[Any]]
    size: tuple[int, int]


def _read_chunk(chunk: _Chunk) -> Arrays:
    read = [_blank(chunk.kind, chunk.size) if item is None else chunk.read(item) for item in chunk.items]
    return {"values": np.stack(read)}


def _blank(kind: str, size: tuple[int, int]) -> NDArray[Any]:
    shape = (3, *size) if kind == "normals" else size
    return np.full(shape, _MISSING[kind], np.int8 if kind == "segmentation" else np.float32)


def check_labels(task: str, folder: Path, ending: str, images: Collection[object], labels: Collection[object]) -> None:
    """Raise `OptionError` unless every image has a label; both are known by what their files' names begin with."""
    missing = [name for name in images if name not in labels]
    if missing:
        raise OptionError(
            f"{folder}: {len(missing)} of the {len(images)} images have no label of task {task}, first "
            f"{missing[0]}{ending}; data.allow_missing=true takes them without"
        )


# --- the MTAN layout ----------------------------------------------------------------------------------------------


def mtan_columns(
    folder: Path,
    label_folders: Mapping[str, str],
    num_classes: int,
    size: tuple[int, int] | None,
    allow_missing: bool,
) -> tuple[list[Column], tuple[int, int]]:
    """The columns of a part: `image/<i>.npy` [H, W, 3] in [0, 1] (or uint8), and a folder for each task.

    Args:
        folder: of the part.
        label_folders: task -> folder with `<i>.npy`: classes [H, W], depth [H, W] or [H, W, 1], normals [H, W, 3].
        num_classes: of the segmentation.
        size: to resize to; None: as the files are.
        allow_missing: an image may lack the file of a task, and then lacks its labels.

    Returns:
        The columns, images first, and their height and width.

    Raises:
        OptionError: a folder or a file that is missing or is no such array.
    """
    images = _numbered_files(folder / IMAGE)
    first = _load(folder / IMAGE / f"{next(iter(images))}.npy")
    if first.ndim != 3 or first.shape[2] != 3:
        raise OptionError(f"{folder / IMAGE}: {next(iter(images))}.npy has shape {first.shape}, expected [H, W, 3]")
    source = (int(first.shape[0]), int(first.shape[1]))
    size = source if size is None else size
    readers: dict[str, Callable[[Any], NDArray[Any]]] = {
        IMAGE: partial(_read_image, source=source, size=size, as_bytes=first.dtype == np.uint8),
        "segmentation": partial(_read_classes, source=source, size=size, num_classes=num_classes),
        "depth": partial(_read_depth, source=source, size=size),
        "normals": partial(_read_normals, source=source, size=size),
    }
    columns = [_mtan_column(IMAGE, folder / IMAGE, images, images, readers[IMAGE], num_classes)]
    for task, name in label_folders.items():
        labels = _numbered_files(folder / name)
        if not allow_missing:
            check_labels(task, folder / name, ".npy", images, labels)
        columns.append(_mtan_column(task, folder / name, images, labels, readers[task], num_classes))
    return columns, size


def _mtan_column(
    kind: str,
    folder: Path,
    images: Mapping[int, object],
    files: Mapping[int, object],
    read: Callable[[Any], NDArray[Any]],
    num_classes: int,
) -> Column:
    items = tuple(folder / f"{number}.npy" if number in files else None for number in images)
    facts = [(number, files.get(number)) for number in images]
    checked = num_classes if kind == "segmentation" else 0  # labels have been checked against it
    return Column(kind, items, read, fingerprint([str(folder), checked, *facts]))


def _numbered_files(folder: Path) -> dict[int, tuple[int, int]]:
    """Number -> size and time of change of `<number>.npy`, in order."""
    check_folder(folder, "0.npy, 1.npy, ...")
    found = {}
    for name, facts in list_files(folder).items():
        stem, _, ending = name.rpartition(".")
        if ending != "npy" or name.startswith("."):
            continue
        if not stem.isdecimal():
            raise OptionError(f"{folder / name}: is not named by a number, expected 0.npy, 1.npy, ...")
        found[int(stem)] = facts
    if not found:
        raise OptionError(f"data.folder: {str(folder)!r} holds no .npy file, expected 0.npy, 1.npy, ...")
    return dict(sorted(found.items()))


def _load(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OptionError(f"{path}: cannot be read as an array: {reason}") from None


def _checked(path: Path, source: tuple[int, int], channels: int) -> NDArray[Any]:
    """The array, which has to be `[H, W]` (or `[H, W, 1]`) or `[H, W, 3]` with the size of the images."""
    found = _load(path)
    flat = channels == 1 and found.ndim == 3 and found.shape[2] == 1
    values = found[:, :, 0] if flat else found
    expected = source if channels == 1 else (*source, channels)
    if values.shape != expected or values.dtype.kind not in "fiu":
        raise OptionError(f"{path}: {found.dtype} {list(found.shape)}, expected numbers {list(expected)}")
    return values


def _read_image(path: Path, source: tuple[int, int], size: tuple[int, int], as_bytes: bool) -> NDArray[Any]:
    values = _checked(path, source, 3)
    if (values.dtype == np.uint8) != as_bytes or (values.dtype.kind in "iu" and not as_bytes):
        raise OptionError(f"{path}: {values.dtype}, expected {'uint8' if as_bytes else 'floats'}, as the first image")
    return resize_image(np.moveaxis(checked_image(values, str(path)), -1, 0), size)


def checked_image(values: NDArray[Any], where: str) -> NDArray[Any]:
    """The array, which has to be `[H, W, 3]` of uint8, or of floats from 0 to 1; `where` begins the message."""
    if values.ndim != 3 or values.shape[2] != 3 or not values.size:
        raise OptionError(f"{where}: {list(values.shape)}, expected [height, width, 3]")
    # A resampled image may overshoot a little; NaN fails, too.
    if values.dtype != np.uint8 and not (values.dtype.kind == "f" and values.min() >= -0.5 and values.max() <= 1.5):
        raise OptionError(f"{where}: values from {values.min():g} to {values.max():g}, expected 0 to 1 (or uint8)")
    return values


def _read_classes(path: Path, source: tuple[int, int], size: tuple[int, int], num_classes: int) -> NDArray[np.int8]:
    values = _checked(path, source, 1)
    wrong = ~((values >= -1) & (values < num_classes) & (values == np.floor(values)))
    if wrong.any():
        raise OptionError(
            f"{path}: {values[wrong][0]:g} is no class of task segmentation, expected 0 to {num_classes - 1}, or -1 "
            "(not labelled)"
        )
    return resize_nearest(values.astype(np.int8), size)


def _read_depth(path: Path, source: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float32]:
    return resize_nearest(measured(_checked(path, source, 1)), size)


def _read_normals(path: Path, source: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float32]:
    return resize_nearest(checked_normals(np.moveaxis(_checked(path, source, 3), -1, 0), str(path)), size)


def checked_normals(values: NDArray[Any], where: str) -> NDArray[np.float32]:
    """Normals `[3, H, W]` as float32, zeros where one is not finite; `where` begins the message."""
    values = values.astype(np.float32)
    values[:, ~np.isfinite(values).all(axis=0)] = 0
    longest = float(np.sqrt(np.square(values).sum(axis=0)).max())
    if longest > 1.1:
        raise OptionError(f"{where}: a vector of length {longest:g}, expected unit vectors or zeros as normals")
    return values


def measured(depth: NDArray[Any]) -> NDArray[np.float32]:
    """Depths as float32, 0 where one is not finite or not above 0, which is no measurement."""
    values = depth.astype(np.float32)
    return np.where(np.isfinite(values) & (values > 0), values, np.float32(0))


# --- sizes --------------------------------------------------------------------------------------------------------


def resize_nearest(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """`[..., h, w]` -> `[..., H, W]`, each pixel that in which its centre lies."""
    if values.shape[-2:] == size:
        return np.ascontiguousarray(values)
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(values.shape[-2:], size, strict=True)
    )
    return np.ascontiguousarray(values[..., rows[:, None], columns])


def resize_image(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """`[3, h, w]`, uint8 or floats -> `[3, H, W]`, uint8 (rounded) or float32: bilinear with antialiasing, as Pillow's
    and torch's."""
    as_bytes = values.dtype == np.uint8
    if values.shape[-2:] == size:
        return np.ascontiguousarray(values, dtype=np.uint8 if as_bytes else np.float32)
    # numpy, not torch, whose threads do not survive the fork into a worker.
    rows, columns = (_triangles(old, new) for old, new in zip(values.shape[-2:], size, strict=True))
    resized = rows @ (values.astype(np.float32) @ columns.T)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8) if as_bytes else resized


def _triangles(old: int, new: int) -> NDArray[np.float32]:
    """`[new, old]`, what each old pixel has in each new one."""
    step = old / new
    distance = np.abs(np.arange(old) + 0.5 - (np.arange(new)[:, None] + 0.5) * step)
    weights = np.maximum(1 - distance / max(step, 1), 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

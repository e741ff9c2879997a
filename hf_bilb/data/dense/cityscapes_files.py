"""Cityscapes' official files: PNG files in folders, or in the archives they come in."""

from __future__ import annotations

import functools
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import fingerprint
from hf_bilb.data.dense.files import IMAGE, Column, check_labels, resize_image, resize_nearest
from hf_bilb.errors import MissingPackageError, OptionError

IMAGES = "leftImg8bit"
# Kind -> top folder, ending of its files.
_FILES = {
    IMAGE: (IMAGES, "leftImg8bit.png"),
    "segmentation": ("gtFine", "gtFine_labelIds.png"),
    "depth": ("disparity", "disparity.png"),
}
# Label ids of the 19 classes of the official evaluation, in its order, and the groups that these classes belong to.
_IDS_19 = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_GROUPS_7 = (0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 6, 6, 6)


def class_table(num_classes: int) -> NDArray[np.int8]:
    """`[256]`: label id, as in `*_labelIds.png` -> class of the 19 or of the 7, -1 for ids that are not evaluated."""
    table = np.full(256, -1, np.int8)
    table[list(_IDS_19)] = range(19) if num_classes == 19 else _GROUPS_7
    return table


def is_official(folder: Path) -> bool:
    """Whether the folder has the official images, unpacked or not."""
    return (folder / IMAGES).is_dir() or (folder / f"{IMAGES}_trainvaltest.zip").is_file()


def official_columns(
    folder: Path,
    part: str,
    tasks: Sequence[str],
    num_classes: int,
    size: tuple[int, int],
    depth_scale: float,
    allow_missing: bool,
) -> list[Column]:
    """The columns of a part (`train`, `val`), images first, in the order of the images' names.

    Raises:
        OptionError: what is missing, with its name.
        MissingPackageError: Pillow is not installed.
    """
    _pillow()
    readers: dict[str, Callable[[Any], NDArray[Any]]] = {
        IMAGE: partial(_read_image, size=size),
        "segmentation": partial(_read_classes, size=size, table=class_table(num_classes)),
        "depth": partial(_read_disparity, size=size, scale=depth_scale),
    }
    images = _list(folder, IMAGE, part)
    columns = []
    for kind in (IMAGE, *tasks):
        files = images if kind == IMAGE else _list(folder, kind, part)
        if not allow_missing:
            top, ending = _FILES[kind]
            check_labels(kind, folder / top / part, f"_{ending}", images, files)
        found = [files.get(name) for name in images]
        items = tuple(None if item is None else item[:2] for item in found)
        key = fingerprint([found, num_classes if kind == "segmentation" else 0, depth_scale if kind == "depth" else 0])
        columns.append(Column(kind, items, readers[kind], key))
    return columns


# Archive, or "" for a file in a folder; path; what changes with the file.
_Item = tuple[str, str, tuple[int, ...]]


def _list(folder: Path, kind: str, part: str) -> dict[str, _Item]:
    """`<city>_<sequence>_<frame>` -> file, in the order of the names."""
    top, ending = _FILES[kind]
    archive = folder / f"{top}_trainvaltest.zip"
    if (folder / top / part).is_dir():
        paths = sorted((folder / top / part).glob(f"*/*_{ending}"))
        facts = [path.stat() for path in paths]
        found = [("", str(path), (fact.st_size, fact.st_mtime_ns)) for path, fact in zip(paths, facts, strict=True)]
    elif archive.is_file():
        fact, members = archive.stat(), _archive(str(archive), os.getpid()).namelist()
        chosen = sorted(name for name in members if name.startswith(f"{top}/{part}/") and name.endswith(f"_{ending}"))
        found = [(str(archive), name, (fact.st_size, fact.st_mtime_ns)) for name in chosen]
    else:
        raise OptionError(f"data.folder: {str(folder)!r} has neither {top}/{part} nor {archive.name}")
    if not found:
        raise OptionError(f"data.folder: {str(folder)!r} holds no {top}/{part}/<city>/*_{ending}")
    return {Path(item[1]).name.removesuffix(f"_{ending}"): item for item in found}


@functools.lru_cache(maxsize=8)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    # One for each process: those that are forked would move one common place in the file.
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise OptionError(f"{path}: cannot be read as an archive: {error}") from None


# --- files --------------------------------------------------------------------------------------------------------


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackageError("data.name: cityscapes needs Pillow: pip install hf-bilb[vision]") from None
    return Image


def _where(item: tuple[str, str]) -> str:
    archive, path = item
    return f"{archive}: {path}" if archive else path


def _decode(item: tuple[str, str]) -> Any:
    archive, path = item
    try:
        data = _archive(archive, os.getpid()).read(path) if archive else Path(path).read_bytes()
        with _pillow().open(io.BytesIO(data)) as image:
            image.load()
            return image
    # UnidentifiedImageError is an OSError; zlib's error is nothing but an Exception.
    except (OSError, SyntaxError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "is no image" if "cannot identify" in str(error) else " ".join(str(error).split())
        raise OptionError(f"{_where(item)}: cannot be read: {reason}") from None


def _read_image(item: tuple[str, str], size: tuple[int, int]) -> NDArray[np.uint8]:
    pixels = np.asarray(_decode(item).convert("RGB"))
    return resize_image(np.moveaxis(pixels, -1, 0), size)


def _read_classes(item: tuple[str, str], size: tuple[int, int], table: NDArray[np.int8]) -> NDArray[np.int8]:
    ids = np.asarray(_decode(item))
    if ids.ndim != 2 or ids.dtype != np.uint8:
        raise OptionError(f"{_where(item)}: {ids.dtype} {list(ids.shape)}, expected label ids of 8 bits")
    return table[resize_nearest(ids, size)]


def _read_disparity(item: tuple[str, str], size: tuple[int, int], scale: float) -> NDArray[np.float32]:
    coded = np.asarray(_decode(item))
    if coded.ndim != 2 or coded.dtype.kind not in "iu" or coded.dtype.itemsize < 2:
        raise OptionError(f"{_where(item)}: {coded.dtype} {list(coded.shape)}, expected disparities of 16 bits")
    values = resize_nearest(coded, size).astype(np.float64)
    # A disparity of 0 (p = 1) is as good as none: such a point is infinitely far away.
    return np.where(values > 1, (values - 1) / 256 * scale, 0).astype(np.float32)

"""Images for K tasks: decoded once, in parallel, into a memory-mapped cache, and served a batch at a time.

A batch has the columns `pixel_values [B, 3, H, W]` (float32 in [0, 1], RGB) and `labels [B, K]` (float32, NaN where
missing).
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.rows import BatchedRows
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# Part of the name of the cache: raise it when what is cached changes.
CACHE_VERSION = 1
CHUNK = 512  # images that are decoded, and then written, together
_AT_ONCE = 32  # of them that one thread decodes in one go


# --- where images come from ---------------------------------------------------------------------------------------


class ImageSource(Protocol):
    """N encoded images.

    Attributes:
        key: names the cache: changes with the list of images, not with what is in them.
    """

    @property
    def key(self) -> str: ...

    def __len__(self) -> int: ...

    def fingerprint(self, rows: range) -> str:
        """Changes when one of these images does."""

    def read(self, row: int) -> bytes:
        """An encoded image; raises `OptionError` when it cannot be read."""

    def describe(self, row: int) -> str:
        """Where it is, for messages."""


class ImageFiles:
    """Images as files of one folder; a file whose size or time of change differs is another image.

    Args:
        folder: it.
        names: of the N files; all are there (`list_files`).
        files: what `list_files` said.
    """

    def __init__(self, folder: Path, names: Sequence[str], files: Mapping[str, tuple[int, int]]) -> None:
        self.folder = folder
        self.names = list(names)
        self._files = files
        self.key = short_hash("\n".join(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self, rows: range) -> str:
        """From names, sizes and times of change."""
        return short_hash("\n".join(f"{name} {self._files[name]}" for name in self.names[rows.start : rows.stop]))

    def read(self, row: int) -> bytes:
        """The file's bytes."""
        try:
            return (self.folder / self.names[row]).read_bytes()
        except OSError as error:
            raise OptionError(f"{self.describe(row)}: cannot be read: {error.strerror}") from None

    def describe(self, row: int) -> str:
        """The file's path."""
        return str(self.folder / self.names[row])


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> size in bytes and time of change in nanoseconds, of the files of a folder; 200,000 in about a second."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                facts = entry.stat()
                found[entry.name] = (facts.st_size, facts.st_mtime_ns)
    return found


class TableImages:
    """The image column of the parts of a set in `datasets`; another fingerprint of a part is another list of images.

    Args:
        tables: part's name -> its table; the rows are numbered through all parts.
        column: of type `datasets.Image`.
        name: of the set, for messages.
    """

    def __init__(self, tables: Mapping[str, datasets.Dataset], column: str, name: str) -> None:
        import datasets

        images = [table.select_columns([column]) for table in tables.values()]
        self.table = datasets.concatenate_datasets(images).cast_column(column, datasets.Image(decode=False))
        self.column = column
        self.name = name
        self.key = short_hash(" ".join([column, *(table._fingerprint for table in tables.values())]))
        self._places = [(part, row) for part, table in tables.items() for row in range(len(table))]

    def __len__(self) -> int:
        return len(self.table)

    def fingerprint(self, rows: range) -> str:
        """The key says it already."""
        return self.key

    def read(self, row: int) -> bytes:
        """The bytes in the table, or those of the file that it names."""
        image = self.table[row][self.column]
        if image is None:
            raise OptionError(f"{self.describe(row)}: has no image")
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        try:
            return Path(image["path"]).read_bytes()
        except OSError as error:
            raise OptionError(f"{self.describe(row)}: {image['path']} cannot be read: {error.strerror}") from None

    def describe(self, row: int) -> str:
        """Set, part, and the row of the part, from 0."""
        part, place = self._places[row]
        return f"{self.name}, {part}, row {place}"


def short_hash(text: str) -> str:
    """16 hexadecimal digits that change with the text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# --- the cache ----------------------------------------------------------------------------------------------------


def prepare_images(source: ImageSource, image_size: int, cache_dir: str | None = None) -> Path:
    """All images as uint8 `[N, 3, image_size, image_size]` in one `.npy` file, for `np.load(..., mmap_mode="r")`.

    The whole frame of each image is resized (bilinear with antialiasing, as `torchvision.transforms.Resize` does to
    images of Pillow). The first call decodes, in threads and with a progress bar; later ones look at the files' sizes
    and times of change, and decode chunks of 512 again in which one differs.

    It is written aside and renamed, chunk by chunk on record: a call that was interrupted goes on where it stood, and
    leaves no file that looks complete. Of several processes one writes, the others wait for it.

    Args:
        source: the images.
        image_size: height and width in the cache.
        cache_dir: folder of the cache; None is `hf_bilb` in that of `datasets`.

    Raises:
        OptionError: an image that cannot be read or decoded (names it), or a cache that cannot be written.

    Cost: N * 3 * image_size^2 bytes of disk (2.5 GB for the whole CelebA at 64). About 2,500 images of 178 x 218 a
    second and core.
    """
    from filelock import FileLock

    cache = _Cache(source, image_size, _cache_root(cache_dir))
    if cache.is_complete():
        return cache.file
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.folder / "lock"):
            if not cache.is_complete():  # another process may have written it meanwhile
                cache.fill()
    except OSError as error:
        raise OptionError(f"data.cache_dir: {str(cache.folder)!r} cannot be written: {error.strerror}") from None
    return cache.file


def _cache_root(cache_dir: str | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_bilb"


class _Cache:
    """A folder with `images.npy` (`images.npy.part` until it is complete) and `finished.txt`, the chunks on record."""

    def __init__(self, source: ImageSource, image_size: int, root: Path) -> None:
        self.source = source
        self.image_size = image_size
        self.folder = root / f"images-v{CACHE_VERSION}-{image_size}px-{source.key}"
        self.file = self.folder / "images.npy"
        self._part = self.folder / "images.npy.part"
        self._record = self.folder / "finished.txt"
        starts = range(0, len(source), CHUNK)
        self._chunks = [range(start, min(start + CHUNK, len(source))) for start in starts]
        self._fingerprints = [source.fingerprint(rows) for rows in self._chunks]

    def is_complete(self) -> bool:
        return self.file.is_file() and not self._unfinished()

    def _unfinished(self) -> list[int]:
        """Numbers of the chunks that are not on record as they are now."""
        lines = self._record.read_text(encoding="ascii").splitlines() if self._record.is_file() else []
        # Later lines are newer. A line that was cut off has no fingerprint of ours.
        finished = dict(words for words in (line.split() for line in lines) if len(words) == 2)
        return [number for number, now in enumerate(self._fingerprints) if finished.get(str(number)) != now]

    def fill(self) -> None:
        """Decode what is missing; the caller holds the lock."""
        from tqdm.auto import tqdm

        offset = self._open_part()
        unfinished = self._unfinished()
        images = sum(len(self._chunks[number]) for number in unfinished)
        bytes_per_image = 3 * self.image_size**2
        logger.info("%s: decoding %d of %d images", self.folder, images, len(self.source))
        # Written, not mapped: on a full disk a write says so, and a mapped page kills the process.
        with (
            ThreadPoolExecutor(os.cpu_count()) as threads,  # Pillow decodes and resizes without the interpreter's lock
            open(self._part, "r+b") as pixels,
            open(self._record, "a", encoding="ascii") as record,
            tqdm(total=images, desc="decoding images", unit="image", leave=False) as bar,
        ):
            for number in unfinished:
                rows = self._chunks[number]
                shares = [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]
                decoded = list(threads.map(partial(_read_and_decode, self.source, self.image_size), shares))
                pixels.seek(offset + rows.start * bytes_per_image)
                pixels.write(np.concatenate(decoded).tobytes())
                pixels.flush()
                os.fsync(pixels.fileno())  # on the disk before it is on record
                record.write(f"{number} {self._fingerprints[number]}\n")
                record.flush()
                bar.update(len(rows))
        os.replace(self._part, self.file)

    def _open_part(self) -> int:
        """See to it that the file aside is there; returns where its pixels begin, in bytes."""
        if self.file.is_file():  # complete, but some images are others now
            os.replace(self.file, self._part)
        if not self._part.is_file():
            self._record.unlink(missing_ok=True)
            fresh = self.folder / "images.npy.new"
            shape = (len(self.source), 3, self.image_size, self.image_size)
            np.lib.format.open_memmap(fresh, mode="w+", dtype=np.uint8, shape=shape).flush()
            os.replace(fresh, self._part)
        return int(np.load(self._part, mmap_mode="r").offset)


def _read_and_decode(source: ImageSource, image_size: int, rows: range) -> NDArray[np.uint8]:
    return np.stack([decode(source.read(row), image_size, source.describe(row)) for row in rows])


def decode(data: bytes, image_size: int, where: str) -> NDArray[np.uint8]:
    """An encoded image (JPEG, PNG, ...) as RGB `[3, image_size, image_size]`.

    Raises:
        OptionError: it does not decode; begins with `where`.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            rgb = image.convert("RGB")
    except UnidentifiedImageError:  # its text names an object in memory
        raise OptionError(f"{where}: does not decode: {len(data)} bytes that are no image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OptionError(f"{where}: does not decode: {' '.join(str(error).split())}") from None
    if rgb.size != (image_size, image_size):
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)


# --- rows and batches ---------------------------------------------------------------------------------------------


class ImageRows(BatchedRows):
    """A map-style data set of images in a memory-mapped file, and their labels in memory.

    `rows[i]` is a dict of `pixel_values [3, H, W]` and `labels [K]`. A DataLoader asks for a batch at once
    (`__getitems__`): one copy out of the mapped file. Use `collate_images` with it. What it costs to pickle
    (workers that are spawned) are the labels: the file is opened again.

    Args:
        file: `.npy`, uint8 `[M, 3, H, W]`.
        rows: `[N]`, which of the M images, in the order of this set.
        labels: `[N, K]` float32.

    Raises:
        ValueError: when rows and labels differ in length.
    """

    def __init__(self, file: Path, rows: NDArray[np.int64], labels: NDArray[np.float32]) -> None:
        if len(rows) != len(labels):
            raise ValueError(f"{len(rows)} rows, {len(labels)} labels")
        self.file = file
        self.rows = rows
        self.labels = labels
        self._images = np.load(file, mmap_mode="r")

    def __reduce__(self) -> tuple[type[ImageRows], tuple[Path, NDArray[np.int64], NDArray[np.float32]]]:
        return ImageRows, (self.file, self.rows, self.labels)

    def _batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = np.asarray(indices)
        pixels = torch.from_numpy(self._images[self.rows[chosen]])
        return {"pixel_values": pixels.float().div_(255), "labels": torch.from_numpy(self.labels[chosen])}


def collate_images(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join rows (`[3, H, W]`, `[K]`) and batches of rows (`[B, 3, H, W]`, `[B, K]`), in any mixture, to one batch."""
    batches = [
        row if row["pixel_values"].dim() == 4 else {name: value[None] for name, value in row.items()} for row in rows
    ]
    if len(batches) == 1:
        return dict(batches[0])
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

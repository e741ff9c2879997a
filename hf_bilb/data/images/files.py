"""Where images come from, and how they are decoded once, in parallel, into a memory-mapped cache."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import RowPreparation, cache_root, prepare_rows, short_hash
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import datasets
    from PIL import Image

logger = logging.getLogger(__name__)

# Part of the name of the cache: raise it when what is cached changes.
CACHE_VERSION = 2
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


# --- the cache ----------------------------------------------------------------------------------------------------


def prepare_images(source: ImageSource, image_size: int, cache_dir: str | None = None) -> Path:
    """All images as uint8 `[N, 3, image_size, image_size]` in one `.npy` file, for `np.load(..., mmap_mode="r")`.

    The whole frame of each image is resized (bilinear with antialiasing, as `torchvision.transforms.Resize` does to
    images of Pillow). The first call decodes, in threads and with a progress bar; later ones look at the files' sizes
    and times of change, and decode chunks of 512 again in which one differs (see `prepare_rows`).

    Args:
        source: the images.
        image_size: height and width in the cache.
        cache_dir: folder of the cache; None is `default_root`.

    Raises:
        OptionError: an image that cannot be read or decoded (names it), or a cache that cannot be written.

    Cost: N * 3 * image_size^2 bytes of disk (2.5 GB for the whole CelebA at 64). About 2,500 images of 178 x 218 a
    second and core.
    """
    name = f"images-v{CACHE_VERSION}-{image_size}px-{source.key}"
    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes and resizes without the interpreter's lock

        def decoded(rows: range) -> NDArray[np.uint8]:
            shares = [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]
            return np.concatenate(list(threads.map(partial(_read_and_decode, source, image_size), shares)))

        preparation = RowPreparation(
            name=name,
            array="images",
            row_shape=(3, image_size, image_size),
            chunks=chunks,
            fingerprints=[source.fingerprint(rows) for rows in chunks],
            compute=decoded,
            description="decoding images",
            unit="image",
        )
        return prepare_rows(_root(name, cache_dir), preparation)


def _root(name: str, cache_dir: str | None) -> Path:
    # The default was in the folder of `datasets` once: a cache that lies there is used on.
    if cache_dir is None:
        import datasets

        former = Path(datasets.config.HF_DATASETS_CACHE) / "hf_bilb"
        if (former / name).is_dir():
            return former
    return cache_root(cache_dir)


def _read_and_decode(source: ImageSource, image_size: int, rows: range) -> NDArray[np.uint8]:
    return np.stack([decode(source.read(row), image_size, source.describe(row)) for row in rows])


def decode(data: bytes, image_size: int, where: str) -> NDArray[np.uint8]:
    """An encoded image (JPEG, PNG, ...) as RGB `[3, image_size, image_size]`.

    Grey values of 16 bits and of floats (0 to 1) are scaled to 8 bits.

    Raises:
        OptionError: it does not decode, or has grey values of another range; begins with `where`.
    """
    with decoding(data, where) as image:
        return resized(image, image_size, where)


def _in_8_bits(image: Image.Image, where: str) -> Image.Image:
    """Grey values of 16 bits or floats, which Pillow would clip to 0 to 255."""
    from PIL import Image

    values = np.asarray(image)
    white = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= white):  # NaN, too
        expected = "floats from 0 to 1" if image.mode == "F" else "16 bits"
        raise OptionError(f"{where}: has grey values from {values.min():g} to {values.max():g}, expected {expected}")
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


@contextlib.contextmanager
def decoding(data: bytes, where: str) -> Iterator[Image.Image]:
    """An encoded image, opened; what Pillow raises becomes an `OptionError` that begins with `where`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError:  # its text names an object in memory
        raise OptionError(f"{where}: does not decode: {len(data)} bytes that are no image") from None
    except OptionError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _not_decoded(where, error) from None


def resized(image: Image.Image, image_size: int, where: str) -> NDArray[np.uint8]:
    """An image of Pillow as RGB `[3, image_size, image_size]`; raises as `decode`."""
    from PIL import Image

    rgb = as_rgb(image, where)
    if rgb.size != (image_size, image_size):
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)


def as_rgb(image: Image.Image, where: str) -> Image.Image:
    """An image of Pillow in RGB; raises as `decode`."""
    try:
        return (_in_8_bits(image, where) if image.mode[0] in "IF" else image).convert("RGB")
    except OptionError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes when it is asked for pixels
        raise _not_decoded(where, error) from None


def _not_decoded(where: str, error: Exception) -> OptionError:
    return OptionError(f"{where}: does not decode: {' '.join(str(error).split())}")

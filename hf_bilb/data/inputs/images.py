"""Images that a user hands over: read and resized when a batch asks for them, as the cache of training has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.data.images.files import ImageSource, decoding, resized
from hf_bilb.data.inputs.encoded import Encoded, Wanted
from hf_bilb.data.inputs.given import INPUTS, as_table, check_column, is_file
from hf_bilb.data.inputs.kinds import ImageInputs
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.images import files_of
from hf_bilb.data.own.pixels import load_array
from hf_bilb.data.rows import BatchedRows, collate_images
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import LABELS

if TYPE_CHECKING:
    from PIL import Image


#: Endings of the files that are images, in a folder of them; `.npy` holds an array [height, width, 3].
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp")
_NPY = b"\x93NUMPY"


@dataclass(frozen=True)
class ImageRows:
    """Where the images of N rows are.

    Attributes:
        source: the images.
        places: `[N]`, which of them each row has.
        table: that names or holds them; None: they were handed over without one.
    """

    source: ImageSource
    places: NDArray[np.int64]
    table: Table | None = None


def encode_images(kind: ImageInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """Rows with `pixel_values`, decoded when they are asked for; see `ENCODERS`."""
    rows = find_rows(kind.column, inputs, wanted)
    labels = None if rows.table is None else wanted.labels(rows.table)
    values = None if labels is None else labels.values
    return Encoded(LazyImages(rows.source, rows.places, kind.image_size, values), collate_images)


def find_rows(column: str, inputs: Any, wanted: Wanted) -> ImageRows:
    """The images of what a user hands over.

    Args:
        column: of a table.
        inputs: as of `as_table`; or a list of images, `[N, H, W, 3]`, an image file, or a folder of such files.
        wanted: with labels, there has to be a table.

    Raises:
        OptionError: a column that is missing, an image that is none; in one line with file, row and column.
    """
    if is_file(inputs) and (files := image_files(Path(inputs).expanduser())) is not None:
        if wanted.places:
            raise OptionError(f"{inputs}: has no labels, expected a table with a column {column!r} and those of labels")
        return ImageRows(GivenImages(files), np.arange(len(files)))
    values = _in_memory(column, inputs)
    if values is not None and not wanted.places:
        if not values:
            raise OptionError(f"{INPUTS}: there are no rows")
        return ImageRows(GivenImages(values), np.arange(len(values)))
    table = as_table(inputs, wanted.csv, (column,))
    check_column(column, table.features, table.name)
    return ImageRows(*files_of([(table, column)], "image", required=True), table)


def image_files(path: Path) -> list[Path] | None:
    """The image files in a folder, by their names, or the one that `path` is; None: it is a table.

    Raises:
        OptionError: a folder that holds no image, and was not saved by `datasets` either.
    """
    if path.is_file():
        return [path] if path.suffix.lower() in ENDINGS else None
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    files = (file for file in path.iterdir() if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
    found = sorted(file for file in files if file.is_file())
    if not found:
        raise OptionError(f"{path}: holds no image, expected files that end in {', '.join(ENDINGS)}")
    return found


def _in_memory(column: str, inputs: Any) -> list[Any] | None:
    """The images of a list, or of a column in memory; None for files and data sets, which hold them encoded."""
    import pandas as pd

    if isinstance(inputs, np.ndarray) and inputs.ndim == 4:
        return list(inputs)
    if isinstance(inputs, pd.DataFrame | Mapping):
        check_column(column, list(map(str, inputs)), INPUTS)
        return [_encoded(value) for value in inputs[column]]
    if is_file(inputs) or isinstance(inputs, str) or not isinstance(inputs, Sequence):
        return None
    values = []
    for number, row in enumerate(inputs, 1):
        if isinstance(row, Mapping):
            check_column(column, list(map(str, row)), f"{INPUTS}, row {number}")
        values.append(_encoded(row[column] if isinstance(row, Mapping) else row))
    return values


def _encoded(value: Any) -> Any:
    """An image as `datasets` has it in a row (a dict of bytes and path) as bytes or path; others as they are."""
    if isinstance(value, Mapping):
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value


class LazyImages(BatchedRows):
    """`pixel_values [3, H, W]` in [0, 1], decoded when asked for, and `labels [W]` where there are any.

    Args:
        source: the images.
        places: `[N]`, which of them each row has.
        image_size: height and width that the whole frame is resized to.
        labels: `[N, W]` float32, or None.
    """

    def __init__(
        self, source: ImageSource, places: NDArray[np.int64], image_size: int, labels: NDArray[np.float32] | None
    ) -> None:
        self.source, self.places, self.image_size, self.labels = source, places, image_size, labels

    def __len__(self) -> int:
        return len(self.places)

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Any]:
        chosen = np.asarray(places)
        images = [self._decoded(int(place)) for place in self.places[chosen]]
        batch = {"pixel_values": torch.from_numpy(np.stack(images)).float().div_(255)}
        return batch if self.labels is None else {**batch, LABELS: torch.from_numpy(self.labels[chosen])}

    def _decoded(self, place: int) -> NDArray[np.uint8]:
        with opened(self.source, place) as image:
            return resized(image, self.image_size, self.source.describe(place))


@contextlib.contextmanager
def opened(source: ImageSource, place: int) -> Iterator[Image.Image]:
    """One of the images, opened; an array as an image of 8 bits.

    Raises:
        OptionError: it does not decode; names it. So does what Pillow raises inside.
    """
    where = source.describe(place)
    given = as_given(source, place)
    if isinstance(given, bytes):
        with decoding(given, where) as image:
            yield image
    else:
        yield _in_8_bits(given, where) if isinstance(given, np.ndarray) else given


def as_given(source: ImageSource, place: int) -> Any:
    """One of the images: a `PIL.Image.Image`, an array (which a `.npy` file holds, too), or the bytes of a file."""
    value = source.values[place] if isinstance(source, GivenImages) else None
    if value is None or isinstance(value, str | bytes | os.PathLike):
        value = source.read(place)
    return load_array(value, source.describe(place)) if isinstance(value, bytes) and value.startswith(_NPY) else value


def _in_8_bits(values: NDArray[Any], where: str) -> Image.Image:
    from PIL import Image

    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3)) or not values.size:
        raise OptionError(f"{where}: is an array {list(values.shape)}, expected [height, width, 3] or [height, width]")
    if values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:
        values = np.rint(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise OptionError(f"{where}: is an array of {values.dtype}, expected uint8, or floats from 0 to 1")
    return Image.fromarray(values)


class GivenImages:
    """Images in a list: paths, bytes of files, `PIL.Image.Image`, or arrays `[H, W, 3]`.

    Args:
        values: N of them.

    Raises:
        OptionError: something else, or a path that is not there; names the row.
    """

    key = INPUTS

    def __init__(self, values: Sequence[Any]) -> None:
        from PIL import Image

        self.values = list(values)
        for row, value in enumerate(self.values):
            if isinstance(value, str | os.PathLike):
                if not Path(value).expanduser().is_file():
                    raise OptionError(f"{self.describe(row)}: there is no file {str(value)!r}")
            elif not isinstance(value, bytes | np.ndarray | Image.Image):
                raise OptionError(f"{self.describe(row)}: got a {type(value).__name__}, expected a path or an image")

    def __len__(self) -> int:
        return len(self.values)

    def fingerprint(self, rows: range) -> str:
        """They are not cached."""
        return ""

    def read(self, row: int) -> bytes:
        """The file's bytes."""
        value = self.values[row]
        if isinstance(value, bytes):
            return value
        try:
            return Path(value).expanduser().read_bytes()
        except OSError as error:
            raise OptionError(f"{self.describe(row)}: cannot be read: {error.strerror}") from None

    def describe(self, row: int) -> str:
        """The row, from 1."""
        value = self.values[row]
        named = f": image {str(value)!r}" if isinstance(value, str | os.PathLike) else ""
        return f"{INPUTS}, row {row + 1}{named}"

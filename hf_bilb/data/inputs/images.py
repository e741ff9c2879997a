"""Images that a user hands over: read and resized when a batch asks for them, as the cache of training has them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.data.images.files import ImageSource, decode, resized
from hf_bilb.data.inputs.encoded import Encoded, Wanted
from hf_bilb.data.inputs.given import INPUTS, as_table, check_column, is_file
from hf_bilb.data.inputs.kinds import ImageInputs
from hf_bilb.data.inputs.labels import Labels
from hf_bilb.data.own import columns
from hf_bilb.data.own.images import HeldImages, named_images
from hf_bilb.data.rows import BatchedRows, collate_images
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import LABELS


def encode_images(kind: ImageInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """Rows with `pixel_values`, decoded when they are asked for; see `ENCODERS`."""
    values = _in_memory(kind.column, inputs)
    if values is not None and not wanted.places:
        return _rows(kind, GivenImages(values), np.arange(len(values)), None)
    table = as_table(inputs, wanted.csv, (kind.column,))
    check_column(kind.column, table.features, table.name)
    labels = wanted.labels(table)
    if columns.holds_images(table, kind.column):
        return _rows(kind, HeldImages([(table, kind.column)]), np.arange(len(table.rows)), labels)
    return _rows(kind, *named_images([(table, kind.column)], "image", required=True), labels)


def _rows(kind: ImageInputs, source: ImageSource, places: NDArray[np.int64], labels: Labels | None) -> Encoded:
    values = None if labels is None else labels.values
    return Encoded(LazyImages(source, places, kind.image_size, values), collate_images)


def _in_memory(column: str, inputs: Any) -> list[Any] | None:
    """The images of a list, or of a column in memory; None for files and data sets, which hold them encoded."""
    import pandas as pd

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
        if isinstance(self.source, GivenImages) and (image := self.source.opened(place)) is not None:
            return resized(image, self.image_size, self.source.describe(place))
        return decode(self.source.read(place), self.image_size, self.source.describe(place))


class GivenImages:
    """Images in a list: paths, bytes of files, or `PIL.Image.Image`.

    Args:
        values: N of them.

    Raises:
        OptionError: something else, or a path that is not there; names the row.
    """

    key = INPUTS

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)
        for row, value in enumerate(self.values):
            if isinstance(value, str | os.PathLike):
                if not Path(value).expanduser().is_file():
                    raise OptionError(f"{self.describe(row)}: there is no file {str(value)!r}")
            elif not isinstance(value, bytes) and self.opened(row) is None:
                raise OptionError(f"{self.describe(row)}: got a {type(value).__name__}, expected a path or an image")

    def __len__(self) -> int:
        return len(self.values)

    def opened(self, row: int) -> Any:
        """The image, where it is one already; else None."""
        from PIL import Image

        return self.values[row] if isinstance(self.values[row], Image.Image) else None

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

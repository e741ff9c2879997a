"""Images that a user hands over: read and resized when a batch asks for them, as the cache of training has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.data.images.files import ImageSource, decode, resized
from hf_bilb.data.inputs.given import INPUTS
from hf_bilb.data.rows import BatchedRows
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import LABELS


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


def image_bytes(value: Any) -> Any:
    """What `datasets` makes of an image in a row (a dict of bytes and path), as bytes or path; others as they are."""
    if isinstance(value, dict) and {"bytes", "path"} >= value.keys():
        return value.get("bytes") if value.get("bytes") is not None else value.get("path")
    return value


"""Images that a table names by their paths, or holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import short_hash
from hf_bilb.data.images.files import ImageSource, prepare_images
from hf_bilb.data.own import columns
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.source import Source
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    pass


class NamedImages:
    """Image files that tables name; a file whose size or time of change differs is another image.

    Args:
        files: of the M different images.
        places: `[M]`, where each is named first, for messages.

    Raises:
        OptionError: one that is not there; names it and the row.
    """

    def __init__(self, files: Sequence[str], places: Sequence[str]) -> None:
        self.files = list(files)
        self.places = list(places)
        self._facts = [self._look(row) for row in range(len(files))]
        self.key = short_hash("\n".join(self.files))

    def _look(self, row: int) -> tuple[int, int]:
        try:
            facts = os.stat(self.files[row])
        except OSError as error:
            raise OptionError(f"data: {self.describe(row)}: {error.strerror}") from None
        return facts.st_size, facts.st_mtime_ns

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self, rows: range) -> str:
        """From paths, sizes and times of change."""
        return short_hash("\n".join(f"{self.files[row]} {self._facts[row]}" for row in rows))

    def read(self, row: int) -> bytes:
        """The file's bytes."""
        try:
            return Path(self.files[row]).read_bytes()
        except OSError as error:
            raise OptionError(f"data: {self.describe(row)}: cannot be read: {error.strerror}") from None

    def describe(self, row: int) -> str:
        """The row that names it, and its path."""
        return f"{self.places[row]}: image {self.files[row]!r}"


class HeldImages:
    """The images that tables hold in a column, encoded.

    Args:
        tables: each with its column, of type `datasets.Image` or whatever becomes that.
    """

    def __init__(self, tables: Sequence[tuple[Table, str]]) -> None:
        import datasets

        self._tables = list(tables)
        self._images = [
            table.rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            for table, column in tables
        ]
        self._starts = np.cumsum([0, *map(len, self._images)])
        self.key = short_hash(" ".join(f"{column} {table.rows._fingerprint}" for table, column in tables))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def fingerprint(self, rows: range) -> str:
        """The key says it already."""
        return self.key

    def _find(self, row: int) -> tuple[int, int]:
        """The table's number, and its row."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - int(self._starts[number])

    def read(self, row: int) -> bytes:
        """The bytes in the table, or those of the file that it names."""
        number, place = self._find(row)
        table, column = self._tables[number]
        image = self._images[number][place][column]
        if image is None or (image["bytes"] is None and not image["path"]):
            raise OptionError(f"data: {self.describe(row)} is empty, expected an image")
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        try:
            return (table.folder / image["path"]).read_bytes()
        except OSError as error:
            raise OptionError(f"data: {self.describe(row)}: {image['path']!r}: {error.strerror}") from None

    def describe(self, row: int) -> str:
        """File, row and column."""
        number, place = self._find(row)
        table, column = self._tables[number]
        return f"{table.place(place)}: column {column!r}"


def decoded_images(
    sources: Sequence[Source], image_size: int, cache_dir: str | None
) -> tuple[Path, list[NDArray[np.int64]]]:
    """The file with the decoded images (see `prepare_images`), and of each source which of them each row has `[N]`.

    Raises:
        OptionError: an image that is missing, or does not decode; names file and row.
    """
    tables = [(table, str(source.options.inputs.image)) for source in sources for table in source.tables]
    held = [columns.holds_images(table, column) for table, column in tables]
    if len(set(held)) > 1:
        paths, images = (tables[held.index(kind)] for kind in (False, True))
        raise OptionError(
            f"data: {paths[0].name} has paths in column {paths[1]!r}, {images[0].name} has images in {images[1]!r}, "
            "expected the same in all"
        )
    source_of_images: ImageSource
    if held[0]:
        source_of_images, rows = HeldImages(tables), np.arange(sum(map(len, sources)))
    else:
        source_of_images, rows = named_images(tables)
    try:
        file = prepare_images(source_of_images, image_size, cache_dir)
    except OptionError as error:
        raise error if str(error).startswith("data") else OptionError(f"data: {error}") from None
    return file, np.split(rows, np.cumsum(list(map(len, sources)))[:-1])


def named_images(tables: Sequence[tuple[Table, str]]) -> tuple[NamedImages, NDArray[np.int64]]:
    """The different images, and which of them each row has: one that many rows name is decoded once."""
    paths: list[str] = []
    places: list[str] = []
    for table, column in tables:
        for row, name in enumerate(columns.texts(table, column)):
            places.append(table.place(row))
            if name.strip() in table.missing:
                raise OptionError(f"data: {places[-1]}: column {column!r} is empty, expected the path of an image")
            paths.append(os.path.abspath(table.folder / Path(name.strip()).expanduser()))
    files, first, rows = np.unique(paths, return_index=True, return_inverse=True)
    return NamedImages(files.tolist(), [places[row] for row in first]), rows.astype(np.int64)

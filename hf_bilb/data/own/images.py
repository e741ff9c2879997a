"""Images, and other files, that a table names by their paths, or holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import short_hash
from hf_bilb.data.images.files import ImageSource, prepare_images
from hf_bilb.data.own import columns
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.source import Source
from hf_bilb.errors import OptionError


class NamedImages:
    """Image files, or others, that tables name; one whose size or time of change differs is another file.

    Args:
        files: the M different ones.
        places: `[M]`, where each is named first, for messages.
        what: they are, for messages.

    Raises:
        OptionError: one that is not there; names it and the row.
    """

    def __init__(self, files: Sequence[str], places: Sequence[str], what: str) -> None:
        self.files = list(files)
        self.places = list(places)
        self.what = what
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
        return f"{self.places[row]}: {self.what} {self.files[row]!r}"


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
        """From the key, and the sizes and times of change of the files that the tables name."""
        return short_hash("\n".join([self.key, *filter(None, map(self._look, rows))]))

    def _look(self, row: int) -> str | None:
        """What changes with the file of a row; None where its image is in the table, or there is none."""
        number, place = self._find(row)
        path = self._paths[number][place]
        if path is None:
            return None
        try:
            facts = os.stat(self._tables[number][0].folder / path)
        except OSError as error:
            raise OptionError(f"data: {self.describe(row)}: {path!r}: {error.strerror}") from None
        return f"{row} {facts.st_size} {facts.st_mtime_ns}"

    @cached_property
    def _paths(self) -> list[list[str | None]]:
        """Of each table's rows, the files that they name; None where there is none, or the bytes are in the table."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = []
        for images in self._images:
            column = images.data.column(0)
            data, path = (pc.struct_field(column, field) for field in ("bytes", "path"))
            paths = pc.if_else(pc.is_null(data), path, pa.scalar(None, path.type))
            order = images._indices
            found.append([one or None for one in (paths if order is None else paths.take(order.column(0))).to_pylist()])
        return found

    def empty(self) -> NDArray[np.bool_]:
        """`[N]`, whether a row has no image."""
        import pyarrow.compute as pc

        found = []
        for images in self._images:
            column = images.data.column(0)
            fields = [pc.is_null(pc.struct_field(column, field)).to_numpy() for field in ("bytes", "path")]
            nulls = fields[0] & fields[1]
            found.append(nulls if images._indices is None else nulls[images._indices.column(0).to_numpy()])
        return np.concatenate(found)

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


@dataclass(frozen=True)
class FoundFiles:
    """The different files of several sources.

    Attributes:
        files: the M files.
        rows: of each source `[N]`, which of them each row has; -1: none.
    """

    files: ImageSource
    rows: list[NDArray[np.int64]]


def find_images(sources: Sequence[Source]) -> FoundFiles:
    """The images of the rows of all sources.

    Raises:
        OptionError: a row without an image, or a file that is not there; names file and row.
    """
    return _find([(source, str(source.options.inputs.image)) for source in sources], "image", required=True)


def find_labels(source: Source, column: str, what: str) -> FoundFiles:
    """The files that a column of labels names; an empty cell is none.

    Raises:
        OptionError: a file that is not there; names file, row and column.
    """
    return _find([(source, column)], f"column {column!r}: {what}", required=False)


def decoded_images(found: FoundFiles, image_size: int, cache_dir: str | None) -> Path:
    """The file with the decoded images; see `prepare_images`.

    Raises:
        OptionError: an image that does not decode; names file and row.
    """
    try:
        return prepare_images(found.files, image_size, cache_dir)
    except OptionError as error:
        raise error if str(error).startswith("data") else OptionError(f"data: {error}") from None


def _find(columns_of: Sequence[tuple[Source, str]], what: str, required: bool) -> FoundFiles:
    tables = [(table, column) for source, column in columns_of for table in source.tables]
    held = [columns.holds_images(table, column) for table, column in tables]
    if len(set(held)) > 1:
        paths, images = (tables[held.index(kind)] for kind in (False, True))
        raise OptionError(
            f"data: {paths[0].name} has paths in column {paths[1]!r}, {images[0].name} has images in {images[1]!r}, "
            "expected the same in all"
        )
    files, rows = files_of(tables, what, required)
    return FoundFiles(files, np.split(rows, np.cumsum([len(source) for source, _ in columns_of])[:-1]))


def files_of(tables: Sequence[tuple[Table, str]], what: str, required: bool) -> tuple[ImageSource, NDArray[np.int64]]:
    """The images, or other files, that columns of tables hold or name, and which of them each row has; -1: none.

    Args:
        tables: each with its column, all of one kind.
        what: they are, for messages.
        required: an empty cell is an error.
    """
    return _held(tables, required) if columns.holds_images(*tables[0]) else named_images(tables, what, required)


def _held(tables: Sequence[tuple[Table, str]], required: bool) -> tuple[HeldImages, NDArray[np.int64]]:
    held = HeldImages(tables)
    rows = np.arange(len(held))
    return held, rows if required else np.where(held.empty(), -1, rows)


def named_images(
    tables: Sequence[tuple[Table, str]], what: str, required: bool
) -> tuple[NamedImages, NDArray[np.int64]]:
    """The different files, and which of them each row has: one that many rows name is read once."""
    paths: list[str] = []
    places: list[str] = []
    for table, column in tables:
        for row, name in enumerate(columns.texts(table, column)):
            places.append(table.place(row))
            empty = name.strip() in table.missing
            if empty and required:
                raise OptionError(f"data: {places[-1]}: column {column!r} is empty, expected the path of an image")
            paths.append("" if empty else os.path.abspath(table.folder / Path(name.strip()).expanduser()))
    files, first, rows = np.unique(paths, return_index=True, return_inverse=True)
    named = files != ""  # the empty one sorts first
    numbers = np.where(named, np.cumsum(named) - 1, -1)
    return NamedImages(files[named].tolist(), [places[row] for row in first[named]], what), numbers[rows]

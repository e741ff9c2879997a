"""A set of rows with all its tables: what its columns hold, and which rows are which part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import nearest
from hf_bilb.data.own import columns
from hf_bilb.data.own.columns import Words
from hf_bilb.data.own.csv_files import delimiter_hint, header_hint
from hf_bilb.data.own.files import Table, is_csv, read_tables
from hf_bilb.data.own.options import SourceOptions
from hf_bilb.data.own.parts import draw_groups, draw_named_groups, draw_parts, draw_strata
from hf_bilb.data.own.words import MISSING
from hf_bilb.data.splits import PARTS, Split
from hf_bilb.errors import OptionError

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """N rows, those of all tables one after the other.

    Attributes:
        options: what was asked for.
        tables: see above.
        split: the rows of each part.
    """

    options: SourceOptions
    tables: tuple[Table, ...]
    split: Split

    def __len__(self) -> int:
        return sum(len(table.rows) for table in self.tables)

    def numbers(self, column: str) -> NDArray[np.float64]:
        """`[N]`, NaN where missing."""
        return np.concatenate(self.each(columns.numbers, column))

    def bits(self, column: str) -> NDArray[np.float64]:
        """`[N]` of 0, 1, NaN."""
        return np.concatenate(self.each(columns.bits, column))

    def words(self, column: str, kept: Collection[str] = ()) -> Words:
        """See `columns.words`."""
        return Words.joined([columns.words(table, column, kept) for table in self.tables])

    def each(self, read: Callable[[Table, str], T], column: str) -> list[T]:
        """What `read` finds in the column of each table."""
        return [read(table, column) for table in self.tables]

    def place(self, row: int) -> str:
        """File and row for messages."""
        return _place(self.tables, row)

    def check_whole(self) -> None:
        """Raise `OptionError` for the first row that is cut short: its last cell is empty."""
        column = self.tables[0].rows.column_names[-1]
        self.check_filled(column, self.words(column, MISSING - {""}).codes < 0, "a value (is the row cut short?)")

    def check_filled(self, column: str, missing: NDArray[np.bool_], expected: str) -> None:
        """Raise `OptionError` for the first row without a value in a column, `missing [N]`: says what is expected."""
        _check_filled(self.tables, column, missing, expected)


def open_source(options: SourceOptions) -> Source:
    """The rows and their split.

    Raises:
        OptionError: see `read_tables`; a column that a table does not have; too few rows, groups or classes to split.
    """
    parts = read_tables(options)
    for part, tables in parts.items():
        _check_columns(options, tables)
        if part == "train":
            _check_split_columns(options, tables)
    numbers = [PARTS.index(part) for part, tables in parts.items() for _ in tables]
    joined = tuple(table for tables in parts.values() for table in tables)
    part_of = np.repeat(numbers, [len(table.rows) for table in joined])
    return Source(options, joined, _split(options, parts, part_of))


# --- columns ------------------------------------------------------------------------------------------------------


def _check_columns(options: SourceOptions, tables: Sequence[Table]) -> None:
    own = options.path != "data"
    for name, task in options.tasks.items():
        path = options.path if own else f"data.tasks.{name}"
        key = "columns" if task.columns is not None else "column"
        for column in task.label_columns(name):
            _check_column(f"{path}.{key}", column, tables)
    inputs = options.inputs.columns
    path = f"{options.path}.inputs" if own else "data.inputs"
    for column, key in inputs.items():
        _check_column(f"{path}.{key}", column, tables)


def _check_split_columns(options: SourceOptions, tables: Sequence[Table]) -> None:
    for key in ("group_by", "stratify_by"):
        if (column := getattr(options.split, key)) is not None:
            _check_column(f"{options.path}.split.{key}", column, tables)


def _check_column(path: str, column: str, tables: Sequence[Table]) -> None:
    for table in tables:
        if column in table.features:
            continue
        known = list(table.features)
        if table is not tables[0]:
            raise OptionError(f"data: {table.name} has no column {column!r}, which {tables[0].name} has ({path})")
        hint = nearest(column, known) or f" (it has {', '.join(known)}{delimiter_hint(known)})"
        hint += header_hint(known) if is_csv(Path(table.name)) else ""
        raise OptionError(f"{path}: {table.name} has no column {column!r}{hint}")


# --- parts --------------------------------------------------------------------------------------------------------


def _split(options: SourceOptions, given: Mapping[str, Sequence[Table]], part_of: NDArray[Any]) -> Split:
    rows = {part: np.flatnonzero(part_of == number) for number, part in enumerate(PARTS)}
    # The test part first: it stays as it is when files for the validation part come.
    missing = [part for part in ("test", "validation") if part not in given]
    if missing:
        # The tables of the training part come first: their rows are numbered alike in the whole.
        rows.update(zip((*missing, "train"), _drawn(options, given["train"], missing), strict=True))
    return Split(rows["train"], rows["validation"], rows["test"])


def _drawn(options: SourceOptions, tables: Sequence[Table], parts: Sequence[str]) -> list[NDArray[np.int64]]:
    split, num_rows = options.split, sum(len(table.rows) for table in tables)
    shares = [getattr(split, part) for part in parts]
    column = split.group_by or split.stratify_by
    path = f"{options.path}.split"
    try:
        if column is None:
            return draw_parts(num_rows, shares, split.seed)
        found = Words.joined([columns.words(table, column) for table in tables])
        if split.stratify_by is not None:
            path = f"{path}.stratify_by, column {column!r}"
            return draw_strata(_numbered(found.codes), shares, split.seed)
        _check_filled(tables, column, found.codes < 0, "the row's group")
        path = f"{path}.group_by"
        if options.path != "data":  # another task may have rows of the same group
            return draw_named_groups(found, parts, {"test": split.test, "validation": split.validation}, split.seed)
        return draw_groups(_numbered(found.codes), shares, split.seed)
    except OptionError as error:
        raise error if str(error).startswith("data") else OptionError(f"{path}: {error}") from None


def _numbered(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[N]`, 0 to G - 1: each value that there is, the missing one too."""
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def _check_filled(tables: Sequence[Table], column: str, missing: NDArray[np.bool_], expected: str) -> None:
    rows = np.flatnonzero(missing)
    if rows.size:
        raise OptionError(f"data: {_place(tables, int(rows[0]))}: column {column!r} is empty, expected {expected}")


def _place(tables: Sequence[Table], row: int) -> str:
    for table in tables:
        if row < len(table.rows):
            return table.place(row)
        row -= len(table.rows)
    raise IndexError(row)

"""A look at a user's table: which columns it has, and what is in them, read as the data set `table` reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import nearest, shown
from hf_bilb.data.own.columns import Lists, Words, has_lists, holds_images, lists, numbers, split_cell, words, words_of
from hf_bilb.data.own.csv_files import header_hint, other_delimiter
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.files import Table, find_files, is_csv, read_tables
from hf_bilb.data.own.options import InputOptions, SourceOptions, SplitOptions
from hf_bilb.data.own.text_files import guess_encoding, reading
from hf_bilb.data.own.words import PERHAPS_MISSING, with_point
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import datasets

#: Rows of a table that are looked at; the first ones.
MOST_ROWS = 20_000
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_CODE = re.compile(r"0\d+")  # a postal code, a number of a phone: no quantity

T = TypeVar("T")

Kind = Literal["numbers", "words", "lists", "images", "others", "empty"]


@dataclass(frozen=True)
class Column:
    """A column of N rows.

    Attributes:
        name: as in the table.
        kind: `numbers`; `words` (any text, true and false, numbers among words); `lists` of words or numbers; `images`
            of `datasets`; `others`; `empty`, where no cell has a value.
        num_rows, missing: how many cells were looked at, and how many of them are empty.
        words: `[N]`, the values of numbers and words as words.
        numbers: `[N]` of `numbers`, NaN where missing.
        lists: of `lists`.
        elements: the elements of all lists as words.
        separator: of lists in cells of text, what stands between their elements; None: they are written as lists.
    """

    name: str
    kind: Kind
    num_rows: int
    missing: int
    words: Words | None = None
    numbers: NDArray[np.float64] | None = None
    lists: Lists | None = None
    elements: Words | None = None
    separator: str | None = None

    @property
    def known(self) -> int:
        """Cells with a value."""
        return self.num_rows - self.missing

    @cached_property
    def counts(self) -> dict[str, int]:
        """Value -> how often, the most frequent first; of lists that of their elements."""
        found = self.words if self.elements is None else self.elements
        if found is None:
            return {}
        sizes = np.bincount(found.codes[found.codes >= 0], minlength=len(found.known)).tolist()
        return dict(sorted(zip(found.known, sizes, strict=True), key=lambda pair: -pair[1]))

    @cached_property
    def are_whole(self) -> bool:
        """Whether all numbers are whole."""
        known = np.empty(0) if self.numbers is None else self.numbers[~np.isnan(self.numbers)]
        return bool((known == np.round(known)).all())

    @cached_property
    def no_numbers(self) -> dict[str, int]:
        """Of `words`: those that are no numbers, where most values are some, and how often each stands there."""
        odd = {word: number for word, number in self.counts.items() if not _NUMBER.fullmatch(word)}
        return odd if self.kind == "words" and sum(odd.values()) < self.known / 2 else {}

    def row_of(self, word: str) -> int:
        """The first row that holds `word`; rows count from 1."""
        assert self.words is not None
        return int(np.flatnonzero(self.words.codes == self.words.known.index(word))[0]) + 1

    def split(self, separator: str) -> Column:
        """The same column of words as one of lists, whose elements this character parts."""
        assert self.words is not None
        cells = [split_cell(word, separator) for word in self.words.known]
        listed = [cells[code] if code >= 0 else [] for code in self.words.codes.tolist()]
        found = [element for cell in listed for element in cell if element]
        known = tuple(dict.fromkeys(found))
        places = {word: place for place, word in enumerate(known)}
        lengths = np.where(self.words.codes < 0, -1, [len(cell) for cell in listed])
        elements = Words(np.array([places[one] for one in found], np.int64), known)
        return replace(self, kind="lists", lists=Lists(lengths, None, None), elements=elements, separator=separator)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """`[N]`: of lists their lengths, of words how many words a text has; -1 where missing."""
        if self.lists is not None:
            return self.lists.lengths
        if self.words is None:
            return np.full(self.num_rows, -1)
        return np.array([*(len(text.split()) for text in self.words.known), -1])[self.words.codes]


@dataclass(frozen=True)
class InspectedTable:
    """What the first rows of a table hold.

    Attributes:
        name: of the file, or of the set and its split.
        columns: in order.
        num_rows: how many were looked at.
        all_rows: how many there are.
        folder: that paths in it are relative to.
        csv: how its text was read, where that is not the default.
        hint: what may be wrong with its first line; empty: nothing.
    """

    name: str
    columns: tuple[Column, ...]
    num_rows: int
    all_rows: int
    folder: Path
    csv: CsvOptions
    hint: str = ""

    def column(self, name: str, option: str) -> Column:
        """The column of this name.

        Raises:
            OptionError: there is none; for the option that named it.
        """
        found = next((column for column in self.columns if column.name == name), None)
        if found is None:
            names = [column.name for column in self.columns]
            raise OptionError(
                f"{option}: there is no column {shown(name)}{nearest(name, names)}; {_listed(names)}{self.hint}"
            )
        return found


def _listed(names: list[str]) -> str:
    return f"known: {', '.join(names)}" if len(names) <= 30 else f"the table has {len(names)} columns"


def inspect_table(path: str | Path, names: tuple[str, ...] = ()) -> InspectedTable:
    """Look at a file, or at the training part of a folder saved by `datasets`.

    Args:
        path: see above.
        names: of the columns, for a text file without them; none: they are in its first line.

    Raises:
        OptionError: no such file, one of an unknown kind, one that cannot be read, or without rows; `names` for one of
            another kind.

    Cost: the whole file is read, into the cache of `datasets`, from where training reads it; the first 20,000 rows are
    looked at.
    """
    file = find_files(str(path), "FILE")[0]
    of_text = is_csv(file)
    if names and not of_text:
        raise OptionError(f"--columns: says nothing for {file}, whose columns have names")
    csv = _csv_options(file, names) if of_text else CsvOptions()
    table = _read(file, csv)
    columns = _columns(table)
    if of_text and _has_decimal_commas(columns):
        table, columns = _read_again(table, decimal=",")
    if missing := _missing_words(columns):
        table, columns = _read_again(table, missing=missing)
    rows = min(len(table.rows), MOST_ROWS)
    hint = header_hint(table.rows.column_names, "--columns") if of_text else ""
    return InspectedTable(table.name, columns, rows, len(table.rows), table.folder, table.csv, hint)


def _csv_options(file: Path, names: tuple[str, ...]) -> CsvOptions:
    """Encoding and delimiter; where no encoding fits, reading in UTF-8 says so."""
    with reading(file, "utf-8"):
        encoding = guess_encoding(file) or "utf-8"
    return CsvOptions(encoding=encoding, delimiter=other_delimiter(file, encoding), columns=names or None)


def _read(file: Path, csv: CsvOptions) -> Table:
    unused: Mapping[str, Any] = {}
    source = SourceOptions("data", str(file), None, csv, InputOptions(text="-"), SplitOptions(), unused)
    return read_tables(source)["train"][0]


def _read_again(table: Table, **options: Any) -> tuple[Table, tuple[Column, ...]]:
    """The same rows, with other options of how cells of text are read."""
    table = replace(table, csv=replace(table.csv, **options))
    return table, _columns(table)


def _has_decimal_commas(columns: tuple[Column, ...]) -> bool:
    """Whether a column is of numbers with decimal commas alone, and none is of numbers with decimal points.

    A comma, or a point, before three digits may part thousands: the column needs one before another number of digits.
    """
    numbers = [column for column in columns if column.kind == "numbers" and not column.are_whole]
    points = any(with_point(word) is None for column in numbers for word in column.counts)
    return not points and any(_are_with_commas(column) for column in columns if column.kind == "words")


def _are_with_commas(column: Column) -> bool:
    found = [word for word in column.counts if word not in PERHAPS_MISSING]
    sure = any(re.search(r",(\d{1,2}|\d{4,})$", word) for word in found)
    return sure and all(with_point(word) is not None for word in found)


def _missing_words(columns: tuple[Column, ...]) -> tuple[str, ...]:
    """Words that stand for an empty cell: they do where all other values of a column are numbers."""
    found = {word for column in columns if column.no_numbers.keys() <= PERHAPS_MISSING for word in column.no_numbers}
    return tuple(sorted(found))


def _columns(table: Table) -> tuple[Column, ...]:
    first = replace(table, rows=table.rows.select(range(min(len(table.rows), MOST_ROWS))))
    return tuple(_column(first, name) for name in table.rows.column_names)


def _column(table: Table, name: str) -> Column:
    import datasets

    feature, size = table.rows.features[name], len(table.rows)
    if holds_images(table, name):
        return Column(name, "images", size, _count_missing(table.rows, name))
    found_lists = _tried(lists, table, name) if has_lists(table, name) else None
    if found_lists is not None:
        return _of_lists(table, name, found_lists)
    found = _tried(words, table, name)
    if found is None:  # of a type that no option of the data set `table` takes
        return Column(name, "others", size, _count_missing(table.rows, name))
    missing = int((found.codes < 0).sum())
    if missing == size:
        return Column(name, "empty", size, missing)
    are_words = isinstance(feature, datasets.ClassLabel) or feature == datasets.Value("bool")
    are_words |= any(_CODE.fullmatch(word) for word in found.known)
    values = None if are_words else _tried(numbers, table, name)
    return Column(name, "words" if values is None else "numbers", size, missing, words=found, numbers=values)


def _of_lists(table: Table, name: str, found: Lists) -> Column:
    elements = words_of(found.values, found.feature, table)
    missing = int((found.lengths < 0).sum())
    return Column(name, "lists", len(table.rows), missing, lists=found, elements=elements)


def _tried(read: Callable[[Table, str], T], table: Table, name: str) -> T | None:
    """None where one of the values is of another kind."""
    try:
        return read(table, name)
    except OptionError:
        return None


def _count_missing(rows: datasets.Dataset, name: str) -> int:
    return int(rows.with_format("arrow")[name].null_count)

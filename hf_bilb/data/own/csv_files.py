"""Text files of rows and cells, every cell as text: what is a number, and what is missing, is decided by column."""

from __future__ import annotations

import csv
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.text_files import (
    encoding_hint,
    ending,
    looks_like_utf8,
    open_text,
    reading,
    state,
    without_mark,
)
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

TABS = (".tsv", ".tab")
_FIRST_LINES = 50
_NUMBER = re.compile(r"[-+]?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d+)?")


def read_csv(file: Path, options: CsvOptions) -> datasets.Dataset | None:
    """The rows; None: there are none.

    Raises:
        OptionError: the file is damaged, or in another encoding, or a column stands twice.
    """
    import datasets

    with reading(file, options.encoding):
        text = _CsvFile(file, options)
        header, is_first_row, has_rows = text.header()
        if not has_rows:
            return None
        rows = datasets.Dataset.from_csv(
            str(file),
            features=datasets.Features({name: datasets.Value("string") for name in header}),
            names=header,
            header=None if is_first_row else 0,
            skiprows=text.comments,
            na_filter=False,
            encoding=without_mark(options.encoding),
            # A carriage return alone ends no row, where rows end with a line feed.
            lineterminator=None if text.has_windows_lines else "\n",
            dataset_name=f"file_{state(file)}",
            sep=text.delimiter,
            quoting=text.quoting,
            skipinitialspace=text.skips_spaces,
        )
    _warn_of_encoding(file, options.encoding)
    return rows


def check_cells(file: Path, options: CsvOptions, rows: datasets.Dataset) -> None:
    """Raise `OptionError` for the first row of a file that has fewer cells than there are columns."""
    import pyarrow.compute

    expected = len(rows.column_names)
    last = rows.data.column(expected - 1)
    if not pyarrow.compute.any(pyarrow.compute.equal(last, "")).as_py():  # pandas fills short rows with empty cells
        return
    with reading(file, options.encoding):
        text = _CsvFile(file, options)
        for number, found in enumerate(text.row_lengths(), 1):
            if found < expected:
                named = "; data.csv.columns names them: a file with other columns needs their names in its first line"
                hint = named if text.header()[1] else delimiter_hint(rows.column_names)
                raise _wrong_number(file, number, found, expected, hint)


class _CsvFile:
    """A file, and how its cells are parted."""

    def __init__(self, file: Path, options: CsvOptions) -> None:
        tabs = ending(file) in TABS
        quotes = not tabs if options.quotes is None else options.quotes
        self.file = file
        self.options = options
        self.delimiter = options.delimiter or ("\t" if tabs else ",")
        self.quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        self.skips_spaces = quotes  # so that a quote after a space is one

    def _open(self, newline: str = "") -> IO[str]:
        return open_text(self.file, newline, self.options.encoding)

    @cached_property
    def comments(self) -> int:
        """How many stand at its top."""
        with self._open() as stream:
            return sum(1 for _ in itertools.takewhile(lambda line: line[:1] == self.options.comment, stream))

    @cached_property
    def has_windows_lines(self) -> bool:
        with self._open(newline="\n") as stream:
            line = stream.readline()
        return line.endswith("\r\n") or not line.endswith("\n")

    def rows(self, newline: str = "") -> Iterator[list[str]]:
        """The cells of each row, of the names' too; what ends no row for pandas ends none where `newline` is one."""
        with self._open(newline) as stream:
            lines: Iterator[str] = iter(stream)
            if newline:
                lines = (line.replace("\r\n", "\n").replace("\r", " ") for line in stream)
            cells = csv.reader(
                itertools.islice(lines, self.comments, None),
                delimiter=self.delimiter,
                quoting=self.quoting,
                skipinitialspace=self.skips_spaces,
            )
            yield from filter(None, cells)

    def row_lengths(self) -> Iterator[int]:
        """Of each row how many cells it has."""
        rows = self.rows("" if self.has_windows_lines else "\n")
        return map(len, itertools.islice(rows, int(not self.header()[1]), None))

    def header(self) -> tuple[list[str], bool, bool]:
        """The columns' names, whether the first line is a row, and whether there is one."""
        rows, columns = self.rows(), self.options.columns
        top = [name.strip() for name in next(rows, [])]
        if any("\0" in name for name in top):
            raise OptionError(
                f"data: {self.file} cannot be read: its text holds NUL{encoding_hint(self.file, self.options.encoding)}"
            )
        is_row = columns is not None and 2 * len(set(columns) & set(top)) <= min(len(columns), len(top))
        header = list(columns) if columns is not None and is_row else top
        first = top if is_row and top else next(rows, None)
        if repeated := {name for name in header if header.count(name) > 1}:
            hint = header_hint(header)
            raise OptionError(f"data: {self.file}: the column {min(repeated)!r} stands twice in the first line{hint}")
        # pandas would take the first cells for the rows' names, and give every column the values of its neighbour.
        if first is not None and len(first) > len(header):
            raise _wrong_number(self.file, 1, len(first), len(header), delimiter_hint(header))
        return header, is_row, first is not None


def _wrong_number(file: Path, row: int, found: int, expected: int, hint: str = "") -> OptionError:
    return OptionError(f"data: {file}, row {row}: has {found} cells, expected {expected}, one for each column{hint}")


def _warn_of_encoding(file: Path, encoding: str) -> None:
    """Of one that takes any bytes, so that text in UTF-8 becomes other letters without an error."""
    if not encoding.lower().startswith(("utf", "u8")) and looks_like_utf8(file):
        logger.warning("data.csv.encoding: is %r, but %s looks like utf-8: its letters with accents become others",
                       encoding, file)  # fmt: skip


# --- hints --------------------------------------------------------------------------------------------------------


def other_delimiter(file: Path, encoding: str) -> str | None:
    """A delimiter that parts all of the first lines of a file with commas into as many cells, or the first line of any
    file that is a single name without it; None: it is the usual one."""
    with reading(file, encoding):
        usual = _CsvFile(file, CsvOptions(encoding=encoding))
        for other in ";\t|" if usual.delimiter == "," else "":
            rows = _CsvFile(file, CsvOptions(encoding=encoding, delimiter=other)).rows()
            lengths = {len(row) for row in itertools.islice(rows, _FIRST_LINES)}
            if len(lengths) == 1 and lengths != {1}:
                return other
        names = next(usual.rows(), [])
        return _delimiter_in(names) if len(names) == 1 else None


def delimiter_hint(names: Sequence[str]) -> str:
    """For a file that seems to have another delimiter."""
    other = _delimiter_in(names)
    return f"; is data.csv.delimiter {other!r}?" if other else ""


def _delimiter_in(names: Sequence[str]) -> str | None:
    """A delimiter in a name; a comma only in the single one that there is."""
    return next((one for one in (";\t|," if len(names) == 1 else ";\t|") if any(one in name for name in names)), None)


def header_hint(names: Sequence[str], option: str = "data.csv.columns") -> str:
    """For a text file whose first line holds values, not names: a number with a fraction, or most of its cells numbers
    or empty."""
    numbers = [name for name in names if not name or _NUMBER.fullmatch(name)]
    is_row = any(re.search("[.,]", name) for name in numbers) or 2 * len(numbers) > len(names)
    return f"; if its first line is a row, name the columns in {option}" if is_row else ""

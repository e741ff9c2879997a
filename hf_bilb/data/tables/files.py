"""Text files of tables: what their columns are, and reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import nearest
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BinaryTask:
    """A task: its name, the column that it is read from, and which values are class 1 and class 0."""

    name: str
    column: str
    positive: frozenset[str]
    negative: frozenset[str]


@dataclass(frozen=True)
class Layout:
    """The columns of a table.

    Attributes:
        columns: of the file, in order.
        numbers: those that are quantities.
        left_out: those that are no features; the tasks' own are none either, whichever tasks are chosen, so that a
            model of one task sees what a model of all sees.
        tasks: every task there is.
    """

    columns: tuple[str, ...]
    numbers: tuple[str, ...]
    left_out: tuple[str, ...]
    tasks: tuple[BinaryTask, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """The columns whose values are words, or numbers that stand for words."""
        no_features = {*self.numbers, *self.left_out, *(task.column for task in self.tasks)}
        return tuple(name for name in self.columns if name not in no_features)

    def chosen(self, names: Sequence[str] | None) -> tuple[BinaryTask, ...]:
        """The tasks of these names, in this order; None: all."""
        known = {task.name: task for task in self.tasks}
        return tuple(known[name] for name in (known if names is None else names))


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableRows:
    """A file's rows: `numbers [N, D]`, `words [N, C]` (as they stand there), `labels [N, K]` of 0 and 1."""

    numbers: Floats
    words: NDArray[np.object_]
    labels: Floats

    def followed_by(self, other: TableRows) -> TableRows:
        """These rows, then the other ones."""
        return TableRows(
            np.concatenate([self.numbers, other.numbers]),
            np.concatenate([self.words, other.words]),
            np.concatenate([self.labels, other.labels]),
        )


def find_file(folder: str, names: Sequence[str]) -> Path:
    """The first of the files that is there, as it is or packed (`.xz`, `.gz`).

    Raises:
        OptionError: the folder or the file is missing.
    """
    path = Path(folder)
    if not path.is_dir():
        raise OptionError(f"data.folder: there is no folder {folder!r}")
    for name in (name + packed for name in names for packed in ("", ".xz", ".gz")):
        if (path / name).is_file():
            return path / name
    raise OptionError(f"data.folder: {folder!r} has no file {' or '.join(names)} (as it is, .xz or .gz)")


def read_rows(path: Path, layout: Layout, tasks: Sequence[BinaryTask]) -> TableRows:
    """Read a file of comma-separated values, with the columns' names in the first line or without.

    Raises:
        OptionError: the file or a column is missing, a row is cut short, a number is none, or a label is no class:
            one line with file, row (the first one is 1) and column or task.
    """
    table = _read_table(path, layout.columns)
    if not len(table):
        raise OptionError(f"data: {path} has no rows")
    numbers = [_numbers(path, table[name], name) for name in layout.numbers]
    words = [table[name].to_numpy(dtype=object) for name in layout.categories]
    labels = [_labels(path, table[task.column], task) for task in tasks]
    return TableRows(np.stack(numbers, axis=1), np.stack(words, axis=1), np.stack(labels, axis=1))


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    try:
        # The first line alone tells about the header; UCI's adult.test begins with a remark instead.
        first = pd.read_csv(path, header=None, nrows=1, dtype=str, skipinitialspace=True, sep=",")
        names = [str(name).strip() for name in first.iloc[0]]
        remark = names[0].startswith("|")
        header = not remark and columns[0] in names
        table = pd.read_csv(
            path,
            header=0 if header else None,
            names=None if header else list(columns),
            skiprows=int(remark),
            dtype=str,
            keep_default_na=False,
            skipinitialspace=True,
            index_col=False,
        )
    except FileNotFoundError:
        raise OptionError(f"data: there is no file {str(path)!r}") from None
    except (OSError, EOFError, LZMAError, UnicodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise OptionError(f"data: {path} cannot be read: {' '.join(str(error).split())}") from None
    table.columns = [str(name).strip() for name in table.columns]
    for name in columns:
        if name not in table.columns:
            raise OptionError(f"data: {path} has no column {name!r}{nearest(name, table.columns)}")
    # An empty field in the middle is a category (hisp_origin in the census data); pandas fills short rows up with them.
    cut = np.flatnonzero(table.iloc[:, -1].fillna("") == "")
    if cut.size:
        raise OptionError(f"data: {path}, row {cut[0] + 1}: is cut short, its last column is empty")
    return table.fillna("")


def _numbers(path: Path, column: pd.Series[str], name: str) -> Floats:
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        got = column.iloc[wrong[0]]
        raise OptionError(f"data: {path}, row {wrong[0] + 1}: column {name!r} is {got!r}, expected a number")
    return values


def _labels(path: Path, column: pd.Series[str], task: BinaryTask) -> Floats:
    stripped = column.str.strip()
    positive = stripped.isin(task.positive).to_numpy()
    wrong = np.flatnonzero(~(positive | stripped.isin(task.negative).to_numpy()))
    if wrong.size:
        expected = ", ".join(map(repr, sorted(task.positive) + sorted(task.negative)))
        raise OptionError(
            f"data: {path}, row {wrong[0] + 1}: task {task.name!r}: {column.name} {stripped.iloc[wrong[0]]!r} is no "
            f"label, expected one of {expected}"
        )
    return positive.astype(np.float64)

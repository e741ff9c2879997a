"""How text files of tables are read."""

from __future__ import annotations

from dataclasses import dataclass

from hf_bilb.errors import OptionError


@dataclass(frozen=True)
class CsvOptions:
    """How the cells of text files are read.

    Attributes:
        delimiter: between two cells; null = a comma, of `.tsv` and `.tab` files a tab.
        quotes: whether a cell may stand in double quotes; null = yes, of `.tsv` and `.tab` files no.
        columns: the columns' names, for files that do not have them in their first line.
        missing: further words that mean an empty cell, such as `NA` or `?`. An empty cell, `null`, `NaN`, `nan` and
            `None` always do, but not in a text, and not where they are among a task's `classes`.
    """

    delimiter: str | None = None
    quotes: bool | None = None
    columns: tuple[str, ...] | None = None
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise OptionError(f"delimiter: {self.delimiter!r} is not valid, expected one character")
        if self.columns is not None:
            check_repeats("columns", self.columns)


def check_repeats(key: str, names: tuple[str, ...] | None) -> None:
    """Raise `OptionError` for a name that stands twice."""
    seen: set[str] = set()
    for name in names or ():
        if name in seen:
            raise OptionError(f"{key}: {name!r} stands twice")
        seen.add(name)

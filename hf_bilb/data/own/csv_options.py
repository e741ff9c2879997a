"""How text files of tables are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_bilb.config.options import nearest
from hf_bilb.errors import OptionError

_USUAL_ENCODINGS = ("utf-8", "utf-16", "cp1252", "latin-1")


@dataclass(frozen=True)
class CsvOptions:
    """How the cells of text files are read.

    Attributes:
        encoding: of the text: `utf-8`, `cp1252` (Western European Windows), `utf-16`, or another that Python knows.
        delimiter: between two cells; null = a comma, of `.tsv` and `.tab` files a tab.
        quotes: whether a cell may stand in double quotes; null = yes, of `.tsv` and `.tab` files no.
        columns: the columns' names, for files that do not have them in their first line. A first line with most of
            these names in it, or mostly of them, is one of names all the same.
        comment: a character; lines at the top of a file that begin with it are passed over.
        decimal: what stands before the fraction of a number. With a comma, full stops part thousands: `1.234,5`.
        list_separator: a character between the values of a list in one cell, as in `red|blue`. It parts the labels of
            `multi_label`, and the words and tags of `token_classification`, nothing else.
        missing: further words that mean an empty cell, such as `NA` or `?`. An empty cell, `null`, `NaN`, `nan` and
            `None` always do, but not in a text, and not where they are among a task's `classes`.
    """

    encoding: str = "utf-8"
    delimiter: str | None = None
    quotes: bool | None = None
    columns: tuple[str, ...] | None = None
    comment: str | None = None
    decimal: Literal[".", ","] = "."
    list_separator: str | None = None
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _is_encoding(self.encoding):
            hint = nearest(self.encoding, _USUAL_ENCODINGS) or f", expected one such as {', '.join(_USUAL_ENCODINGS)}"
            raise OptionError(f"encoding: {self.encoding!r} is not known{hint}")
        for key in ("delimiter", "comment", "list_separator"):
            value = getattr(self, key)
            if value is not None and len(value) != 1:
                raise OptionError(f"{key}: {value!r} is not valid, expected one character")
        if self.columns is not None:
            check_repeats("columns", self.columns)


def _is_encoding(name: str) -> bool:
    try:
        return bool("a".encode(name))
    except (LookupError, UnicodeError):  # not known, or none of text
        return False


def check_repeats(key: str, names: tuple[str, ...] | None) -> None:
    """Raise `OptionError` for a name that stands twice."""
    seen: set[str] = set()
    for name in names or ():
        if name in seen:
            raise OptionError(f"{key}: {name!r} stands twice")
        seen.add(name)

"""The columns of a table as arrays: numbers, words, texts, lists.

Files of several kinds say the same in several ways: a number may be the text of a cell, true may be `True`, a list may
be JSON in a cell. Each function takes whatever says it, and raises `OptionError` for the first row that does not, with
file, row and column.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import shown
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.words import has_thousands_commas, with_point, word_of
from hf_bilb.errors import OptionError
from hf_bilb.losses.masked import MISSING_INTEGER

if TYPE_CHECKING:
    import pyarrow as pa


_LARGEST = float(np.finfo(np.float32).max)  # models and losses compute in 32 bits


@dataclass(frozen=True)
class Words:
    """N words out of a few: `codes [N]` int64, positions in `known`, -1 where missing.

    Attributes:
        codes, known: see above.
        declared: `known` is in the order in which the data set itself declares the classes.
    """

    codes: NDArray[np.int64]
    known: tuple[str, ...]
    declared: bool = False

    @classmethod
    def joined(cls, parts: Sequence[Words]) -> Words:
        """The words of all parts, one part after the other."""
        known = tuple(dict.fromkeys(word for part in parts for word in part.known))
        codes = [part.positions_in(known) for part in parts]
        return cls(np.concatenate(codes), known, all(part.declared and part.known == known for part in parts))

    def positions_in(self, words: Sequence[str]) -> NDArray[np.int64]:
        """`[N]`, positions in other words; -1 where missing or none of them."""
        return self.numbered({word: place for place, word in enumerate(words)}, unknown=-1)

    def numbered(self, places: Mapping[str, int], unknown: int) -> NDArray[np.int64]:
        """`[N]`, the number of each word; -1 where missing, `unknown` where it has none."""
        table = np.array([*(places.get(word, unknown) for word in self.known), -1], np.int64)
        return table[self.codes]

    def without(self, missing: Collection[str]) -> Words:
        """The same, but that these words are missing ones."""
        table = np.array([*(-1 if word in missing else code for code, word in enumerate(self.known)), -1], np.int64)
        return Words(table[self.codes], self.known, self.declared)

    def known_at(self, rows: NDArray[np.int64]) -> list[str]:
        """The words of these rows, without the missing ones."""
        return [self.known[code] for code in self.codes[rows] if code >= 0]

    def used(self, rows: NDArray[np.int64]) -> tuple[str, ...]:
        """The different words of these rows."""
        found = np.unique(self.codes[rows])
        return tuple(self.known[code] for code in found[found >= 0])


@dataclass(frozen=True)
class Lists:
    """N lists: `lengths [N]` int64, -1 where there is none; the values of all of them, one list after the other."""

    lengths: NDArray[np.int64]
    values: pa.Array
    feature: Any  # of the values, as `datasets` has it


def numbers(table: Table, column: str) -> NDArray[np.float64]:
    """`[N]` numbers, NaN where missing."""
    import pyarrow as pa

    array = _column(table, column)
    if pa.types.is_string(array.type):
        values = _parsed(table, column, array)
    elif _is_number(array.type):
        values = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
    else:
        raise _of_wrong_type(table, column, array, "numbers")
    infinite = np.flatnonzero(np.isinf(values))
    if infinite.size:
        raise OptionError(f"data: {table.place(infinite[0])}: column {column!r} is infinite, expected a finite number")
    huge = np.flatnonzero(np.abs(values) > _LARGEST)
    if huge.size:
        raise OptionError(
            f"data: {table.place(huge[0])}: column {column!r} is {values[huge[0]]:g}, expected a number that 32 bits "
            f"hold, up to {_LARGEST:.2g}"
        )
    return values


def _parsed(table: Table, column: str, array: pa.Array) -> NDArray[np.float64]:
    import pandas as pd

    cells = pd.Series(array.to_pylist(), dtype=object).fillna("").str.strip()
    missing = cells.isin(table.missing).to_numpy()
    plain = cells.map(with_point) if table.csv.decimal == "," else cells
    values = pd.to_numeric(plain, errors="coerce").to_numpy(dtype=np.float64, copy=True)
    wrong = np.flatnonzero(np.isnan(values) & ~missing)
    if wrong.size:
        cell = cells.iloc[wrong[0]]
        raise OptionError(
            f"data: {table.place(wrong[0])}: column {column!r} is {shown(cell)}, expected a number"
            f"{_decimal_hint(table, cell)}"
        )
    values[missing] = np.nan
    return values


def _decimal_hint(table: Table, cell: str) -> str:
    if table.csv.decimal == ",":
        return " with a decimal comma, as data.csv.decimal says"
    thousands = "; write thousands without commas" if has_thousands_commas(cell) else ""
    return f"{thousands}; is data.csv.decimal ','?" if with_point(cell) is not None else thousands


def words(table: Table, column: str, kept: Collection[str] = ()) -> Words:
    """`[N]` words; `kept` are none that mean an empty cell, whatever else is said."""
    import pyarrow as pa

    array = _column(table, column)
    if _is_list(array.type) or pa.types.is_struct(array.type) or pa.types.is_binary(array.type):
        raise _of_wrong_type(table, column, array, "words or numbers")
    return words_of(array, table.features[column], table, kept)


def words_of(array: pa.Array, feature: Any, table: Table, kept: Collection[str] = ()) -> Words:
    """The same for an array `[N]` of a table, a column or the values of lists."""
    import datasets
    import pyarrow as pa

    if isinstance(feature, datasets.ClassLabel):
        codes = array.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return Words(np.maximum(codes, -1), tuple(feature.names), declared=True)
    if pa.types.is_float32(array.type) or pa.types.is_float16(array.type):  # 0.1, not the nearest number of 64 bits
        array = pa.array([None if one is None else str(array.type.to_pandas_dtype()(one)) for one in array.to_pylist()],
                         pa.string())  # fmt: skip
    missing = table.missing - set(kept)
    encoded = array.dictionary_encode()
    values = ["" if value is None else word_of(_with_point(value, table)) for value in encoded.dictionary.to_pylist()]
    known = tuple(dict.fromkeys(word for word in values if word not in missing))
    places = {word: place for place, word in enumerate(known)}
    codes_of = np.array([*(places.get(word, -1) for word in values), -1], np.int64)
    codes = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return Words(codes_of[codes], known)


def _with_point(value: Any, table: Table) -> Any:
    if table.csv.decimal == "." or not isinstance(value, str):
        return value
    return with_point(value.strip()) or value


_FALSE, _TRUE = ("0", "false", "f", "no", "n"), ("1", "true", "t", "yes", "y")
_BITS = {**dict.fromkeys(_FALSE, 0.0), **dict.fromkeys(_TRUE, 1.0), str(MISSING_INTEGER): np.nan}


def bits(table: Table, column: str) -> NDArray[np.float64]:
    """`[N]`, 0 or 1, NaN where missing; of true, false, yes, no, and their first letters, in any case, too."""
    found = words(table, column)
    values = np.array([*(_BITS.get(word.lower(), -1.0) for word in found.known), np.nan])[found.codes]
    wrong = np.flatnonzero(values == -1)
    if wrong.size:
        word = shown(found.known[found.codes[wrong[0]]])
        raise OptionError(
            f"data: {table.place(wrong[0])}: column {column!r} is {word}, expected 0, 1, true, false, yes or no"
        )
    return values


def texts(table: Table, column: str) -> list[str]:
    """N texts as they stand there; a missing one is the empty text."""
    import pyarrow as pa

    array = _column(table, column)
    if _is_list(array.type) or pa.types.is_struct(array.type) or pa.types.is_binary(array.type):
        raise _of_wrong_type(table, column, array, "texts")
    return ["" if text is None else str(text) for text in array.to_pylist()]


def holds_lists(table: Table, column: str) -> bool:
    """Whether the column's values are lists."""
    return _is_list(_column(table, column).type)


def holds_images(table: Table, column: str) -> bool:
    """Whether the column's values are images, not paths."""
    import datasets
    import pyarrow as pa

    feature = table.features[column]
    kind = table.rows.data.schema.field(column).type
    is_stored = pa.types.is_struct(kind) and {field.name for field in kind} <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or pa.types.is_binary(kind) or is_stored


def has_lists(table: Table, column: str) -> bool:
    """Whether the column's values are lists, or texts of which the first one looks like one.

    Where the table says what parts lists, all texts are lists but those of which none is more than 0, 1, yes, ...
    """
    import pyarrow as pa

    array = _column(table, column)
    if not pa.types.is_string(array.type):
        return _is_list(array.type)
    filled = (cell.strip() for cell in array.to_pylist() if cell is not None)
    known = (cell for cell in filled if cell not in table.missing)
    if table.csv.list_separator is not None:
        return any(cell.lower() not in _BITS for cell in known)
    return next(known, "").startswith("[")


def lists(table: Table, column: str) -> Lists:
    """N lists, of a column of lists, or of text such as `["a", "b"]`, or `a|b` where `csv.list_separator` says so."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = _column(table, column)
    feature = table.features[column]
    if pa.types.is_string(array.type):
        array, feature = pa.array(_parsed_lists(table, column, array), pa.list_(pa.string())), None
    elif pa.types.is_null(array.type):
        array, feature = array.cast(pa.list_(pa.string())), None
    elif not _is_list(array.type):
        raise _of_wrong_type(table, column, array, "lists")
    lengths = pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    values = _plain(pc.list_flatten(array))
    if _is_list(values.type) or pa.types.is_struct(values.type):
        raise OptionError(
            f"data: {table.name}: column {column!r} holds lists of {values.type}, expected lists of words"
        )
    return Lists(lengths, values, getattr(feature, "feature", None))


def word_lists(table: Table, column: str) -> list[list[str]]:
    """N lists of words of a text; a missing list, or word, is empty."""
    import pyarrow as pa

    found = lists(table, column)
    values = [word or "" for word in found.values.cast(pa.string()).to_pylist()]
    stops = np.cumsum(np.maximum(found.lengths, 0)).tolist()
    return [values[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _parsed_lists(table: Table, column: str, array: pa.Array) -> list[list[str | None] | None]:
    found: list[list[str | None] | None] = []
    for row, cell in enumerate(array.to_pylist()):
        text = "" if cell is None else cell.strip()
        value = None if text in table.missing else _parsed_list(text, table.csv.list_separator)
        if value is None and text not in table.missing:
            cut = ", which is cut short" if _CUT_SHORT.search(text) else ""
            raise OptionError(f"data: {table.place(row)}: column {column!r} is {shown(text)}{cut}, expected a list")
        found.append(value)
    return found


_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_BARE = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?inf|nan|None|True|False"
_ELEMENT = rf"(?:np\.\w+\()?(?P<value>{_QUOTED}|{_BARE})\)?"
_VALUE = re.compile(_ELEMENT, re.DOTALL)
_PLAIN = _ELEMENT.replace("?P<value>", "?:")
#: As Python prints a list, or NumPy an array: with a comma, or white space, between any two elements.
_LISTS = tuple(
    re.compile(rf"\[\s*(?:{_PLAIN}(?:{between}{_PLAIN})*)?{end}\s*\]", re.DOTALL)
    for between, end in ((r"\s*,\s*", r"\s*,?"), (r"\s+", ""))
)
_CUT_SHORT = re.compile(r"[\s\[]\.\.\.[\s\]]")  # as NumPy prints a long array


def _parsed_list(text: str, separator: str | None) -> list[str | None] | None:
    """A list as JSON, Python or NumPy writes it, or else one with a separator; None: it is none."""
    found = _written_list(text) if text.startswith("[") else None
    return list(split_cell(text, separator)) if found is None and separator is not None else found


def split_cell(text: str, separator: str) -> list[str]:
    """The values of a list in one cell; white space around them is none of theirs."""
    return text.split() if separator == " " else [value.strip() for value in text.split(separator)]


def _written_list(text: str) -> list[str | None] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) and not any(isinstance(one, list | dict) for one in value):
        return [None if one is None else str(one) for one in value]
    if not any(form.fullmatch(text) for form in _LISTS):
        return None
    return [_parsed_element(found["value"]) for found in _VALUE.finditer(text)]


def _parsed_element(text: str) -> str | None:
    if text in ("None", "nan"):
        return None
    return str(ast.literal_eval(text)) if text[0] in "'\"" else text


# --- arrow --------------------------------------------------------------------------------------------------------


def _column(table: Table, column: str) -> pa.Array:
    """The column as one array; text as `string`, whatever kind of it."""
    # Methods of `datasets` would copy the whole schema for each column.
    whole, order = table.rows.data.column(column), table.rows._indices
    return _plain((whole if order is None else whole.take(order.column(0))).combine_chunks())


def _plain(array: pa.Array) -> pa.Array:
    import pyarrow as pa

    if isinstance(array.type, pa.BaseExtensionType):  # JSON of values of several types: a word among numbers
        values = [None if value is None else json.loads(value) for value in array.storage.to_pylist()]
        return pa.array(
            [None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values], pa.string()
        )
    is_text = pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type)
    if is_text or pa.types.is_temporal(array.type) or pa.types.is_dictionary(array.type):
        return array.cast(pa.string())
    return array


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean, pa.types.is_null)
    return any(check(kind) for check in checks)


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _of_wrong_type(table: Table, column: str, array: pa.Array, expected: str) -> OptionError:
    import pyarrow as pa

    held = "lists" if _is_list(array.type) else "texts" if pa.types.is_string(array.type) else str(array.type)
    return OptionError(f"data: {table.name}: column {column!r} holds {held}, expected {expected}")

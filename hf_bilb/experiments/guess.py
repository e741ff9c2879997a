"""What a column of a user's table may be: a task of which type, or an input of which kind; and why."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from hf_bilb.config.options import shown
from hf_bilb.data.own.columns import split_cell
from hf_bilb.data.own.words import other_spelling
from hf_bilb.experiments.inspect_table import Column, InspectedTable

#: Whole numbers of so many different values, each of them a few times, are taken for classes.
MOST_CLASSES = 20
ROWS_PER_CLASS = 3
#: Of as many rows or more, words of which more than half are different are no classes.
FEW_ROWS = 20
#: What parts values in a cell, and how many different ones of them are labels at most.
_SEPARATORS = ("|", ";", ",")
_MOST_LABELS = 100
#: Above them, a column of words is no input of a model for tables; a text is long from so many words, on average.
MOST_CATEGORIES = 1000
LONG_TEXT = 6

_ID_NAME = re.compile(r"(^|[^a-z])(id|uuid|guid|index|unnamed: 0)([^a-z]|$)", re.IGNORECASE)
_GROUP_NAME = re.compile(
    r"(^|[^a-z])(id|user|customer|client|patient|subject|person|identity|author|speaker|group|session|household|"
    r"document|product|store|station|site)([^a-z]|$)",
    re.IGNORECASE,
)
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}([T ].*)?")
_FILE = re.compile(r"\.(png|tiff?|npy|jpe?g|bmp|webp)$", re.IGNORECASE)
#: Names under which people keep what is to be predicted.
TARGET_NAMES = ("label", "labels", "target", "targets", "class", "y")


@dataclass(frozen=True)
class Guess:
    """What a column is taken for (None: for nothing that was asked for), and why; of words that are lists, what parts
    them."""

    what: str | None
    why: str
    separator: str | None = None


def guess_task(column: Column, text: Column | None = None) -> Guess:
    """The type of a task whose labels stand in `column`; `text` is the column of the texts, where there is one."""
    if column.kind == "empty":
        return Guess(None, "no value")
    if column.kind in ("images", "others"):
        return Guess(None, f"{described(column)}, no labels")
    if len(column.counts) < 2:
        return Guess(None, "one value alone")
    return {"lists": _guess_lists, "numbers": _guess_numbers, "words": _guess_words}[column.kind](column, text)


def _guess_lists(column: Column, text: Column | None) -> Guess:
    if text is not None and text.kind == "lists" and _as_long(column, text):
        return Guess("token_classification", f"lists, each as long as that of {text.name}; {different(column)}")
    if any(not _is_whole(word) for word in column.counts if _is_number(word)):
        return Guess(None, "lists of numbers")
    return Guess("multi_label", f"lists; {different(column)}")


def _as_long(column: Column, text: Column) -> bool:
    both = (column.lengths >= 0) & (text.lengths >= 0)
    return bool(both.any() and (column.lengths[both] == text.lengths[both]).all())


def _guess_numbers(column: Column, text: Column | None) -> Guess:
    number = len(column.counts)
    if column.are_whole and number == 2:
        return Guess("classification", f"two whole numbers, {' and '.join(sorted(column.counts))}")
    if column.are_whole and number <= MOST_CLASSES and column.known >= ROWS_PER_CLASS * number:
        return Guess("classification", f"whole numbers, {different(column)}; as a quantity it is a regression")
    return Guess("regression", f"numbers, {different(column)}")


def _guess_words(column: Column, text: Column | None) -> Guess:
    if text is not None and (separator := _separator_of_words(column, text)):
        both = f"as many values parted by {separator!r} as {text.name} has"
        return Guess("token_classification", both, separator)
    if separator := _separator_of_labels(column):
        listed = column.split(separator)
        return Guess("multi_label", f"values parted by {separator!r}; {_spelt(listed)}", separator)
    if all(_FILE.search(word) for word in column.counts):
        return Guess(None, "paths of files; of masks write a task of type segmentation, of arrays dense_regression")
    if _is_spoilt(column):
        return Guess(None, _stray(column))
    if _is_free(column):
        return Guess(None, f"free text or names, {different(column)} in {column.known:,} rows")
    return Guess("classification", f"words, {_spelt(column)}")


def _spelt(column: Column) -> str:
    pair = other_spelling(column.counts)
    return different(column) + (f", {pair[0]!r} and {pair[1]!r} among them: are they one?" if pair else "")


def _separator_of_labels(column: Column) -> str | None:
    """A character that parts cells into a few values, which the cells share: each stands in two cells on average."""
    for separator in _SEPARATORS:
        cells = [set(split_cell(word, separator)) for word in column.counts]
        several, different_ones = sum(len(cell) > 1 for cell in cells), set().union(*cells)
        share = sum(map(len, cells)) >= 2 * len(different_ones)
        if several >= 2 and share and 2 <= len(different_ones) <= _MOST_LABELS:
            return separator
    return None


def _separator_of_words(column: Column, text: Column) -> str | None:
    """A character that parts each cell of both columns into as many values, of one column into a few different ones."""
    if text.kind != "words":
        return None
    for separator in (*_SEPARATORS, " "):
        tags, words = column.split(separator), text.split(separator)
        long = tags.lengths.sum() > 1.5 * column.known
        if long and len(tags.counts) <= _MOST_LABELS and _as_long(tags, words):
            return separator
    return None


def guess_input(column: Column) -> Guess:
    """Whether a column is a `numeric` or a `categorical` input of a model for tables."""
    if column.kind in ("empty", "images", "others", "lists"):
        return Guess(None, described(column))
    if len(column.counts) < 2:
        return Guess(None, "one value alone")
    if is_id(column):
        return Guess(None, "an id: by its name, or counted through")
    if column.kind == "numbers":
        return Guess("numeric", f"numbers, {different(column)}")
    if all(_DATE.fullmatch(word) for word in column.counts):
        return Guess(None, "dates")
    if _is_spoilt(column):
        return Guess(None, _stray(column))
    if _is_free(column):
        return Guess(None, f"free text or names, {different(column)} in {column.known:,} rows")
    long = column.lengths[column.lengths >= 0].mean() >= LONG_TEXT and len(column.counts) > MOST_CLASSES
    if len(column.counts) > MOST_CATEGORIES or long:
        return Guess(None, f"{'long texts' if long else 'words'}, {different(column)}")
    return Guess("categorical", f"words, {different(column)}")


def group_column(table: InspectedTable, taken: Collection[str]) -> str | None:
    """A column whose name and values say that rows of one value belong together: of one customer, patient, ..."""
    for column in table.columns:
        several = column.kind in ("numbers", "words") and FEW_ROWS / 4 <= len(column.counts) <= 0.9 * column.known
        if several and column.name not in taken and _GROUP_NAME.search(column.name):
            return column.name
    return None


# ---------------------------------------------------------------------------------------------------- small things


def described(column: Column) -> str:
    """What is in a column that is neither of numbers nor of words."""
    return {"empty": "no value", "others": "lists of lists, or objects"}.get(column.kind, column.kind)


def different(column: Column) -> str:
    """How many values it has."""
    return f"{len(column.counts):,} different values"


#: Whole numbers from here on are no longer told apart as floats: account numbers, not quantities.
_NO_QUANTITY = 2**53


def is_id(column: Column) -> bool:
    """Whether it numbers the rows, by its name or by its values."""
    if _ID_NAME.search(column.name):
        return True
    if column.numbers is None or not column.are_whole or column.known < FEW_ROWS:
        return False
    known = column.numbers[~np.isnan(column.numbers)]
    if np.abs(known).max() >= _NO_QUANTITY:
        return True
    return len(column.counts) == column.known == known.max() - known.min() + 1


def _is_free(column: Column) -> bool:
    return len(column.counts) > column.known / 2 and column.known >= FEW_ROWS


def _is_spoilt(column: Column) -> bool:
    """Numbers, but for a few words; a column of a few values is one of words."""
    return bool(column.no_numbers) and len(column.counts) > MOST_CLASSES


def _stray(column: Column) -> str:
    word = min(column.no_numbers, key=column.row_of)
    return f"numbers, but row {column.row_of(word)} holds {shown(word)}; if it means no value, list it in csv.missing"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _is_whole(word: str) -> bool:
    return float(word).is_integer()

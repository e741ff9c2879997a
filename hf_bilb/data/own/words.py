"""How values of a table become words: classes, categories and tags."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

#: What an empty cell is also written as: by JSON, pandas, Python.
MISSING = frozenset({"", "null", "NaN", "nan", "None"})
#: What may be meant as an empty cell, but is a word unless a recipe says so.
PERHAPS_MISSING = frozenset(
    {"?", "NA", "N/A", "n/a", "na", "n.a.", "N.A.", "k.A.", "k. A.", "-", "--", ".", "NULL", "missing", "unknown",
     "#N/A", "#NV", "#DIV/0!", "#VALUE!", "#WERT!"}
)  # fmt: skip
_WHOLE = re.compile(r"([-+]?\d+)\.0*")
#: A number whose fraction stands behind a comma, and whose thousands full stops may part: 0.123 is none.
_WITH_COMMA = re.compile(r"[-+]?((\d+|[1-9]\d{0,2}(\.\d{3})+)(,\d+)?|,\d+)([eE][-+]?\d+)?")
_WITH_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")
_TRUTH = {word: str(word.lower() == "true") for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_LONG = {"y": "yes", "n": "no", "t": "true", "f": "false"}
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d(?::\d\d)?)(?:\.(\d+))?(Z|[-+]\d\d:?\d\d)?")


def word_of(value: Any) -> str:
    """A value as the word that means it in every kind of file: `3` for 3, 3.0, "3" and " 3.0 "; `True` for true and
    "TRUE"; `2024-05-01` for midnight of that day; letters with their accents as one character (NFC)."""
    if isinstance(value, float | Decimal) and math.isfinite(value):
        whole = value == int(value)
        return str(int(value)) if whole else str(value).rstrip("0") if isinstance(value, Decimal) else str(value)
    text = unicodedata.normalize("NFC", str(value).strip())
    whole_number = _WHOLE.fullmatch(text)  # as pandas writes integers where some are missing
    if whole_number is not None:
        return whole_number[1]
    time = _TIME.fullmatch(text)
    return _TRUTH.get(text, text) if time is None else _time_of(*time.groups())


def with_point(text: str) -> str | None:
    """A number of a text with decimal commas as one with a point: `4.1` for `4,1`, `1234.5` for `1.234,5`, `1234` for
    `1.234`, `7` for `7`; None: it is none."""
    return text.replace(".", "").replace(",", ".") if _WITH_COMMA.fullmatch(text) else None


def has_thousands_commas(text: str) -> bool:
    """Whether it is a number whose thousands commas part, or could be one: `1,234.5`, `1,234`."""
    return bool(_WITH_THOUSANDS.fullmatch(text))


def other_spelling(words: Iterable[str]) -> tuple[str, str] | None:
    """Two of the words that differ in case alone, or of which one is short for the other, such as `y` and `Yes`."""
    seen: dict[str, str] = {}
    for word in words:
        plain = word.casefold()
        if (other := seen.setdefault(_LONG.get(plain, plain), word)) != word:
            return other, word
    return None


def _time_of(day: str, time: str, fraction: str | None, zone: str | None) -> str:
    """JSON files give a day as its midnight, and have a `T` before the time."""
    fraction = (fraction or "").rstrip("0")
    if time in ("00:00", "00:00:00") and not fraction and zone is None:
        return day
    return f"{day} {time}{'.' if fraction else ''}{fraction}{zone or ''}"


def in_order(words: Iterable[str]) -> list[str]:
    """Sorted: by their numbers where all of them are numbers, else as text."""
    found = list(words)
    try:
        return sorted(found, key=lambda word: (float(word), word))
    except ValueError:
        return sorted(found)

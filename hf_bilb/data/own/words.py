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
PERHAPS_MISSING = frozenset({"?", "NA", "N/A", "n/a", "na", "#N/A", "-", "--", ".", "NULL", "missing", "unknown"})
_WHOLE = re.compile(r"([-+]?\d+)\.0*")


_TRUTH = {word: str(word.lower() == "true") for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
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

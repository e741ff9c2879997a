"""How values of a table become words: classes, categories and tags."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

#: What an empty cell is also written as: by JSON, pandas, Python.
MISSING = frozenset({"", "null", "NaN", "nan", "None"})
_WHOLE = re.compile(r"([-+]?\d+)\.0*")


def word_of(value: Any) -> str:
    """A value as the word that means it in every kind of file: `3` for 3, 3.0, "3" and " 3.0 "; `True` for true."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)  # as pandas writes integers where some are missing
    return text if whole is None else whole[1]


def in_order(words: Iterable[str]) -> list[str]:
    """Sorted: by their numbers where all of them are numbers, else as text."""
    found = list(words)
    try:
        return sorted(found, key=lambda word: (float(word), word))
    except ValueError:
        return sorted(found)

"""The terminal that is written to."""

from __future__ import annotations

import shutil


def terminal_width() -> int:
    """Columns; 120 where there is no terminal."""
    return shutil.get_terminal_size(fallback=(120, 24)).columns

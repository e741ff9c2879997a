"""Where a benchmark leaves its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_results(folder: Path | None, name: str, page: str, content: Any = None) -> None:
    """Write `<name>.md`, and `<name>.json` where there is `content`; the folder is made. Without a folder: nothing."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    if content is not None:
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""What a run logged while it trained, as it lies in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_bilb.errors import OptionError, one_line

History = Sequence[Mapping[str, Any]]  # trainer.state.log_history

STATE_FILE = "trainer_state.json"


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The Trainer's `log_history` of a run; empty where the folder has no `trainer_state.json`.

    Raises:
        OptionError: one line when the file cannot be read.
    """
    path = run_dir / STATE_FILE
    if not path.is_file():
        return []
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return [dict(entry) for entry in history]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise OptionError(f"{path}: cannot be read: {one_line(error, 200)}") from None

"""How many rows and labels there are, for somebody who starts a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_bilb.data.own.joined import Joined
from hf_bilb.data.splits import PARTS
from hf_bilb.losses.task_types import TaskType


def summary(joined: Joined) -> str:
    """A table of rows and labelled rows of each part, and what was left out; lines of text."""
    totals = [sum(map(len, joined.rows[part])) for part in PARTS]
    rows: list[list[object]] = [["rows", *totals, ""]]
    for name, labels in joined.tasks.items():
        rows.append([name, *(joined.num_labelled(name, part) for part in PARTS), describe(labels.type)])
    lines = _aligned([["", *PARTS, ""], *rows])
    left_out = sum(len(source.split.train) for source in joined.sources) - totals[0]
    if left_out:
        lines.append(f"{left_out:,} training rows have no label of any task and are left out")
    return "\n".join(lines)


def describe(task: TaskType) -> str:
    """`classification, 4 classes`."""
    if task.has_classes:
        return f"{task.type}, {task.size} classes"
    if task.type == "multi_label":
        return f"{task.type}, {task.size} label{'s' if task.size > 1 else ''}"
    what = "channels" if task.items == "pixels" else "numbers"
    numbers = f", {task.size} {what}" if task.size > 1 else ""
    return f"{task.type}{numbers}{f', in {task.unit}' if task.unit else ''}"


def _aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [[f"{cell:,}" if isinstance(cell, int | np.integer) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in (0, len(widths) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]

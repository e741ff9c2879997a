"""The curves of an HTML page: losses and weights of each task over the steps, from a run's folder, thinned.

Plain lists, ready for JSON: a curve is its steps and its values. A step at which nothing was logged for a task is left
out; one at which the value was no finite number stays, as None, and is a gap in the drawing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_bilb.errors import OptionError, one_line
from hf_bilb.reporting.history import read_history
from hf_bilb.reporting.plots import MAX_TASKS_DRAWN

Curve = tuple[list[int], list[float | None]]  # steps, values

#: What is drawn, by the key in the logs.
QUANTITIES = {
    "loss": "training loss",
    "eval_loss": "validation loss",
    "weight": "weight",
    "coefficient": "coefficient of the loss",
}
VECTORS_FILE = "task_vectors.jsonl"
#: Points of a curve: at most, and at the least where a page has very many curves; and of all curves of a page.
MOST_POINTS, FEWEST_POINTS, ALL_POINTS = 300, 30, 600_000
_DIGITS = 4


def read_curves(run_dir: Path, tasks: Sequence[str]) -> dict[str, list[Curve]]:
    """Quantity -> a curve for each of the K tasks, with all its points; quantities without any are left out.

    Raises:
        OptionError: one line when a file of the run cannot be read.
    """
    history, vectors = read_history(run_dir), run_dir / VECTORS_FILE
    # The log itself then holds no more than the extremes of the tasks.
    rows = _read_vectors(vectors) if len(tasks) > MAX_TASKS_DRAWN and vectors.is_file() else None
    found = {}
    for key in QUANTITIES:
        if rows is not None and key != "eval_loss":
            curves = [_curve(_vector_points(rows, key, k)) for k in range(len(tasks))]
        else:
            between = "_" if key == "eval_loss" else "/"
            curves = [_curve(_logged_points(history, f"{key}{between}{task}")) for task in tasks]
        if any(steps for steps, _ in curves):
            found[key] = curves
    return found


def _read_vectors(path: Path) -> list[dict[str, Any]]:
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"{path}: cannot be read: {one_line(error, 200)}") from None


def _logged_points(history: Sequence[Mapping[str, Any]], key: str) -> Iterator[tuple[Any, Any]]:
    return ((entry.get("step"), entry.get(key)) for entry in history)


def _vector_points(rows: Sequence[Mapping[str, Any]], key: str, k: int) -> Iterator[tuple[Any, Any]]:
    for row in rows:
        vector = row.get(key)
        yield row.get("step"), vector[k] if isinstance(vector, list) and k < len(vector) else None


def _curve(points: Iterator[tuple[Any, Any]]) -> Curve:
    known = [(step, value) for step, value in points if _is_number(step) and _is_number(value)]
    known.sort(key=lambda point: point[0])
    return [step for step, _ in known], [_finite(value) for _, value in known]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------- thinning


def points_per_curve(num_curves: int) -> int:
    """How many points each curve of a page may have."""
    return max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(num_curves, 1)))


def thinned(curve: Curve, limit: int) -> Curve:
    """At most `limit` (>= 6) points of a curve, in order: the first and the last one, and of each stretch between them
    the lowest and the highest value, or a value that is no finite number where there is one, so that it can be seen.
    """
    steps, values = curve
    if len(values) <= limit:
        return curve
    stretches, inner = (limit - 2) // 2, len(values) - 2
    chosen = {0, len(values) - 1}
    for i in range(stretches):
        stretch = range(1 + i * inner // stretches, 1 + (i + 1) * inner // stretches)
        chosen |= _extremes(values, stretch)
    kept = sorted(chosen)
    return [steps[i] for i in kept], [values[i] for i in kept]


def _extremes(values: Sequence[float | None], stretch: range) -> set[int]:
    known = [(value, i) for i in stretch if (value := values[i]) is not None]
    gap = next((i for i in stretch if values[i] is None), None)
    if not known:
        return set() if gap is None else {gap}
    return {max(known)[1], min(known)[1] if gap is None else gap}

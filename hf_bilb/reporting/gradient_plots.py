"""The cosines between the tasks' gradients as heat-maps, from the `gradients.jsonl` of `diagnostics.gradients`.

Plain data in, a matplotlib `Figure` out, as in `hf_bilb.reporting.plots`.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hf_bilb.reporting.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

GRADIENTS_FILE, CONFLICTS_FILE = "gradients.jsonl", "gradient_conflicts.png"
MAX_TASKS_WITH_NUMBERS = 12
#: Of a pair that has no cosine, and of the diagonal.
UNKNOWN, DIAGONAL = "#D9D9D9", "#808080"
#: The scale ends here at the least, so that noise is not drawn in full colours.
SMALLEST_SCALE = 0.1
#: In inches and characters; of more tasks the cells become smaller, and not every one is named.
_LARGEST_SIDE, _LONGEST_NAME = 13.0, 24


@dataclass(frozen=True)
class Cosines:
    """The cosines at T looks: `tasks` K, `steps [T]`, `values [T, K, K]`, NaN where a pair has none."""

    tasks: tuple[str, ...]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """`[K, K]`, of each pair over the looks at which both tasks were there."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a pair that was never there
            return np.nanmean(self.values, axis=0)


def read_cosines(path: Path) -> Cosines | None:
    """The looks in `gradients.jsonl`, but for a last line that is not whole; None where there is none, or no file."""
    looks = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            looks.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    looks = [look for look in looks if look["tasks"] == looks[-1]["tasks"]]
    if not looks:
        return None
    values = np.array([look["cosines"] for look in looks], dtype=np.float64)  # null becomes NaN
    return Cosines(tuple(looks[-1]["tasks"]), np.array([look["step"] for look in looks]), values)


def conflicts_figure(cosines: Cosines, title: str) -> Figure | None:
    """Two heat-maps: the mean over the looks, and the last look; None where no pair has a cosine.

    Red is a conflict, blue is agreement; the scale is the same for both, centred at 0, and ends at the largest cosine.
    Numbers stand in the cells of up to 12 tasks. Light grey cells have no cosine, dark grey ones are the diagonal.
    """
    size = len(cosines.tasks)
    off_diagonal = ~np.eye(size, dtype=bool)
    mean, last = (np.where(off_diagonal, values, np.nan) for values in (cosines.mean, cosines.values[-1]))
    known = np.concatenate([mean[np.isfinite(mean)], last[np.isfinite(last)]])
    if not known.size:
        return None
    limit = min(max(math.ceil(10 * np.abs(known).max()) / 10, SMALLEST_SCALE), 1.0)
    cell = 0.62 if size <= MAX_TASKS_WITH_NUMBERS else 0.19
    letter = 0.08 if size <= MAX_TASKS_WITH_NUMBERS else 0.058
    names = letter * min(max(map(len, cosines.tasks)), _LONGEST_NAME) + 0.15
    side = min(max(cell * size, 2.4), _LARGEST_SIDE)
    figure = Figure(figsize=(2 * side + names + 1.4, side + names + 0.75), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    looks = "1 look" if len(cosines.steps) == 1 else f"{len(cosines.steps)} looks"
    _draw_cosines(left, mean, cosines.tasks, limit, f"mean of {looks}")
    image = _draw_cosines(right, last, cosines.tasks, limit, f"step {cosines.steps[-1]}, the last look")
    right.set_yticklabels([])
    bar = figure.colorbar(image, ax=[left, right], shrink=0.8, pad=0.02)
    bar.set_label("cosine (below 0: conflict)")
    return figure


def _draw_cosines(axis: Axes, values: NDArray[np.float64], tasks: Sequence[str], limit: float, title: str) -> AxesImage:
    size = len(tasks)
    few = size <= MAX_TASKS_WITH_NUMBERS
    colours = colormaps["RdBu"].with_extremes(bad=UNKNOWN)
    image = axis.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=-limit, vmax=limit)
    names = [task if len(task) <= _LONGEST_NAME else f"{task[: _LONGEST_NAME - 1]}…" for task in tasks]
    axis.imshow(np.ma.masked_equal(np.eye(size), 0), cmap=ListedColormap([DIAGONAL]))
    named = slice(None, None, math.ceil(size * 0.19 / _LARGEST_SIDE))
    axis.set_xticks(range(size)[named], names[named], rotation=90, fontsize=9 if few else 6.5)
    axis.set_yticks(range(size)[named], names[named], fontsize=9 if few else 6.5)
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=10)
    for side in axis.spines.values():
        side.set_visible(False)
    # White lines between the cells.
    axis.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1 if few else 0.4)
    axis.tick_params(which="minor", length=0)
    for a, b in np.argwhere(np.isfinite(values)) if few else ():
        value = values[a, b]
        colour = "white" if abs(value) > 0.65 * limit else "black"
        axis.text(b, a, _number(value), ha="center", va="center", fontsize=8, color=colour)
    return image


def _number(value: float) -> str:
    """Two decimals, with a true minus; `0.00` without one."""
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def plot_gradients(run_dir: Path | str, title: str) -> Path | None:
    """Write `gradient_conflicts.png` into the folder of a run with `diagnostics.gradients`.

    Args:
        run_dir: the folder, with the run's `gradients.jsonl`.
        title: stands above the plot.

    Returns:
        The file; None where there is nothing to draw: no look, or never two tasks at once.
    """
    cosines = read_cosines(Path(run_dir) / GRADIENTS_FILE)
    figure = None if cosines is None else conflicts_figure(cosines, title)
    return None if figure is None else save_figure(figure, Path(run_dir) / CONFLICTS_FILE)

"""Plots of a run: losses and weights over the steps.

Every `*_figure` function takes plain data and returns a matplotlib `Figure`; nothing touches pyplot's global state, so
they work in any process, with or without a display. Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hf_bilb.reporting.files import save_figure
from hf_bilb.reporting.gradient_plots import plot_gradients
from hf_bilb.reporting.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
LINE_STYLES = ("-", "--", ":", "-.")
GREY = "#666666"
MAX_TASKS_DRAWN = 32  # with more tasks, their distribution is drawn


@dataclass(frozen=True)
class Series:
    """A quantity of K tasks over T steps: `steps [T]`, `values [T, K]`, NaN where a task has no value."""

    tasks: tuple[str, ...]
    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    def __bool__(self) -> bool:
        return self.values.size > 0 and bool(np.isfinite(self.values).any())


def series_from_history(history: History, prefix: str, tasks: Sequence[str]) -> Series:
    """The keys `prefix + task` (`loss/homo`, `eval_loss_homo`) of the Trainer's log, one row per entry with any."""
    entries = [entry for entry in history if any(prefix + task in entry for task in tasks)]
    return _series(entries, tasks, lambda entry, k: entry.get(prefix + tasks[k]))


def series_from_vectors(path: Path, key: str, tasks: Sequence[str]) -> Series:
    """The lists under `key` in `task_vectors.jsonl`."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    entries = [entry for entry in entries if entry.get(key) is not None]
    return _series(entries, tasks, lambda entry, k: entry[key][k])


def _series(
    entries: Sequence[Mapping[str, Any]], tasks: Sequence[str], value_of: Callable[[Mapping[str, Any], int], Any]
) -> Series:
    values = np.full((len(entries), len(tasks)), np.nan)
    for row, entry in enumerate(entries):
        for k in range(len(tasks)):
            value = value_of(entry, k)
            values[row, k] = np.nan if value is None else value
    return Series(tuple(tasks), np.array([entry["step"] for entry in entries], dtype=np.float64), values)


# ---------------------------------------------------------------------------------------------------- losses


def losses_figure(train: Series, validation: Series, title: str) -> Figure:
    """Training and validation loss of each task over the steps, one panel a task, logarithmic, on a common scale.

    With more than `MAX_TASKS_DRAWN` tasks: two panels with the distribution over the tasks.
    """
    if len(train.tasks) > MAX_TASKS_DRAWN:
        panels = [("training loss", train), ("validation loss", validation)]
        return _distribution_figure([(name, series) for name, series in panels if series], title, "loss of a task")
    columns = min(len(train.tasks), 4)
    rows = math.ceil(len(train.tasks) / columns)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.1 * rows + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for k, (axis, task) in enumerate(zip(axes, train.tasks, strict=False)):
        _draw(axis, train, k, color=BLUE, linewidth=1.1, label="training")
        _draw(axis, validation, k, color=VERMILLION, linewidth=1.1, marker="o", markersize=3, label="validation")
        axis.set_title(task, fontsize=10)
    if _positive(train.values, validation.values):
        axes[0].set_yscale("log")
    for axis in axes[len(train.tasks) :]:
        axis.set_visible(False)
    for k in range(len(train.tasks)):
        style_axes(axes[k])
        if k + columns >= len(train.tasks):  # the lowest visible panel of its column
            axes[k].tick_params(labelbottom=True)
            axes[k].set_xlabel("step")
        if k % columns == 0:
            axes[k].set_ylabel("loss")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def _draw(axis: Axes, series: Series, k: int, **style: Any) -> None:
    if series:
        known = np.isfinite(series.values[:, k])
        axis.plot(series.steps[known], series.values[known, k], **style)


# ---------------------------------------------------------------------------------------------------- weights


def weights_figure(weights: Series, coefficients: Series, title: str) -> Figure:
    """The router's weights (where the method has any) and the coefficients dF/dl over the steps, a line a task.

    With more than `MAX_TASKS_DRAWN` tasks: their distribution.
    """
    panels = [("weight", weights), ("coefficient (what a loss is multiplied with)", coefficients)]
    panels = [(name, series) for name, series in panels if series]
    if any(len(series.tasks) > MAX_TASKS_DRAWN for _, series in panels):
        return _distribution_figure(panels, title, "per task")
    figure = Figure(figsize=(6.2 * max(len(panels), 1) + 0.4, 4.8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False).flat
    for axis, (name, series) in zip(axes, panels, strict=False):
        for k, task in enumerate(series.tasks):
            style = LINE_STYLES[k // len(COLOURS) % len(LINE_STYLES)]
            _draw(axis, series, k, color=COLOURS[k % len(COLOURS)], linestyle=style, linewidth=1.5, label=task)
        if _positive(series.values) and np.nanmax(series.values) > 20 * np.nanmin(series.values):
            axis.set_yscale("log")
            plain_numbers(axis.yaxis)
        elif np.nanmin(series.values) < 0:
            axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set_xlabel("step")
        axis.set_ylabel(name)
        style_axes(axis)
        _label_lines(axis, series)
    return figure


def _label_lines(axis: Axes, series: Series) -> None:
    """Write each task's name at the end of its line, moved apart where lines end together."""
    first, last_step = float(series.steps[0]), float(series.steps[-1])
    axis.set_xlim(first, max(last_step, first + 1.0))
    names = dict(enumerate(series.tasks))
    if len(names) > 1 and bool((series.values == series.values[:, :1]).all()):
        names = {0: f"all {len(names)} tasks"}
    last = {k: _last_known(series.values[:, k]) for k in names}
    ends = {k: _height(axis, value) for k, value in last.items() if value is not None}
    few = len(ends) <= 20
    for k, height in spread(ends, gap=0.045 if few else 0.9 / len(ends)).items():
        colour = COLOURS[k % len(COLOURS)]
        axis.annotate(
            names[k],
            xy=(1.0, ends[k]),
            xytext=(1.05, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8.5 if few else 6.5,
            color=colour,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
            annotation_clip=False,
        )


def _height(axis: Axes, value: float) -> float:
    """Where `value` stands on the axis, 0 (bottom) to 1 (top)."""
    low, high = axis.get_ylim()
    if axis.get_yscale() == "log":
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _last_known(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else None


def spread(positions: Mapping[int, float], gap: float) -> dict[int, float]:
    """Move positions apart to at least `gap` (order kept, ties by key), shifting each group about its own middle."""
    order = sorted(positions, key=lambda key: (positions[key], key))
    groups: list[tuple[list[int], float]] = []  # members, middle
    for key in order:
        groups.append(([key], positions[key]))
        while len(groups) > 1:
            (left, left_middle), (right, right_middle) = groups[-2:]
            if right_middle - left_middle >= gap * (len(left) + len(right)) / 2 - 1e-12:
                break
            members = left + right
            groups[-2:] = [(members, sum(positions[m] for m in members) / len(members))]
    return {key: middle + (i - (len(m) - 1) / 2) * gap for m, middle in groups for i, key in enumerate(m)}


# ---------------------------------------------------------------------------------------------------- both levels


def levels_figure(history: History, title: str) -> Figure | None:
    """The router's gradients at both levels and their ratio over the steps, and what the router does; None without
    entries of the lower level's diagnostics (`bilevel/...`, `router/...` in the Trainer's log)."""
    entries = [entry for entry in history if "bilevel/gradient_ratio" in entry]
    if not entries:
        return None
    steps = [entry["step"] for entry in entries]
    gradients = {
        "bilevel/lower_gradient_at_x": ("lower level at x", BLUE, "-"),
        "bilevel/lower_gradient_at_z": ("lower level at z (left out by the single loop)", VERMILLION, "-"),
        "bilevel/upper_gradient": ("upper level (without its factor)", GREEN, "--"),
    }
    others = {
        "bilevel/gradient_ratio": ("gradient at z / gradient at x", BLACK, "-"),
        "router/entropy": ("entropy of the weights / log K", PURPLE, "-"),
        "router/clamped": ("share of clamped weights", ORANGE, ":"),
    }
    figure = Figure(figsize=(12.8, 4.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 2)
    for axis, curves, label in zip(axes, (gradients, others), ("norm of the router's gradient", ""), strict=True):
        for key, (name, colour, style) in curves.items():
            values = [entry[key] for entry in entries]
            axis.plot(steps, values, color=colour, linestyle=style, marker="o", markersize=2.5, label=name)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.legend(fontsize=8, frameon=False)
        style_axes(axis)
    if _positive(np.array([[entry[key] for key in gradients] for entry in entries])):
        axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    return figure


# ---------------------------------------------------------------------------------------------------- many tasks


def _distribution_figure(panels: Sequence[tuple[str, Series]], title: str, label: str) -> Figure:
    """Median, 10-90 % and extremes over the tasks, and the three tasks that end highest by name."""
    figure = Figure(figsize=(6.2 * max(len(panels), 1) + 0.4, 4.8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False).flat
    for axis, (name, series) in zip(axes, panels, strict=False):
        known = np.isfinite(series.values).any(axis=1)
        steps, values = series.steps[known], series.values[known]
        low, tenth, median, ninetieth, high = np.nanquantile(values, [0, 0.1, 0.5, 0.9, 1], axis=1)
        axis.fill_between(steps, low, high, color=SKY, alpha=0.25, linewidth=0, label="lowest to highest task")
        axis.fill_between(steps, tenth, ninetieth, color=SKY, alpha=0.6, linewidth=0, label="10 % to 90 % of the tasks")
        axis.plot(steps, median, color=BLUE, linewidth=1.6, label="median task")
        final = np.array([_last_known(values[:, k]) or -np.inf for k in range(values.shape[1])])
        for k, colour in zip(np.argsort(-final, kind="stable")[:3], (VERMILLION, ORANGE, PURPLE), strict=False):
            _draw(axis, series, int(k), color=colour, linewidth=1, linestyle="--", label=series.tasks[k])
        if _positive(values):
            axis.set_yscale("log")
        axis.set_title(f"{name}, {len(series.tasks)} tasks", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.legend(fontsize=8, frameon=False)
        style_axes(axis)
    return figure


# ---------------------------------------------------------------------------------------------------- axes


def plain_numbers(axis: Axis) -> None:
    """`0.2` instead of `2 x 10^-1` on a logarithmic axis."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(_sparse_label)


def _sparse_label(value: float, _position: float) -> str:
    """Labels 2 and 5 of each decade of a logarithmic axis."""
    leading = value / 10 ** math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:g}" if round(leading, 6) in (2, 5) else ""


def _positive(*arrays: NDArray[np.float64]) -> bool:
    known = np.concatenate([array[np.isfinite(array)] for array in arrays])
    return known.size > 0 and bool((known > 0).all())


def style_axes(axis: Axes) -> None:
    axis.grid(True, which="major", color="#E2E2E2", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


# ---------------------------------------------------------------------------------------------------- files


def plot_run(history: History, tasks: Sequence[str], run_dir: Path, title: str) -> list[Path]:
    """Write `losses.png`, `weights.png` and, of a run with diagnostics, `levels.png` and `gradient_conflicts.png` into
    its folder.

    Args:
        history: `trainer.state.log_history`.
        tasks: the K names; above `MAX_TASKS_DRAWN` the full vectors are read from the folder's `task_vectors.jsonl`.
        run_dir: the run's folder.
        title: stands above the plots.

    Returns:
        The files written; a plot with nothing to show is left out.
    """
    vectors = run_dir / "task_vectors.jsonl"
    many = len(tasks) > MAX_TASKS_DRAWN and vectors.is_file()

    def series(key: str) -> Series:
        return series_from_vectors(vectors, key, tasks) if many else series_from_history(history, f"{key}/", tasks)

    losses, weights, coefficients = series("loss"), series("weight"), series("coefficient")
    written = []
    if losses:
        figure = losses_figure(losses, series_from_history(history, "eval_loss_", tasks), f"{title}: losses")
        written.append(save_figure(figure, run_dir / "losses.png"))
    if weights or coefficients:
        figure = weights_figure(weights, coefficients, f"{title}: weights of the tasks")
        written.append(save_figure(figure, run_dir / "weights.png"))
    levels = levels_figure(history, f"{title}: upper and lower level")
    if levels is not None:
        written.append(save_figure(levels, run_dir / "levels.png"))
    conflicts = plot_gradients(run_dir, f"{title}: gradients of the tasks")
    return written if conflicts is None else [*written, conflicts]

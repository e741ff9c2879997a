"""Plots of a comparison: errors by method or run, and validation Delta_m over wall-clock time.

Plain data in, a matplotlib `Figure` out, as in `hf_bilb.reporting.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from hf_bilb.metrics.delta_m import RELATIONS, delta_m
from hf_bilb.reporting.comparison import Comparison, MetricLine
from hf_bilb.reporting.history import History
from hf_bilb.reporting.plots import COLOURS, GREY, plain_numbers, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"

Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]  # seconds, mean, deviation


# ---------------------------------------------------------------------------------------------------- runs side by side


def runs_figure(comparison: Comparison) -> Canvas:
    """Each run's error relative to the trivial predictor's, a row a metric; left is better, 1 is that predictor.

    Errors as in `error_ratio`; Delta_m, metrics that are not counted, and one of which the trivial predictor has no
    error are left out.
    """
    counted = [line for line in comparison.all_lines if line.about.counted and line.about.key not in RELATIONS]
    lines = [line for line in counted if _shares(line, (line.about.trivial,)) == [1.0]]
    canvas = Canvas(figsize=(7.6, 0.36 * len(lines) + 1.9), layout="constrained")
    axis = canvas.subplots()
    heights = np.arange(len(lines))[::-1]
    for i, name in enumerate(comparison.names):
        shares = [_shares(line, line.values)[i] for line in lines]
        marker = "osD^vP*"[i % 7]
        axis.plot(shares, heights, marker, color=COLOURS[i % len(COLOURS)], markersize=7, label=name, zorder=3)
    for height, line in zip(heights, lines, strict=True):
        shares = [share for share in _shares(line, line.values) if math.isfinite(share)]
        if len(shares) > 1:
            axis.plot([min(shares), max(shares)], [height, height], color="#BBBBBB", linewidth=1.5, zorder=2)
    axis.axvline(1, color=GREY, linewidth=1, linestyle="--", label=comparison.trivial)
    axis.set_xscale("log")
    plain_numbers(axis.xaxis)
    metrics = {line.about.name for line in lines}
    axis.set_yticks(heights, [line.title if len(metrics) == 1 else f"{line.title} {line.about.name}" for line in lines])
    what = metrics.pop() if len(metrics) == 1 and not any(line.about.higher_is_better for line in lines) else "error"
    axis.set_xlabel(f"{comparison.split} {what} relative to the {comparison.trivial} (left is better)")
    style_axes(axis)
    canvas.legend(loc="outside upper center", ncols=min(len(comparison.names) + 1, 5), frameon=False)
    return canvas


def _shares(line: MetricLine, values: Sequence[float | None]) -> list[float]:
    """The errors of `values` relative to the trivial predictor's; NaN where undefined."""
    ratios = [line.ratio(value, line.about.trivial) for value in values]
    return [math.nan if ratio is None else ratio for ratio in ratios]


# ---------------------------------------------------------------------------------------------------- tasks


def tasks_figure(comparison: Comparison) -> Canvas | None:
    """Each metric's error relative to a yardstick, a row a metric, a dot a method with its deviation over seeds.

    The yardstick is the comparison's own single-task models, else the reference, else the published single-task values;
    None without any. Left is better; a value of the yardstick or of a method that allows no ratio leaves its dot out.
    """
    lines = comparison.counted_lines
    yardstick, name = _yardstick(comparison, lines)
    rows = [(line, base) for line, base in zip(lines, yardstick, strict=True) if base is not None]
    if not rows:
        return None
    count = len(comparison.methods)
    row_height = max(0.28, 0.075 * count)
    canvas = Canvas(figsize=(8.2, row_height * len(rows) + 1.7), layout="constrained")
    axis = canvas.subplots()
    heights = np.arange(len(rows))[::-1]
    reach: list[float] = []
    for height in heights[::2]:
        axis.axhspan(height - 0.5, height + 0.5, color="#F4F4F4", zorder=0)
    for i, method in enumerate(comparison.methods):
        ratios = [_ratios(line, base, i) for line, base in rows]
        means, deviations = np.array([_mean(row) for row in ratios]), np.array([_deviation(row) for row in ratios])
        reach += [*(means - np.nan_to_num(deviations)), *(means + np.nan_to_num(deviations))]
        axis.errorbar(
            means,
            heights + 0.32 - 0.64 * (i + 0.5) / count,
            xerr=None if np.isnan(deviations).all() else deviations,
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=5,
            elinewidth=1.2,
            label=method.name,
        )
    axis.axvline(1, color=GREY, linewidth=1, linestyle="--")
    if np.nanmin(reach) > 0 and np.nanmax(reach) > 4 * np.nanmin(reach):
        axis.set_xscale("log")
        plain_numbers(axis.xaxis)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    several = len({line.about.name for line in lines}) > 1
    titles = [f"{line.about.task} {line.about.name}" if several else line.about.task for line, _ in rows]
    axis.set_yticks(heights, titles, fontsize=10 if len(rows) <= 15 else 8)
    axis.set_xlabel(f"{comparison.split} error relative to {name} (left is better{_whiskers(comparison)})")
    style_axes(axis)
    canvas.legend(loc="outside upper center", ncols=min(count, 5), frameon=False)
    return canvas


def _whiskers(comparison: Comparison) -> str:
    return "; bars: deviation over seeds" if any(len(method.seeds) > 1 for method in comparison.methods) else ""


def _yardstick(comparison: Comparison, lines: Sequence[MetricLine]) -> tuple[list[float | None], str]:
    if any(line.single_task for line in lines):
        return [line.base for line in lines], "models of one task each"
    names = [method.name for method in comparison.methods]
    if comparison.reference in names:
        at = names.index(comparison.reference)
        return [line.figures[at].mean for line in lines], f"{comparison.reference}'s mean"
    return [line.base for line in lines], "the single-task values"


def _ratios(line: MetricLine, base: float, i: int) -> list[float]:
    ratios = [line.ratio(value, base) for value in line.figures[i].values.values()]
    return [ratio for ratio in ratios if ratio is not None] if None not in ratios else []


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


# ---------------------------------------------------------------------------------------------------- over time


def progress_figure(comparison: Comparison, histories: Mapping[str, Sequence[History]]) -> Canvas | None:
    """Validation Delta_m over the wall-clock time spent in updates, mean and deviation over the seeds; without a base
    of Delta_m the mean validation loss. None when no run was evaluated while it trained.

    As Figure 3 of MARIGOLD (Chen et al., "Feed m Birds with One Scone").

    Args:
        comparison: says what Delta_m is over.
        histories: label -> `log_history` of each of its runs; entries of evaluations with `training_seconds` count.
    """
    based = comparison.based_lines
    every = [history for of_label in histories.values() for history in of_label]
    with_delta = bool(based) and any(_delta_of(entry, based) is not None for history in every for entry in history)
    curves: dict[str, Curve] = {}
    for label, of_label in histories.items():
        curve = _curve([_points(history, based if with_delta else ()) for history in of_label])
        if curve is not None:
            curves[label] = curve
    if not curves:
        return None
    canvas = Canvas(figsize=(7.6, 4.8), layout="constrained")
    axis = canvas.subplots()
    longest = max(float(seconds[-1]) for seconds, _, _ in curves.values())
    unit, size = ("s", 1.0) if longest < 600 else ("min", 60.0) if longest < 36_000 else ("h", 3600.0)
    for i, (label, (seconds, mean, deviation)) in enumerate(curves.items()):
        colour, times = COLOURS[i % len(COLOURS)], seconds / size
        marker = MARKERS[i % len(MARKERS)] if len(times) <= 30 else ""
        axis.plot(times, mean, color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)
        if deviation is not None:
            axis.fill_between(times, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
    _scale(axis, np.concatenate([mean for _, mean, _ in curves.values()]))
    axis.set_xlim(left=0)
    axis.set_xlabel(f"wall-clock time in updates ({unit})")
    what = "$\\Delta_m$ (%)" if with_delta else "loss (mean of tasks)"
    axis.set_ylabel(f"validation {what}, lower is better")
    banded = any(deviation is not None for _, _, deviation in curves.values())
    axis.set_title("mean over seeds, band: deviation" if banded else "", fontsize=10)
    axis.legend(frameon=False)
    style_axes(axis)
    return canvas


def _delta_of(entry: Mapping[str, Any], based: Sequence[MetricLine]) -> float | None:
    """Delta_m of the validation metrics in a log entry; None unless all of them are there."""
    values = [entry.get(f"eval_{line.about.key}") for line in based]
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return None
    base = [line.base for line in based if line.base is not None]
    return float(delta_m(known, base, [line.about.higher_is_better for line in based]))


def _points(history: History, based: Sequence[MetricLine]) -> list[tuple[float, float]]:
    """Seconds and value of each evaluation; NaN where it has no finite value."""
    points = []
    for entry in history:
        if "eval_loss" in entry and "training_seconds" in entry:
            value = _delta_of(entry, based) if based else entry["eval_loss"]
            points.append((float(entry["training_seconds"]), math.nan if value is None else float(value)))
    return points


def _curve(runs: Sequence[Sequence[tuple[float, float]]]) -> Curve | None:
    """The runs' evaluations one by one, up to the shortest run's last."""
    length = min((len(points) for points in runs), default=0)
    if length == 0:
        return None
    stacked = np.array([points[:length] for points in runs], dtype=np.float64)  # [runs, evaluations, 2]
    if not np.isfinite(stacked[..., 1]).any():
        return None
    means = stacked.mean(axis=0)
    deviation = stacked[..., 1].std(axis=0, ddof=1) if len(runs) > 1 else None
    return means[:, 0], means[:, 1], deviation


def _scale(axis: Axes, values: NDArray[np.float64]) -> None:
    """A logarithmic axis for values over a wide range, so that an untrained model does not press the rest flat."""
    known = values[np.isfinite(values)]
    if known.min() > 0 and known.max() > 10 * known.min():
        axis.set_yscale("log")
        plain_numbers(axis.yaxis)
    elif known.min() <= 0 and known.max() > 200:
        axis.set_yscale("symlog", linthresh=10)
        axis.yaxis.set_major_formatter("{x:g}")

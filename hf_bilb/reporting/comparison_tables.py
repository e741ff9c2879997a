"""A comparison's tables like the papers': Markdown, CSV, LaTeX, JSON and the terminal.

Two tables: the metrics with mean rank and Delta_m, and the methods in relation to the reference. Next to the best value
of a metric, the ones that the seeds do not tell apart from it carry a tilde.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from hf_bilb.metrics.delta_m import DELTA_M
from hf_bilb.reporting.comparison import Comparison, Method, MetricLine
from hf_bilb.reporting.grid import Cell, Column, Grid, exact, number, plain_grid
from hf_bilb.reporting.results import MetricResult
from hf_bilb.reporting.statistics import Difference, Figure

MAX_METRICS_ACROSS = 12  # with more, the metrics go down and the methods across
FORMAT = 1


def with_deviation(figure: Figure | None) -> str:
    """`60.58 ± 1.30`: the mean to four digits, the deviation to the same decimals; `-` where there is no mean."""
    mean = None if figure is None else figure.mean
    if figure is None or mean is None:
        return "-"
    text = number(mean)
    if figure.deviation is None:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {figure.deviation:.1e}" if "e" in text else f"{text} ± {figure.deviation:.{decimals}f}"


def percent(figure: Figure | None) -> str:
    """`49.50 ± 1.32`, two decimals as in the papers."""
    mean = None if figure is None else figure.mean
    if figure is None or mean is None:
        return "-"
    return f"{mean:.2f}" if figure.deviation is None else f"{mean:.2f} ± {figure.deviation:.2f}"


# ---------------------------------------------------------------------------------------------------- the two tables


def grids(comparison: Comparison, across: int = MAX_METRICS_ACROSS) -> tuple[Grid, ...]:
    """The metrics, and the relation to the reference; without a reference the first alone. `across`: at most so many
    metrics are columns."""
    return (
        metrics_grid(comparison, across),
        *((relation_grid(comparison),) if comparison.reference is not None else ()),
    )


def metrics_grid(comparison: Comparison, across: int) -> Grid:
    """A row a method and a column a metric, mean rank and Delta_m last; the other way round with many metrics."""
    lines = [*comparison.lines, *comparison.overall]
    columns = [(_heading(line, comparison), _metric_cells(line)) for line in lines]
    columns.append(("MR ↓", [Cell(""), *_best_low([method.mean_rank for method in comparison.methods])]))
    if comparison.based_lines:
        columns.append(("Δm % ↓", [Cell(""), *_cells(_delta_line(comparison), percent)]))
    single = any(line.base is not None for line in comparison.lines)
    names = [*(["single task"] if single else []), *(method.name for method in comparison.methods)]
    skipped = 0 if single else 1
    metric = {line.about.name for line in comparison.lines}
    caption = f"{comparison.split} {metric.pop() if len(metric) == 1 else 'metrics'} of {comparison.recipe}"
    if len(lines) <= across:
        body = [(Cell(n), *(cells[i + skipped] for _, cells in columns)) for i, n in enumerate(names)]
        return Grid(_columns(["method", *(heading for heading, _ in columns)]), tuple(body), caption=caption)
    body = [(Cell(heading), *cells[skipped:]) for heading, cells in columns]
    return Grid(_columns(["metric", *names]), tuple(body), caption=caption)


def _columns(headings: Sequence[str]) -> tuple[Column, ...]:
    first, *others = headings
    return (
        Column(first, left=True, marked=True),
        *(Column(heading, marked=True, marked_heading=True) for heading in others),
    )


def _heading(line: MetricLine, comparison: Comparison) -> str:
    about, names = line.about, {other.about.name for other in comparison.lines}
    words = [about.task or "all tasks", *([about.name] if len(names) > 1 or not about.task else [])]
    unit = f" ({about.unit})" if about.unit else ""
    return f"{' '.join(words)}{unit} {'↑' if about.higher_is_better else '↓'}"


def _metric_cells(line: MetricLine) -> list[Cell]:
    """The single-task value first, then the methods."""
    single = with_deviation(line.single_task) if line.single_task else number(line.base)
    return [Cell(single), *_cells(line, with_deviation)]


def _cells(line: MetricLine, text: Callable[[Figure], str]) -> list[Cell]:
    several = len(line.figures) > 1
    return [
        Cell(text(figure), several and i in line.best, several and i in line.near_best)
        for i, figure in enumerate(line.figures)
    ]


def _delta_line(comparison: Comparison) -> MetricLine:
    about = MetricResult(DELTA_M, "", "Delta_m", "%", higher_is_better=False, value=None, trivial=None)
    return MetricLine(about, tuple(method.delta_m or Figure({}) for method in comparison.methods))


def _best_low(values: Sequence[float | None]) -> list[Cell]:
    known = [value for value in values if value is not None]
    several = len(values) > 1
    return [
        Cell("-" if value is None else f"{value:.2f}", several and value is not None and value == min(known))
        for value in values
    ]


def relation_grid(comparison: Comparison) -> Grid:
    """A row a method: how it stands to the reference, whether the seeds can tell, what it costs."""
    name = comparison.reference
    based, grouped = bool(comparison.based_lines), comparison.has_groups
    header = ["method", "seeds"]
    header += ["Δm % grouped ↓"] if grouped else []
    header += [f"Δm % - {name}'s (95 %)"] if based else []
    header += [f"error / {name}'s ↓", f"against {name}", f"worst task / {name}'s", "step time", "memory"]
    steps = comparison.ratio_to_reference(lambda method: method.step_seconds)
    memory = comparison.ratio_to_reference(lambda method: method.peak_memory_bytes)
    body = []
    for i, method in enumerate(comparison.methods):
        cells = [method.name, str(len(method.seeds))]
        cells += [percent(method.grouped_delta_m)] if grouped else []
        cells += [_difference_text(method.difference)] if based else []
        error = None if method.error_ratio is None else method.error_ratio.mean
        worst = "" if method.name == name else f"{number(method.worst[0])} ({method.worst[1]})" if method.worst else "-"
        cells += [number(error), verdict(comparison, method), worst, _times(steps[i]), _times(memory[i])]
        body.append(tuple(Cell(text) for text in cells))
    return Grid(_columns(header), tuple(body), caption=f"In relation to {name}")


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _difference_text(difference: Difference | None) -> str:
    if difference is None:
        return ""
    width = "" if difference.half_width is None else f" ± {difference.half_width:.2f}"
    return f"{difference.mean:+.2f}{width}"


def verdict(comparison: Comparison, method: Method) -> str:
    """`better`, `worse`, `within the seeds' spread`, or why it cannot be told."""
    if method.name == comparison.reference:
        return ""
    difference = method.difference
    if difference is None:
        return "cannot be told"
    if difference.within_spread is None:
        return "one seed: cannot be told"
    return "within the seeds' spread" if difference.within_spread else "better" if difference.mean < 0 else "worse"


# ---------------------------------------------------------------------------------------------------- renderings


def comparison_markdown(comparison: Comparison) -> str:
    """Both tables and the notes; the best values are bold."""
    title = f"# {comparison.recipe}: {', '.join(comparison.names)}\n"
    tables = [f"{grid.caption}\n\n{grid.to_markdown()}" for grid in grids(comparison)]
    return "\n".join([title, *tables, "".join(f"* {note}\n" for note in comparison.notes)])


def comparison_text(comparison: Comparison) -> str:
    """The same for a terminal: a line a metric."""
    tables = [f"{grid.caption}:\n\n{grid.to_text()}" for grid in grids(comparison, across=0)]
    return "\n".join([*tables, "".join(f"Note: {note}.\n" for note in comparison.notes)])


def comparison_latex(comparison: Comparison) -> str:
    """Two `table` environments for the package booktabs; the notes stand above them as comments."""
    head = ["% needs \\usepackage{booktabs}\n", *(f"% {note}\n" for note in comparison.notes)]
    return "".join([*head, *(f"\n{grid.to_latex()}" for grid in grids(comparison))])


def comparison_csv(comparison: Comparison) -> str:
    """Full precision, one line per method and figure: every metric, then what stands in the tables next to them."""
    headings = ["method", "task", "metric", "unit", "better", "seeds", "mean", "deviation", "mark"]
    rows = [row for line in (*comparison.lines, *comparison.overall) for row in _metric_rows(comparison, line)]
    for method in comparison.methods:
        for name, unit, mean, deviation, remark in _summary(comparison, method):
            seeds = str(len(method.seeds))
            rows.append([method.name, "", name, unit, "lower", seeds, exact(mean), exact(deviation), remark])
    return plain_grid(headings, rows).to_csv()


def _metric_rows(comparison: Comparison, line: MetricLine) -> Iterator[list[str]]:
    about = line.about
    known = [about.task, about.name, about.unit, "higher" if about.higher_is_better else "lower"]
    if line.base is not None:
        single = line.single_task or Figure({})
        yield ["single task", *known, str(len(single.values)), exact(line.base), exact(single.deviation), ""]
    for i, (name, figure) in enumerate(zip(comparison.names, line.figures, strict=True)):
        mark = "best" if i in line.best else "within the spread of the best" if i in line.near_best else ""
        yield [name, *known, str(len(figure.values)), exact(figure.mean), exact(figure.deviation), mark]


def _summary(comparison: Comparison, method: Method) -> list[tuple[str, str, float | None, float | None, str]]:
    """Name, unit, mean, deviation, remark of every figure over all tasks and of the costs."""
    figures = {
        "Delta_m": ("%", method.delta_m),
        "Delta_m grouped": ("%", method.grouped_delta_m),
        f"error / {comparison.reference}": ("", method.error_ratio),
        "step time": ("s", method.step_seconds),
        "peak memory": ("bytes", method.peak_memory_bytes),
    }
    lines: list[tuple[str, str, float | None, float | None, str]] = [("mean rank", "", method.mean_rank, None, "")]
    for name, (unit, figure) in figures.items():
        if figure is not None:
            lines.append((name, unit, figure.mean, figure.deviation, ""))
    if method.difference is not None:
        name, unit = ("Delta_m", "%") if comparison.based_lines else ("log error", "")
        what = f"{name} - {comparison.reference}'s (deviation: half of the 95 % interval)"
        difference = method.difference
        lines.append((what, unit, difference.mean, difference.half_width, verdict(comparison, method)))
    if method.worst is not None:
        lines.append((f"worst error / {comparison.reference}", "", method.worst[0], None, method.worst[1]))
    return lines


def comparison_json(comparison: Comparison) -> str:
    """Every figure with its seeds, to go on computing with; strict JSON."""
    values = {
        "format": FORMAT,
        "recipe": comparison.recipe,
        "split": comparison.split,
        "reference": comparison.reference,
        "base_of_delta_m": comparison.base_source or None,
        "methods": [_method_json(comparison, method) for method in comparison.methods],
        "metrics": [_line_json(comparison, line) for line in (*comparison.lines, *comparison.overall)],
        "notes": list(comparison.notes),
    }
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _method_json(comparison: Comparison, method: Method) -> dict[str, Any]:
    figures = ("delta_m", "grouped_delta_m", "error_ratio", "step_seconds", "peak_memory_bytes")
    return {
        "name": method.name,
        "seeds": list(method.seeds),
        "mean_rank": method.mean_rank,
        **{name: _figure_json(getattr(method, name)) for name in figures},
        "difference_to_reference": None if method.difference is None else asdict(method.difference),
        "told_from_reference": verdict(comparison, method) or None,
        "worst": None if method.worst is None else {"error_ratio": method.worst[0], "task": method.worst[1]},
    }


def _line_json(comparison: Comparison, line: MetricLine) -> dict[str, Any]:
    about = {key: getattr(line.about, key) for key in ("key", "task", "name", "unit", "higher_is_better", "group")}
    return {
        **about,
        "base": line.base,
        "single_task": _figure_json(line.single_task),
        "methods": {m.name: _figure_json(f) for m, f in zip(comparison.methods, line.figures, strict=True)},
        "best": [comparison.methods[i].name for i in line.best],
        "within_spread_of_best": [comparison.methods[i].name for i in line.near_best],
    }


def _figure_json(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    values = {str(seed): value for seed, value in figure.values.items()}
    return {"mean": figure.mean, "deviation": figure.deviation, "values": values}

"""A study's tables like the papers': Markdown, CSV, LaTeX (booktabs), JSON and the terminal.

Two tables: the metrics with mean rank and Delta_m, and the methods in relation to the reference. Beside the best value
of a metric, the ones that the seeds do not tell apart from it carry a tilde.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_bilb.metrics.delta_m import DELTA_M
from hf_bilb.reporting.results import MetricResult
from hf_bilb.reporting.study import Difference, Figure, Method, MetricLine, Study
from hf_bilb.reporting.tables import markdown_row, number

MAX_METRICS_ACROSS = 12  # with more, the metrics go down and the methods across
FORMAT = 1
NEAR = "~"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and whether it is the best of its metric or, as far as the seeds tell, as good."""

    text: str
    best: bool = False
    near: bool = False


@dataclass(frozen=True)
class Grid:
    """A table: `caption`, `header [C]` and `body [R][C]`; the first column is left-aligned."""

    caption: str
    header: tuple[str, ...]
    body: tuple[tuple[Cell, ...], ...]


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


def grids(study: Study, across: int = MAX_METRICS_ACROSS) -> tuple[Grid, ...]:
    """The metrics, and the relation to the reference; without a reference the first alone. `across`: at most so many
    metrics are columns."""
    return (metrics_grid(study, across), *((relation_grid(study),) if study.reference is not None else ()))


def metrics_grid(study: Study, across: int) -> Grid:
    """A row a method and a column a metric, mean rank and Delta_m last; the other way round with many metrics."""
    lines = [*study.lines, *study.overall]
    columns = [(_heading(line, study), _metric_cells(line)) for line in lines]
    columns.append(("MR ↓", [Cell(""), *_best_low([method.mean_rank for method in study.methods])]))
    if study.based_lines:
        columns.append(("Δm % ↓", [Cell(""), *_cells(_delta_line(study), percent)]))
    single = any(line.base is not None for line in study.lines)
    names = [*(["single task"] if single else []), *(method.name for method in study.methods)]
    skipped = 0 if single else 1
    metric = {line.about.name for line in study.lines}
    caption = f"{study.split} {metric.pop() if len(metric) == 1 else 'metrics'} of {study.recipe}"
    if len(lines) <= across:
        body = [(Cell(n), *(cells[i + skipped] for _, cells in columns)) for i, n in enumerate(names)]
        return Grid(caption, ("method", *(heading for heading, _ in columns)), tuple(body))
    return Grid(caption, ("metric", *names), tuple((Cell(h), *cells[skipped:]) for h, cells in columns))


def _heading(line: MetricLine, study: Study) -> str:
    about, names = line.about, {other.about.name for other in study.lines}
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


def _delta_line(study: Study) -> MetricLine:
    about = MetricResult(DELTA_M, "", "Delta_m", "%", higher_is_better=False, value=None, trivial=None)
    return MetricLine(about, tuple(method.delta_m or Figure({}) for method in study.methods))


def _best_low(values: Sequence[float | None]) -> list[Cell]:
    known = [value for value in values if value is not None]
    several = len(values) > 1
    return [
        Cell("-" if value is None else f"{value:.2f}", several and value is not None and value == min(known))
        for value in values
    ]


def relation_grid(study: Study) -> Grid:
    """A row a method: how it stands to the reference, whether the seeds can tell, what it costs."""
    name = study.reference
    based, grouped = bool(study.based_lines), has_groups(study)
    header = ["method", "seeds"]
    header += ["Δm % grouped ↓"] if grouped else []
    header += [f"Δm % - {name}'s (95 %)"] if based else []
    header += [f"error / {name}'s ↓", f"against {name}", f"worst task / {name}'s", "step time", "memory"]
    steps = study.ratio_to_reference(lambda method: method.step_seconds)
    memory = study.ratio_to_reference(lambda method: method.peak_memory_bytes)
    body = []
    for i, method in enumerate(study.methods):
        cells = [method.name, str(len(method.seeds))]
        cells += [percent(method.grouped_delta_m)] if grouped else []
        cells += [_difference_text(method.difference)] if based else []
        error = None if method.error_ratio is None else method.error_ratio.mean
        worst = "" if method.name == name else f"{number(method.worst[0])} ({method.worst[1]})" if method.worst else "-"
        cells += [number(error), verdict(study, method), worst, _times(steps[i]), _times(memory[i])]
        body.append(tuple(Cell(text) for text in cells))
    return Grid(f"In relation to {name}", tuple(header), tuple(body))


def has_groups(study: Study) -> bool:
    """Whether the grouped Delta_m is another figure than Delta_m."""
    lines = study.based_lines
    return len({line.about.group or line.about.task for line in lines}) < len(lines)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _difference_text(difference: Difference | None) -> str:
    if difference is None:
        return ""
    width = "" if difference.half_width is None else f" ± {difference.half_width:.2f}"
    return f"{difference.mean:+.2f}{width}"


def verdict(study: Study, method: Method) -> str:
    """`better`, `worse`, `within the seeds' spread`, or why it cannot be told."""
    if method.name == study.reference:
        return ""
    difference = method.difference
    if difference is None:
        return "cannot be told"
    if difference.within_spread is None:
        return "one seed: cannot be told"
    return "within the seeds' spread" if difference.within_spread else "better" if difference.mean < 0 else "worse"


# ---------------------------------------------------------------------------------------------------- renderings


def render_study_markdown(study: Study) -> str:
    """Both tables and the notes; the best values are bold."""
    parts = [f"# {study.recipe}: {', '.join(method.name for method in study.methods)}\n"]
    for grid in grids(study):
        lines = [list(grid.header), ["---"] + ["---:"] * (len(grid.header) - 1)]
        lines += [[f"**{c.text}**" if c.best else c.text + (NEAR if c.near else "") for c in row] for row in grid.body]
        rows = (markdown_row([cell.replace("~", "\\~") for cell in line]) for line in lines)
        parts.append(f"{grid.caption}\n\n" + "\n".join(rows) + "\n")
    parts.append("".join(f"* {note}\n" for note in study.notes))
    return "\n".join(parts)


def render_study_text(study: Study) -> str:
    """The same for a terminal: columns aligned, the best values with a `*`, a line a metric."""
    parts = []
    for grid in grids(study, across=0):
        lines = [[grid.header[0], *(f"{heading} " for heading in grid.header[1:])]]
        lines += [[c.text + ("*" if c.best else NEAR if c.near else " ") for c in row] for row in grid.body]
        widths = [max(len(line[c]) for line in lines) for c in range(len(grid.header))]
        rows = [
            "  ".join(
                cell.rjust(w) if c else cell.ljust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        parts.append("\n".join([f"{grid.caption}:", "", rows[0], "-" * len(rows[0]), *(r.rstrip() for r in rows[1:])]))
    notes = "".join(f"Note: {note}.\n" for note in study.notes)
    return "\n\n".join(parts) + "\n\n" + notes


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"$\sim$", "^": r"\textasciicircum{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "Δm": r"$\Delta_m$", "Delta_m": r"$\Delta_m$",
}  # fmt: skip


def latex(text: str) -> str:
    """`text` with what LaTeX takes for commands escaped, and the signs of the tables as mathematics."""
    result, at = [], 0
    while at < len(text):
        key = next(key for key in ("Delta_m", "Δm", text[at]) if text.startswith(key, at))
        result.append(_LATEX.get(key, key))
        at += len(key)
    return "".join(result)


def render_study_latex(study: Study) -> str:
    """Two `table` environments for the package booktabs; the notes stand in the last one's caption and as comments."""
    parts = ["% needs \\usepackage{booktabs}\n", *(f"% {note}\n" for note in study.notes)]
    for grid in grids(study):
        body = [
            " & ".join(
                rf"\textbf{{{latex(c.text)}}}" if c.best else latex(c.text) + (r"$^{\sim}$" if c.near else "")
                for c in row
            )
            for row in grid.body
        ]
        lines = [
            r"\begin{table}[t]", r"\centering", r"\small", rf"\caption{{{latex(grid.caption)}.}}",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.header) - 1)}}}", r"\toprule",
            " & ".join(latex(cell) for cell in grid.header) + r" \\", r"\midrule",
            *(line + r" \\" for line in body), r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ]  # fmt: skip
        parts.append("\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def render_study_csv(study: Study) -> str:
    """Full precision, one line per method and figure: every metric, then what stands in the tables beside them."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "task", "metric", "unit", "better", "seeds", "mean", "deviation", "mark"])
    for line in (*study.lines, *study.overall):
        about, better = line.about, "higher" if line.about.higher_is_better else "lower"
        if line.base is not None:
            single = line.single_task or Figure({})
            row = ["single task", about.task, about.name, about.unit, better, len(single.values), line.base]
            writer.writerow([*row, _exact(single.deviation), ""])
        for i, (method, figure) in enumerate(zip(study.methods, line.figures, strict=True)):
            mark = "best" if i in line.best else "within the spread of the best" if i in line.near_best else ""
            row = [method.name, about.task, about.name, about.unit, better, len(figure.values), _exact(figure.mean)]
            writer.writerow([*row, _exact(figure.deviation), mark])
    for method in study.methods:
        for name, unit, mean, deviation, remark in _summary(study, method):
            row = [method.name, "", name, unit, "lower", len(method.seeds), _exact(mean), _exact(deviation), remark]
            writer.writerow(row)
    return file.getvalue()


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def _summary(study: Study, method: Method) -> list[tuple[str, str, float | None, float | None, str]]:
    """Name, unit, mean, deviation, remark of every figure over all tasks and of the costs."""
    figures = {
        "Delta_m": ("%", method.delta_m),
        "Delta_m grouped": ("%", method.grouped_delta_m),
        f"error / {study.reference}": ("", method.error_ratio),
        "step time": ("s", method.step_seconds),
        "peak memory": ("bytes", method.peak_memory_bytes),
    }
    lines: list[tuple[str, str, float | None, float | None, str]] = [("mean rank", "", method.mean_rank, None, "")]
    for name, (unit, figure) in figures.items():
        if figure is not None:
            lines.append((name, unit, figure.mean, figure.deviation, ""))
    if method.difference is not None:
        name = "Delta_m" if study.based_lines else "log error"
        difference = method.difference
        lines.append(
            (f"{name} - {study.reference}'s (deviation: half of the 95 % interval)", "%" if study.based_lines else "",
             difference.mean, difference.half_width, verdict(study, method))
        )  # fmt: skip
    if method.worst is not None:
        lines.append((f"worst error / {study.reference}", "", method.worst[0], None, method.worst[1]))
    return lines


def render_study_json(study: Study) -> str:
    """Every figure with its seeds, to go on computing with; strict JSON."""
    values = {
        "format": FORMAT,
        "recipe": study.recipe,
        "split": study.split,
        "reference": study.reference,
        "base_of_delta_m": study.base_source or None,
        "methods": [_method_json(study, method) for method in study.methods],
        "metrics": [_line_json(study, line) for line in (*study.lines, *study.overall)],
        "notes": list(study.notes),
    }
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _method_json(study: Study, method: Method) -> dict[str, Any]:
    figures = ("delta_m", "grouped_delta_m", "error_ratio", "step_seconds", "peak_memory_bytes")
    return {
        "name": method.name,
        "seeds": list(method.seeds),
        "mean_rank": method.mean_rank,
        **{name: _figure_json(getattr(method, name)) for name in figures},
        "difference_to_reference": None if method.difference is None else asdict(method.difference),
        "told_from_reference": verdict(study, method) or None,
        "worst": None if method.worst is None else {"error_ratio": method.worst[0], "task": method.worst[1]},
    }


def _line_json(study: Study, line: MetricLine) -> dict[str, Any]:
    about = {key: getattr(line.about, key) for key in ("key", "task", "name", "unit", "higher_is_better", "group")}
    return {
        **about,
        "base": line.base,
        "single_task": _figure_json(line.single_task),
        "methods": {m.name: _figure_json(f) for m, f in zip(study.methods, line.figures, strict=True)},
        "best": [study.methods[i].name for i in line.best],
        "within_spread_of_best": [study.methods[i].name for i in line.near_best],
    }


def _figure_json(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    values = {str(seed): value for seed, value in figure.values.items()}
    return {"mean": figure.mean, "deviation": figure.deviation, "values": values}

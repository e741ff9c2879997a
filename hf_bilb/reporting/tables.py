"""The table of a run's metrics, and of several runs side by side: for the terminal, as Markdown and as CSV.

Runs are related by their errors, so that a ratio below 1 is better whichever way a metric points: the error is the
value itself (MAE), or what is missing to the metric's ideal value (1 - accuracy).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_bilb.errors import OptionError
from hf_bilb.metrics.delta_m import DELTA_M, RELATIONS
from hf_bilb.reporting.results import MetricResult, RunResults


@dataclass(frozen=True)
class Row:
    """One metric in all R runs. `values`, `ratios` and `beats_trivial` have one entry per run.

    `task`: empty for a figure over all tasks, which is no part of the summary. `ratios`: error relative to the first
    run, below 1 is better whichever way the metric points; None where undefined. `ideal`: see `error_ratio`. `counted`:
    see `MetricResult`; a row that is not counted is no part of the summary either.
    """

    task: str
    metric: str
    unit: str
    higher_is_better: bool
    values: tuple[float | None, ...]
    trivial: float | None
    ratios: tuple[float | None, ...]
    beats_trivial: tuple[bool, ...]
    ideal: float | None = None
    key: str = ""
    counted: bool = True

    @property
    def title(self) -> str:
        """The task's name, for a reader."""
        return self.task or "all tasks"

    @property
    def best(self) -> tuple[int, ...]:
        """The runs with the best value."""
        known = [value for value in self.values if value is not None]
        if not known:
            return ()
        top = max(known) if self.higher_is_better else min(known)
        return tuple(i for i, value in enumerate(self.values) if value == top)


@dataclass(frozen=True)
class Comparison:
    """R runs (`names`) side by side, one `Row` per metric in the data set's order, measured on `split`.

    `notes`: what a reader has to know before believing a ratio, a line each. `trivial`: name of the predictor that sees
    no input.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    split: str
    notes: tuple[str, ...] = ()
    trivial: str = "mean predictor"

    def geometric_means(self) -> list[float | None]:
        """Per run, the geometric mean over the tasks of its ratio to the first run; None when a ratio is undefined.

        A task with several metrics counts once, with their geometric mean.
        """
        rows = self._counted()
        tasks = list(dict.fromkeys(row.task for row in rows))
        return [
            geometric_mean([geometric_mean([row.ratios[i] for row in rows if row.task == task]) for task in tasks])
            for i in range(len(self.names))
        ]

    def worst_ratios(self) -> list[tuple[float, str] | None]:
        """Per run, the largest ratio to the first run and its task; None when a ratio is undefined."""
        worst: list[tuple[float, str] | None] = []
        rows = self._counted()
        for i in range(len(self.names)):
            ratios = [(ratio, row.task) for row in rows if (ratio := row.ratios[i]) is not None]
            worst.append(max(ratios) if rows and len(ratios) == len(rows) else None)
        return worst

    def _counted(self) -> list[Row]:
        return [row for row in self.rows if row.task and row.counted]


def compare(runs: Sequence[RunResults], names: Sequence[str]) -> Comparison:
    """Put the runs' metrics side by side; the first run is what the others are related to.

    Raises:
        OptionError: when they were measured on another part of the data, metrics or units: ratios would mean nothing.
    """
    first = runs[0]
    notes: list[str] = []
    for run, name in zip(runs[1:], names[1:], strict=True):
        _check_comparable(first, run, names[0], name)
        pairs = zip(first.metrics, run.metrics, strict=True)
        if odd := next((pair for pair in pairs if not _same_trivial(*pair)), None):
            ours, theirs = (number(metric.trivial) for metric in odd)
            notes.append(
                f"{name} and {names[0]} did not see the same rows: the {first.trivial_predictor}'s {odd[0].key} is "
                f"{theirs} and {ours}"
            )
    rows = tuple(_row([run.metrics[i] for run in runs]) for i in range(len(first.metrics)))
    notes += _about_delta_m(runs)
    if len(runs) > 1 and any(row.ideal is not None for row in rows):
        notes.append("ratios are those of the errors, which for scores are what is missing to a perfect one")
    return Comparison(tuple(names), rows, first.split, tuple(notes), first.trivial_predictor)


def _about_delta_m(runs: Sequence[RunResults]) -> list[str]:
    """What Delta_m relates to, and how long the models were trained that it is said of."""
    first = runs[0]
    if not first.base_source or all(metric.key != DELTA_M for metric in first.metrics):
        return []
    epochs = dict.fromkeys(run.training.get("epochs") for run in runs)
    known = ", ".join(f"{value:g}" for value in epochs if value is not None)
    trained = f"; {'these runs' if len(runs) > 1 else 'this run'} trained {known} epochs" if known else ""
    return [f"Delta_m relates to {first.base_source}{trained}"]


def _check_comparable(first: RunResults, run: RunResults, first_name: str, name: str) -> None:
    if run.split != first.split:
        raise OptionError(f"{name} was measured on {run.split}, {first_name} on {first.split}: they cannot be compared")
    keys, first_keys = ([(m.key, m.unit) for m in r.metrics] for r in (run, first))
    if keys != first_keys:
        odd = next(iter(sorted(set(keys) ^ set(first_keys))), keys[0])[0]
        raise OptionError(
            f"{name} and {first_name} have other metrics or units (first: {odd}): they cannot be compared"
        )


def _same_trivial(ours: MetricResult, theirs: MetricResult) -> bool:
    a, b = ours.trivial, theirs.trivial
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9))


def _row(metrics: Sequence[MetricResult]) -> Row:
    first = metrics[0]
    # Delta_m is a relative change already, and 0 is no error of nothing: a ratio of two of them says nothing.
    related = first.key not in RELATIONS
    return Row(
        task=first.task,
        metric=first.name,
        unit=first.unit,
        higher_is_better=first.higher_is_better,
        values=tuple(metric.value for metric in metrics),
        trivial=first.trivial,
        ratios=tuple(
            error_ratio(metric.value, first.value, first.higher_is_better, first.ideal) if related else None
            for metric in metrics
        ),
        beats_trivial=tuple(metric.beats_trivial for metric in metrics),
        ideal=first.ideal,
        key=first.key,
        counted=first.counted,
    )


def error_ratio(
    value: float | None, base: float | None, higher_is_better: bool, ideal: float | None = None
) -> float | None:
    """The error of `value` relative to that of `base`, so that below 1 is better; None unless both errors are > 0.

    The error is the value itself where lower is better; `ideal - value` where higher is better and the ideal is known
    (an accuracy of 0.9 has twice the error of one of 0.95; a correlation of 0 has the error 1); else `1 / value`.
    """
    if value is not None and base is not None and higher_is_better and ideal is not None:
        value, base, higher_is_better = ideal - value, ideal - base, False
    if value is None or base is None or value <= 0 or base <= 0:
        return None
    return base / value if higher_is_better else value / base


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """The geometric mean of positive numbers; None when there is none or one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return math.exp(math.fsum(math.log(value) for value in known) / len(known))


def number(value: float | None) -> str:
    """Four significant digits without an exponent for everyday sizes: `0.4567`, `12.34`, `12340`; `-` for None."""
    if value is None:
        return "-"
    scientific = f"{value:.3e}"
    exponent = int(scientific.partition("e")[2])  # of the rounded number: 0.99996 is 1.000
    if not -4 <= exponent < 7:
        return scientific
    digits = 3 - exponent
    return f"{round(value, digits):.{max(digits, 0)}f}"


# ---------------------------------------------------------------------------------------------------- rendering


def _header(table: Comparison) -> list[str]:
    ratios = [f"{name} / {table.names[0]}" for name in table.names[1:]]
    beats = f"beats {table.trivial.removesuffix(' predictor')}"
    return ["task", "metric", "unit", *table.names, table.trivial, *ratios, beats]


def _verdict(table: Comparison, row: Row) -> str:
    if row.trivial is None:
        return "-"
    if all(row.beats_trivial):
        return "yes"
    losers = [name for name, beats in zip(table.names, row.beats_trivial, strict=True) if not beats]
    return "NO" if len(losers) == len(table.names) else f"NO: {', '.join(losers)}"


def _cells(table: Comparison, bold: str) -> list[list[str]]:
    """The table's body; `bold` is put around the best value of a row when there is more than one run."""
    body = []
    for row in table.rows:
        marked = row.best if len(table.names) > 1 else ()
        values = [f"{bold}{number(v)}{bold}" if i in marked else number(v) for i, v in enumerate(row.values)]
        ratios = [number(ratio) for ratio in row.ratios[1:]]
        body.append([row.title, row.metric, row.unit, *values, number(row.trivial), *ratios, _verdict(table, row)])
    return body


def _summary(table: Comparison) -> list[list[str]]:
    """The last lines, in the columns of the ratios: geometric mean and worst; nothing for a single run."""
    if len(table.names) == 1:
        return []
    blank = [""] * (len(table.names) + 1)
    means = [number(mean) for mean in table.geometric_means()[1:]]
    worst = [f"{number(w[0])} ({w[1]})" if w else "-" for w in table.worst_ratios()[1:]]
    return [["geometric mean", "", "", *blank, *means, ""], ["worst", "", "", *blank, *worst, ""]]


def render_markdown(table: Comparison) -> str:
    """A Markdown table; the best value of each row is bold."""
    lines = [_header(table), ["---"] * 3 + ["---:"] * (len(_header(table)) - 4) + ["---"]]
    lines += _cells(table, "**") + _summary(table)
    return "".join(f"{markdown_row(line)}\n" for line in lines) + _notes(table)


def markdown_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table, without its end."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def render_text(table: Comparison) -> str:
    """The same for a terminal: columns aligned, the best value of each row with a `*`."""
    best = [row.best if len(table.names) > 1 else () for row in table.rows]
    cells = _cells(table, "")
    for line, marked in zip(cells, best, strict=True):
        for i in range(len(table.names)):
            line[3 + i] += "*" if i in marked else " "
    lines = [_header(table), *cells, *_summary(table)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    numeric = range(3, len(widths) - 1)
    rows = [
        "  ".join(
            cell.rjust(w) if c in numeric else cell.ljust(w)
            for c, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rule = "-" * len(rows[0])
    end = len(cells) + 1
    return (
        "\n".join(line.rstrip() for line in [rows[0], rule, *rows[1:end], *([rule] if rows[end:] else []), *rows[end:]])
        + "\n"
        + _notes(table)
    )


def _notes(table: Comparison) -> str:
    return "".join(f"\nNote: {note}.\n" for note in table.notes)


def render_csv(table: Comparison) -> str:
    """Full precision, one line per metric; ratios to the first run in the columns `ratio:<run>`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [
            "task",
            "metric",
            "unit",
            "higher_is_better",
            *table.names,
            "trivial",
            *(f"ratio:{n}" for n in table.names[1:]),
        ]
    )
    for row in table.rows:
        numbers = ["" if v is None else repr(v) for v in (*row.values, row.trivial, *row.ratios[1:])]
        writer.writerow([row.task, row.metric, row.unit, str(row.higher_is_better).lower(), *numbers])
    return file.getvalue()

"""Runs side by side: the table of a run's metrics, and of several runs, as text, Markdown and CSV.

One run a column, one metric a row; the first run is what the others are related to, and all are told apart from the
predictor that sees no input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hf_bilb.metrics.delta_m import DELTA_M
from hf_bilb.reporting.comparison import Comparison, MetricLine, check_comparable, put_together
from hf_bilb.reporting.grid import Cell, Column, Grid, exact, number, plain_grid
from hf_bilb.reporting.results import MetricResult, RunResults


def compare_runs(runs: Sequence[RunResults], names: Sequence[str]) -> Comparison:
    """Put single runs side by side: methods with one seed each, of which the first is the reference.

    Raises:
        OptionError: when they were measured on another part of the data, metrics or units: ratios would mean nothing.
    """
    check_comparable(runs, names)
    made = put_together([(name, {0: run}) for name, run in zip(names, runs, strict=True)], names[0])
    return replace(made, notes=(*_other_rows(runs, names), *_about_delta_m(runs), *_about_ratios(made)))


def runs_text(comparison: Comparison) -> str:
    """The table for a terminal, the best value of each row with a `*`, and the notes."""
    return runs_grid(comparison).to_text() + _notes(comparison)


def runs_markdown(comparison: Comparison) -> str:
    """The same as Markdown; the best value of each row is bold."""
    return runs_grid(comparison).to_markdown() + _notes(comparison)


def runs_csv(comparison: Comparison) -> str:
    """Full precision, one line per metric; ratios to the first run in the columns `ratio:<run>`."""
    names = comparison.names
    ratios = [f"ratio:{name}" for name in names[1:]]
    rows = []
    for line in comparison.all_lines:
        about = line.about
        numbers = [exact(value) for value in (*line.values, about.trivial, *line.ratios[1:])]
        rows.append([about.task, about.name, about.unit, str(about.higher_is_better).lower(), *numbers])
    return plain_grid(["task", "metric", "unit", "higher_is_better", *names, "trivial", *ratios], rows).to_csv()


def runs_grid(comparison: Comparison) -> Grid:
    """A row a metric: the runs' values, the trivial predictor's, the ratios to the first run and a verdict; below them
    geometric mean and worst ratio, unless there is one run alone."""
    names, trivial = comparison.names, comparison.trivial
    columns = [
        *(Column(heading, left=True) for heading in ("task", "metric", "unit")),
        *(Column(name, marked=True) for name in names),
        Column(trivial),
        *(Column(f"{name} / {names[0]}") for name in names[1:]),
        Column(f"beats {trivial.removesuffix(' predictor')}", left=True),
    ]
    body = tuple(tuple(_row(comparison, line)) for line in comparison.all_lines)
    summary = tuple(tuple(map(Cell, texts)) for texts in _summary(comparison))
    return Grid(tuple(columns), body, summary)


def _row(comparison: Comparison, line: MetricLine) -> Iterator[Cell]:
    about = line.about
    marked = line.best if len(comparison.names) > 1 else ()
    yield from map(Cell, (line.title, about.name, about.unit))
    yield from (Cell(number(value), best=i in marked) for i, value in enumerate(line.values))
    yield from (Cell(number(value)) for value in (about.trivial, *line.ratios[1:]))
    yield Cell(_verdict(comparison, line))


def _verdict(comparison: Comparison, line: MetricLine) -> str:
    if line.about.trivial is None:
        return "-"
    if all(line.beats_trivial):
        return "yes"
    losers = [name for name, beats in zip(comparison.names, line.beats_trivial, strict=True) if not beats]
    return "NO" if len(losers) == len(comparison.names) else f"NO: {', '.join(losers)}"


def _summary(comparison: Comparison) -> list[list[str]]:
    """The last lines, in the columns of the ratios: geometric mean and worst; nothing for a single run."""
    if len(comparison.names) == 1:
        return []
    blank = [""] * (len(comparison.names) + 1)
    means = [number(None if ratio is None else ratio.mean) for ratio in comparison.error_ratios()[1:]]
    worst = [f"{number(w[0])} ({w[1]})" if w else "-" for w in comparison.worst_ratios()[1:]]
    return [["geometric mean", "", "", *blank, *means, ""], ["worst", "", "", *blank, *worst, ""]]


# ---------------------------------------------------------------------------------------------------- notes


def _notes(comparison: Comparison) -> str:
    return "".join(f"\nNote: {note}.\n" for note in comparison.notes)


def _other_rows(runs: Sequence[RunResults], names: Sequence[str]) -> list[str]:
    """Which runs were measured on other rows than the first, as far as the trivial predictor tells."""
    first, notes = runs[0], []
    for run, name in zip(runs[1:], names[1:], strict=True):
        pairs = zip(first.metrics, run.metrics, strict=True)
        if odd := next((pair for pair in pairs if not _same_trivial(*pair)), None):
            ours, theirs = (number(metric.trivial) for metric in odd)
            notes.append(
                f"{name} and {names[0]} did not see the same rows: the {first.trivial_predictor}'s {odd[0].key} is "
                f"{theirs} and {ours}"
            )
    return notes


def _same_trivial(ours: MetricResult, theirs: MetricResult) -> bool:
    a, b = ours.trivial, theirs.trivial
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9))


def _about_delta_m(runs: Sequence[RunResults]) -> list[str]:
    """What Delta_m relates to, and how long the models were trained that it is said of."""
    first = runs[0]
    if not first.base_source or all(metric.key != DELTA_M for metric in first.metrics):
        return []
    epochs = dict.fromkeys(run.training.get("epochs") for run in runs)
    known = ", ".join(f"{value:g}" for value in epochs if value is not None)
    trained = f"; {'these runs' if len(runs) > 1 else 'this run'} trained {known} epochs" if known else ""
    return [f"Delta_m relates to {first.base_source}{trained}"]


def _about_ratios(comparison: Comparison) -> list[str]:
    """What a ratio of scores is."""
    if len(comparison.names) == 1 or all(line.about.ideal is None for line in comparison.all_lines):
        return []
    return ["ratios are those of the errors, which for scores are what is missing to a perfect one"]

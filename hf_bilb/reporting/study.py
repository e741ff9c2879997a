"""A study: several methods, each with several seeds, from the results of its cells to the figures of a paper's table.

A number over seeds is their mean with the sample standard deviation. Two methods are told apart by their paired
differences, seed by seed: a difference is within the seeds' spread when the 95 % interval of its mean (Student's t)
holds zero. With two or three seeds that interval is wide, as it has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_bilb.errors import OptionError
from hf_bilb.metrics.delta_m import RELATIONS, delta_m, grouped_delta_m, mean_rank
from hf_bilb.reporting.results import MetricResult, RunResults
from hf_bilb.reporting.tables import compare, error_ratio, geometric_mean

Runs = Mapping[int, RunResults]  # seed -> its finished run

#: Student's t for the two-sided 95 % interval, by degrees of freedom 1 to 10; more seeds get the last one.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Figure:
    """A number over seeds. `values`: seed -> value, None where it was no finite number."""

    values: Mapping[int, float | None]

    @property
    def known(self) -> dict[int, float]:
        """The seeds with a finite value."""
        return {seed: value for seed, value in self.values.items() if value is not None}

    @property
    def mean(self) -> float | None:
        """None when a seed has no finite value: one that diverged is not left out of a mean."""
        known = self.known
        return math.fsum(known.values()) / len(known) if known and len(known) == len(self.values) else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for fewer than two seeds."""
        mean = self.mean
        if mean is None or len(self.values) < 2:
            return None
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.known.values()) / (len(self.values) - 1))


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences of two figures over the `num_seeds` seeds that both have, and half the width of
    its 95 % interval: None with one seed, which tells nothing."""

    mean: float
    half_width: float | None
    num_seeds: int

    @property
    def within_spread(self) -> bool | None:
        """Whether the interval holds zero; None when it cannot be told."""
        return None if self.half_width is None else abs(self.mean) <= self.half_width


def paired_difference(ours: Figure, theirs: Figure) -> Difference | None:
    """`ours - theirs`, seed by seed; None without a seed that both have, or with one that diverged."""
    seeds = [seed for seed in ours.values if seed in theirs.values]
    pairs = [(ours.values[seed], theirs.values[seed]) for seed in seeds]
    differences = {s: a - b for s, (a, b) in zip(seeds, pairs, strict=True) if a is not None and b is not None}
    if not differences or len(differences) < len(seeds):
        return None
    figure = Figure(dict(differences))
    mean, deviation, count = math.fsum(differences.values()) / len(differences), figure.deviation, len(differences)
    if deviation is None:
        return Difference(mean, None, count)
    factor = _STUDENT_T[min(count - 1, len(_STUDENT_T)) - 1]
    return Difference(mean, factor * deviation / math.sqrt(count), count)


@dataclass(frozen=True)
class MetricLine:
    """One metric over all methods. `about`: of the first run; `figures`, in the methods' order; `base`: the single-task
    value where Delta_m is over it, else None; `single_task`: its figure, where the study trained it."""

    about: MetricResult
    figures: tuple[Figure, ...]
    base: float | None = None
    single_task: Figure | None = None

    @property
    def best(self) -> tuple[int, ...]:
        """The methods with the best mean."""
        known = [figure.mean for figure in self.figures if figure.mean is not None]
        if not known:
            return ()
        top = max(known) if self.about.higher_is_better else min(known)
        return tuple(i for i, figure in enumerate(self.figures) if figure.mean == top)

    @property
    def near_best(self) -> tuple[int, ...]:
        """The other methods whose difference to the best one is within the seeds' spread."""
        best = self.best
        others = [i for i in range(len(self.figures)) if best and i not in best]
        gaps = {i: paired_difference(self.figures[i], self.figures[best[0]]) for i in others}
        return tuple(i for i, gap in gaps.items() if gap is not None and gap.within_spread)


@dataclass(frozen=True)
class Method:
    """What all metrics of one method come to.

    Attributes:
        name: its label.
        seeds: of its finished cells.
        mean_rank: over the metrics that are counted (`MetricResult`), as are the ratios; the best is 1.
        delta_m, grouped_delta_m: percent, each seed's own; None without a base.
        error_ratio: geometric mean over the tasks of the error relative to the reference's with the same seed.
        difference: to the reference: of `delta_m` (points of percent), without a base of log `error_ratio`.
        worst: the largest ratio of a metric's mean error to the reference's, and its task.
        step_seconds, peak_memory_bytes: of its runs; None where a run has none.
    """

    name: str
    seeds: tuple[int, ...]
    mean_rank: float
    delta_m: Figure | None
    grouped_delta_m: Figure | None
    error_ratio: Figure | None
    difference: Difference | None
    worst: tuple[float, str] | None
    step_seconds: Figure
    peak_memory_bytes: Figure


@dataclass(frozen=True)
class Study:
    """Everything a table of a study says.

    Attributes:
        recipe, split: name of the recipe, and what was measured on.
        methods: in the order asked for.
        lines: a metric of a task each, in the data set's order.
        overall: figures over all tasks that the data set itself computes, apart from Delta_m.
        reference: the method that others are related to; None when it has no finished cell.
        base_source: where the base of Delta_m is from; empty without one.
        notes: what a reader has to know, a line each.
    """

    recipe: str
    split: str
    methods: tuple[Method, ...]
    lines: tuple[MetricLine, ...]
    overall: tuple[MetricLine, ...]
    reference: str | None
    base_source: str
    notes: tuple[str, ...] = ()

    @property
    def counted_lines(self) -> tuple[MetricLine, ...]:
        """The metrics that ranks and ratios are over."""
        return _counted(self.lines)

    @property
    def based_lines(self) -> tuple[MetricLine, ...]:
        """The metrics that Delta_m is over."""
        return tuple(line for line in self.lines if line.base is not None)

    def ratio_to_reference(self, of: Callable[[Method], Figure]) -> list[float | None]:
        """Per method, the mean of a figure over that of the reference; None where either is unknown."""
        means = [of(method).mean for method in self.methods]
        base = next((m for m, method in zip(means, self.methods, strict=True) if method.name == self.reference), None)
        return [mean / base if mean is not None and base else None for mean in means]


def make_study(
    runs: Mapping[str, Runs], single_task: Mapping[str, Runs], reference: str, notes: Sequence[str] = ()
) -> Study:
    """Put the finished cells together.

    Args:
        runs: label of the method -> seed -> results; a method without a finished cell is left out of the tables.
        single_task: task -> seed -> results of the model trained on this task alone; empty without any.
        reference: label of the method that the others are related to.
        notes: of whoever ran the cells; stand before the ones found here.

    Raises:
        OptionError: no finished cell, or cells that were measured on other parts, metrics or units.
        MetricError: a published base of Delta_m that is not above 0.
    """
    present = {name: cells for name, cells in runs.items() if cells}
    if not present:
        raise OptionError("no cell is finished, so there is nothing to compare")
    first = _check_comparable(present)
    own, incomplete = _single_task_figures(first, single_task)
    in_delta_m = _delta_m_keys(first)
    lines = [_line(about, i, present, own, about.key in in_delta_m) for i, about in enumerate(first.metrics)]
    of_tasks = tuple(line for line in lines if line.about.task)
    overall = tuple(line for line in lines if not line.about.task and line.about.key not in RELATIONS)
    source = _base_source(first, own, of_tasks)
    known_reference = reference if reference in present else None
    notes = [*notes, *incomplete, *_diverged(of_tasks, list(present))]
    methods = _methods(present, _counted(of_tasks), known_reference)
    return Study(first.recipe, first.split, methods, of_tasks, overall, known_reference, source, tuple(notes))


def _counted(lines: Sequence[MetricLine]) -> tuple[MetricLine, ...]:
    return tuple(line for line in lines if line.about.counted)


def _check_comparable(present: Mapping[str, Runs]) -> RunResults:
    cells = [(f"{name}, seed {seed}", run) for name, runs in present.items() for seed, run in runs.items()]
    compare([run for _, run in cells], [name for name, _ in cells])  # raises
    return cells[0][1]


def _single_task_figures(first: RunResults, single_task: Mapping[str, Runs]) -> tuple[dict[str, Figure], list[str]]:
    """Metric key -> its figure over the single-task runs; none, and a note, where one that Delta_m needs is no base."""
    if not single_task:
        return {}, []
    in_delta_m = _delta_m_keys(first)
    figures: dict[str, Figure] = {}
    for metric in first.metrics:
        if not metric.task:
            continue
        figure = Figure({seed: _value(run, metric.key) for seed, run in single_task.get(metric.task, {}).items()})
        if not figure.values:
            return {}, [f"no single-task model of {metric.task} is finished, so Delta_m does not relate to the others"]
        if metric.key in in_delta_m and (figure.mean is None or figure.mean <= 0):
            found = "no finite number" if figure.mean is None else f"{figure.mean:g}"
            return {}, [f"the single-task model's {metric.key} is {found}, so Delta_m does not relate to single tasks"]
        figures[metric.key] = figure
    return figures, []


def _delta_m_keys(first: RunResults) -> set[str]:
    """The metrics that Delta_m is over: those with a published base, if there are any, whatever base it relates to."""
    counted = [metric for metric in first.metrics if metric.task and metric.counted]
    return {metric.key for metric in counted if metric.base is not None} or {metric.key for metric in counted}


def _value(run: RunResults, key: str) -> float | None:
    return next((metric.value for metric in run.metrics if metric.key == key), None)


def _line(
    about: MetricResult, index: int, present: Mapping[str, Runs], own: Mapping[str, Figure], in_delta_m: bool
) -> MetricLine:
    figures = tuple(Figure({s: run.metrics[index].value for s, run in runs.items()}) for runs in present.values())
    single = own.get(about.key)
    base = about.base if single is None else single.mean
    return MetricLine(about, figures, base if in_delta_m else None, single)


def _base_source(first: RunResults, own: Mapping[str, Figure], lines: Sequence[MetricLine]) -> str:
    if not any(line.base is not None for line in lines):
        return ""
    return "this study's models of one task each" if own else first.base_source or "the data set's single-task values"


def _diverged(lines: Sequence[MetricLine], names: Sequence[str]) -> list[str]:
    """A note for every method with a value that is no finite number."""
    notes = []
    for i, name in enumerate(names):
        odd = [(line.about.key, s) for line in lines for s, value in line.figures[i].values.items() if value is None]
        if odd:
            notes.append(f"{name}: {odd[0][0]} is no finite number with seed {odd[0][1]} ({len(odd)} such values)")
    return notes


# ---------------------------------------------------------------------------------------------------- methods


def _methods(present: Mapping[str, Runs], lines: Sequence[MetricLine], reference: str | None) -> tuple[Method, ...]:
    names = list(present)
    at = None if reference is None else names.index(reference)
    ranks = _mean_ranks(lines)
    deltas = [_delta(lines, i, grouped=False) for i in range(len(names))]
    groups = [_delta(lines, i, grouped=True) for i in range(len(names))]
    ratios = [None if at is None else _error_ratios(lines, i, at) for i in range(len(names))]
    methods = []
    for i, (name, runs) in enumerate(present.items()):
        methods.append(
            Method(
                name=name,
                seeds=tuple(runs),
                mean_rank=ranks[i],
                delta_m=deltas[i],
                grouped_delta_m=groups[i],
                error_ratio=ratios[i],
                difference=None if at in (None, i) else _difference(deltas[i], deltas[at], ratios[i], ratios[at]),
                worst=None if at in (None, i) else _worst(lines, i, at),
                step_seconds=_fact(runs, "step_seconds"),
                peak_memory_bytes=_fact(runs, "peak_memory_bytes"),
            )
        )
    return tuple(methods)


def _fact(runs: Runs, key: str) -> Figure:
    return Figure({seed: run.training.get(key) for seed, run in runs.items()})


def _mean_ranks(lines: Sequence[MetricLine]) -> list[float]:
    """Mean rank of each method by its means; one that is no finite number ranks last."""
    higher = [line.about.higher_is_better for line in lines]
    worst = [-math.inf if up else math.inf for up in higher]
    rows = []
    for i in range(len(lines[0].figures) if lines else 0):
        means = [line.figures[i].mean for line in lines]
        rows.append([last if mean is None else mean for mean, last in zip(means, worst, strict=True)])
    return [float(rank) for rank in mean_rank(rows, higher)]


def _delta(lines: Sequence[MetricLine], i: int, grouped: bool) -> Figure | None:
    """Delta_m of method `i` with each seed; None without a base."""
    used = [line for line in lines if line.base is not None]
    if not used:
        return None
    base = [line.base for line in used if line.base is not None]
    higher = [line.about.higher_is_better for line in used]
    groups = [line.about.group or line.about.task for line in used]
    values: dict[int, float | None] = {}
    for seed in used[0].figures[i].values:
        row = [line.figures[i].values[seed] for line in used]
        known = [value for value in row if value is not None]
        if len(known) < len(row):
            values[seed] = None
        elif grouped:
            values[seed] = float(grouped_delta_m(known, base, higher, groups))
        else:
            values[seed] = float(delta_m(known, base, higher))
    return Figure(values)


def _error_ratios(lines: Sequence[MetricLine], i: int, at: int) -> Figure:
    """Geometric mean over the tasks of the error relative to the reference's with the same seed; a task counts once."""
    seeds = [seed for seed in lines[0].figures[i].values if seed in lines[0].figures[at].values]
    values: dict[int, float | None] = {}
    for seed in seeds:
        by_task: dict[str, list[float | None]] = {}
        for line in lines:
            ratio = _ratio(line, line.figures[i].values[seed], line.figures[at].values[seed])
            by_task.setdefault(line.about.task, []).append(ratio)
        values[seed] = geometric_mean([geometric_mean(ratios) for ratios in by_task.values()])
    return Figure(values)


def _ratio(line: MetricLine, value: float | None, base: float | None) -> float | None:
    return error_ratio(value, base, line.about.higher_is_better, line.about.ideal)


def _difference(
    delta: Figure | None, delta_of_reference: Figure | None, ratio: Figure | None, ratio_of_reference: Figure | None
) -> Difference | None:
    if delta is not None and delta_of_reference is not None:
        return paired_difference(delta, delta_of_reference)
    if ratio is None or ratio_of_reference is None:
        return None
    return paired_difference(_logarithm(ratio), _logarithm(ratio_of_reference))


def _logarithm(figure: Figure) -> Figure:
    return Figure({seed: None if value is None else math.log(value) for seed, value in figure.values.items()})


def _worst(lines: Sequence[MetricLine], i: int, at: int) -> tuple[float, str] | None:
    ratios = [(_ratio(line, line.figures[i].mean, line.figures[at].mean), line.about.task) for line in lines]
    known = [(ratio, task) for ratio, task in ratios if ratio is not None]
    return max(known) if known and len(known) == len(ratios) else None

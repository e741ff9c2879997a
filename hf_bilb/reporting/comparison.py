"""A comparison: several methods, each with one seed or several, from the results of runs to a paper's figures.

Two runs side by side are a comparison of two methods with one seed each (`hf_bilb.reporting.side_by_side`). How numbers
over seeds are told apart is said in `hf_bilb.reporting.statistics`.

Runs are related by their errors, so that a ratio below 1 is better whichever way a metric points: the error is the
value itself (MAE), or what is missing to the metric's ideal value (1 - accuracy).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hf_bilb.errors import OptionError
from hf_bilb.metrics.delta_m import RELATIONS, delta_m, grouped_delta_m, mean_rank
from hf_bilb.reporting.results import MetricResult, RunResults
from hf_bilb.reporting.statistics import Difference, Figure, error_ratio, geometric_mean, paired_difference

Runs = Mapping[int, RunResults]  # seed -> its finished run


@dataclass(frozen=True)
class MetricLine:
    """One metric over all M methods.

    Attributes:
        about: of the first run.
        figures: in the methods' order.
        base: the single-task value where Delta_m is over it, else None.
        single_task: its figure, where the comparison trained it.
        beats_trivial: whether all runs of a method are better than the predictor that sees no input.
        reference: position of the method that the others are related to.
    """

    about: MetricResult
    figures: tuple[Figure, ...]
    base: float | None = None
    single_task: Figure | None = None
    beats_trivial: tuple[bool, ...] = ()
    reference: int | None = None

    @property
    def title(self) -> str:
        """The task's name, for a reader."""
        return self.about.task or "all tasks"

    @property
    def values(self) -> tuple[float | None, ...]:
        """The value of each method's first seed."""
        return tuple(next(iter(figure.values.values())) for figure in self.figures)

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

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """Error of each method's mean relative to the reference's; None where undefined, or without a reference."""
        # Delta_m is a relative change already, and 0 is no error of nothing: a ratio of two of them says nothing.
        if self.reference is None or self.about.key in RELATIONS:
            return (None,) * len(self.figures)
        base = self.figures[self.reference].mean
        return tuple(self.ratio(figure.mean, base) for figure in self.figures)

    def ratio(self, value: float | None, base: float | None) -> float | None:
        """The error of `value` relative to that of `base`, both of this metric; see `error_ratio`."""
        return error_ratio(value, base, self.about.higher_is_better, self.about.ideal)


@dataclass(frozen=True)
class Method:
    """What all metrics of one method come to.

    Attributes:
        name: its label.
        seeds: of its finished runs.
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
class Comparison:
    """M methods side by side.

    Attributes:
        recipe, split: name of the first run's recipe, and what was measured on.
        names: of the methods, in the order asked for.
        runs: of each method.
        all_lines: a metric each, in the data set's order.
        reference: the method that others are related to; None when it has no finished run.
        base_source: where the base of Delta_m is from; empty without one.
        trivial: name of the predictor that sees no input.
        notes: what a reader has to know before believing a figure, a line each.
    """

    recipe: str
    split: str
    names: tuple[str, ...]
    runs: tuple[Runs, ...]
    all_lines: tuple[MetricLine, ...]
    reference: str | None
    base_source: str = ""
    trivial: str = "mean predictor"
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[MetricLine, ...]:
        """The metrics of a task."""
        return tuple(line for line in self.all_lines if line.about.task)

    @property
    def overall(self) -> tuple[MetricLine, ...]:
        """Figures over all tasks that the data set itself computes, apart from Delta_m."""
        return tuple(line for line in self.all_lines if not line.about.task and line.about.key not in RELATIONS)

    @property
    def counted_lines(self) -> tuple[MetricLine, ...]:
        """The metrics that ranks and ratios are over."""
        return tuple(line for line in self.lines if line.about.counted)

    @property
    def based_lines(self) -> tuple[MetricLine, ...]:
        """The metrics that Delta_m is over."""
        return tuple(line for line in self.lines if line.base is not None)

    @functools.cached_property
    def methods(self) -> tuple[Method, ...]:
        """What all metrics of each method come to; raises `MetricError` for a base of Delta_m that is not above 0."""
        return _methods(self)

    @property
    def has_groups(self) -> bool:
        """Whether the grouped Delta_m is another figure than Delta_m."""
        lines = self.based_lines
        return len({line.about.group or line.about.task for line in lines}) < len(lines)

    def error_ratios(self) -> list[Figure | None]:
        """Per method and seed, the geometric mean over the tasks of its error relative to the reference's with the same
        seed; a task with several metrics counts once, with their geometric mean. None without a reference."""
        at = None if self.reference is None else self.names.index(self.reference)
        return [None if at is None else _error_ratio(self.counted_lines, i, at) for i in range(len(self.names))]

    def worst_ratios(self) -> list[tuple[float, str] | None]:
        """Per method, the largest ratio of a mean error to the reference's, and its task; None if undefined."""
        lines = self.counted_lines
        return [_worst(lines, i) for i in range(len(self.names))]

    def ratio_to_reference(self, of: Callable[[Method], Figure]) -> list[float | None]:
        """Per method, the mean of a figure over that of the reference; None where either is unknown."""
        means = [of(method).mean for method in self.methods]
        base = next((m for m, method in zip(means, self.methods, strict=True) if method.name == self.reference), None)
        return [mean / base if mean is not None and base else None for mean in means]


# ---------------------------------------------------------------------------------------------------- put together


def compare_methods(
    runs: Mapping[str, Runs], single_task: Mapping[str, Runs], reference: str, notes: Sequence[str] = ()
) -> Comparison:
    """Put the finished runs of several methods together.

    Args:
        runs: label of the method -> seed -> results; a method without a finished run is left out of the tables.
        single_task: task -> seed -> results of the model trained on this task alone; empty without any.
        reference: label of the method that the others are related to.
        notes: of whoever trained them; stand before the ones found here.

    Raises:
        OptionError: no finished run, or runs that were measured on other parts, metrics or units.
    """
    methods = [(name, by_seed) for name, by_seed in runs.items() if by_seed]
    if not methods:
        raise OptionError("no run is finished, so there is nothing to compare")
    titled = {f"{name}, seed {seed}": run for name, by_seed in methods for seed, run in by_seed.items()}
    check_comparable(list(titled.values()), list(titled))
    single, incomplete = _single_task_figures(next(iter(titled.values())), single_task)
    made = put_together(methods, reference, single)
    return replace(made, notes=(*notes, *incomplete, *_diverged(made)))


def put_together(
    methods: Sequence[tuple[str, Runs]], reference: str, single_task: Mapping[str, Figure] | None = None
) -> Comparison:
    """The comparison of runs that can be compared (`check_comparable`), without notes.

    Args:
        methods: name and runs of each; two may have one name, the first of which is then meant by `reference`.
        reference: as in `compare_methods`.
        single_task: metric key -> its figure over models of one task each.
    """
    names, runs = [name for name, _ in methods], [by_seed for _, by_seed in methods]
    first, own = next(iter(runs[0].values())), single_task or {}
    at = names.index(reference) if reference in names else None
    in_delta_m = _delta_m_keys(first)
    lines = tuple(_line(about, i, runs, own, about.key in in_delta_m, at) for i, about in enumerate(first.metrics))
    return Comparison(
        recipe=first.recipe,
        split=first.split,
        names=tuple(names),
        runs=tuple(runs),
        all_lines=lines,
        reference=None if at is None else reference,
        base_source=_base_source(first, own, lines),
        trivial=first.trivial_predictor,
    )


def check_comparable(runs: Sequence[RunResults], names: Sequence[str]) -> None:
    """Raise `OptionError` when runs were measured on another part of the data, metrics or units than the first."""
    first, first_name = runs[0], names[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        if run.split != first.split:
            raise OptionError(
                f"{name} was measured on {run.split}, {first_name} on {first.split}: they cannot be compared"
            )
        keys, first_keys = ([(m.key, m.unit) for m in r.metrics] for r in (run, first))
        if keys != first_keys:
            odd = next(iter(sorted(set(keys) ^ set(first_keys))), keys[0])[0]
            raise OptionError(
                f"{name} and {first_name} have other metrics or units (first: {odd}): they cannot be compared"
            )


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
    about: MetricResult,
    index: int,
    methods: Sequence[Runs],
    own: Mapping[str, Figure],
    in_delta_m: bool,
    reference: int | None,
) -> MetricLine:
    found = [{seed: run.metrics[index] for seed, run in runs.items()} for runs in methods]
    single = own.get(about.key)
    base = about.base if single is None else single.mean
    return MetricLine(
        about,
        figures=tuple(Figure({seed: metric.value for seed, metric in by_seed.items()}) for by_seed in found),
        base=base if in_delta_m else None,
        single_task=single,
        beats_trivial=tuple(all(metric.beats_trivial for metric in by_seed.values()) for by_seed in found),
        reference=reference,
    )


def _base_source(first: RunResults, own: Mapping[str, Figure], lines: Sequence[MetricLine]) -> str:
    if not any(line.base is not None for line in lines):
        return ""
    return (
        "this comparison's models of one task each" if own else first.base_source or "the data set's single-task values"
    )


def _diverged(comparison: Comparison) -> list[str]:
    """A note for every method with a value that is no finite number."""
    notes = []
    for i, name in enumerate(comparison.names):
        figures = [(line.about.key, line.figures[i]) for line in comparison.lines]
        odd = [(key, seed) for key, figure in figures for seed, value in figure.values.items() if value is None]
        if odd:
            notes.append(f"{name}: {odd[0][0]} is no finite number with seed {odd[0][1]} ({len(odd)} such values)")
    return notes


# ---------------------------------------------------------------------------------------------------- methods


def _methods(comparison: Comparison) -> tuple[Method, ...]:
    lines, names = comparison.counted_lines, comparison.names
    at = None if comparison.reference is None else names.index(comparison.reference)
    ranks, worst = _mean_ranks(lines), comparison.worst_ratios()
    deltas = [_delta(lines, i, grouped=False) for i in range(len(names))]
    groups = [_delta(lines, i, grouped=True) for i in range(len(names))]
    ratios = comparison.error_ratios()
    return tuple(
        Method(
            name=name,
            seeds=tuple(runs),
            mean_rank=ranks[i],
            delta_m=deltas[i],
            grouped_delta_m=groups[i],
            error_ratio=ratios[i],
            difference=None if at in (None, i) else _difference(deltas[i], deltas[at], ratios[i], ratios[at]),
            worst=None if at in (None, i) else worst[i],
            step_seconds=_fact(runs, "step_seconds"),
            peak_memory_bytes=_fact(runs, "peak_memory_bytes"),
        )
        for i, (name, runs) in enumerate(zip(names, comparison.runs, strict=True))
    )


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


def _error_ratio(lines: Sequence[MetricLine], i: int, at: int) -> Figure:
    """Of method `i`, the geometric mean over the tasks of its error relative to that of method `at`, seed by seed."""
    if not lines:
        return Figure({})
    seeds = [seed for seed in lines[0].figures[i].values if seed in lines[0].figures[at].values]
    values: dict[int, float | None] = {}
    for seed in seeds:
        by_task: dict[str, list[float | None]] = {}
        for line in lines:
            ratio = line.ratio(line.figures[i].values[seed], line.figures[at].values[seed])
            by_task.setdefault(line.about.task, []).append(ratio)
        values[seed] = geometric_mean([geometric_mean(ratios) for ratios in by_task.values()])
    return Figure(values)


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


def _worst(lines: Sequence[MetricLine], i: int) -> tuple[float, str] | None:
    ratios = [(line.ratios[i], line.about.task) for line in lines]
    known = [(ratio, task) for ratio, task in ratios if ratio is not None]
    return max(known) if known and len(known) == len(ratios) else None

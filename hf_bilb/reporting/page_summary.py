"""What an HTML page says first, in plain words: which runs these are, and how the methods stand to each other.

The verdicts are those of the tables (`hf_bilb.reporting.comparison_tables.verdict`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass

from hf_bilb.reporting.comparison import Comparison, Method
from hf_bilb.reporting.comparison_tables import percent, verdict
from hf_bilb.reporting.grid import number
from hf_bilb.reporting.results import RunResults


@dataclass(frozen=True)
class Verdict:
    """A method, how it stands to the reference (`better`, ...; empty for the reference itself), and its figures."""

    method: str
    verdict: str
    figures: str


def sentences(comparison: Comparison) -> list[str]:
    """Which runs, what they were measured on, and whether they are better than the predictor that sees no input."""
    runs = [run for by_seed in comparison.runs for run in by_seed.values()]
    said = [_which(comparison, runs), _trained(runs)]
    if len(comparison.names) > 1 and comparison.reference is not None:
        said.append(
            f"The others are related to {comparison.reference}. A mean error is the geometric mean over the tasks of "
            "the ratios of the errors; below 1 is better."
        )
    return [*said, *_trivial(comparison)]


def verdicts(comparison: Comparison) -> list[Verdict]:
    """One for each method; none where there is one alone, or no metric to relate them by."""
    if len(comparison.names) < 2 or not comparison.counted_lines:
        return []
    return [
        Verdict(method.name, verdict(comparison, method), "; ".join(_figures(comparison, i, method)))
        for i, method in enumerate(comparison.methods)
    ]


def _which(comparison: Comparison, runs: Sequence[RunResults]) -> str:
    count = _count(len(runs), "run")
    methods = f" of {len(comparison.names)} methods" if len(runs) > len(comparison.names) > 1 else ""
    recipes, models = (sorted({getattr(run, key) for run in runs}) for key in ("recipe", "model"))
    what = f"{_noun(recipes, 'recipe')} {', '.join(recipes)}, {_noun(models, 'model')} {', '.join(models)}"
    return f"{count}{methods}: {what}, measured on the {comparison.split} part of {_list(run.data for run in runs)}."


def _trained(runs: Sequence[RunResults]) -> str:
    seeds = list(dict.fromkeys(run.settings.get("trainer", {}).get("seed") for run in runs))
    known = f"; {_noun(seeds, 'seed')} {', '.join(map(str, seeds))}" if None not in seeds else ""
    steps = [run.training["steps"] for run in runs if "steps" in run.training]
    length = f"; trained for {_range(steps)} steps" if steps else ""
    balancers = list(dict.fromkeys(run.balancer for run in runs))
    return f"{_noun(balancers, 'Balancer')}: {', '.join(balancers)}{known}{length}."


def _trivial(comparison: Comparison) -> list[str]:
    lines = [line for line in comparison.counted_lines if line.about.trivial is not None]
    if not lines:
        return []
    losers: dict[str, list[str]] = {}
    for line in lines:
        for name, beats in zip(comparison.names, line.beats_trivial, strict=True):
            if not beats:
                losers.setdefault(name, []).append(f"{line.about.task} {line.about.name}")
    if not losers:
        return [f"Better than the {comparison.trivial} in {_all(len(lines), 'metric')}."]
    of_all = _count(len(lines), "metric")
    said = "; ".join(f"{name} in {len(lost)} of {of_all} ({_some(lost)})" for name, lost in losers.items())
    return [f"NOT better than the {comparison.trivial}: {said}."]


def _figures(comparison: Comparison, i: int, method: Method) -> list[str]:
    name, figures = comparison.reference, [f"mean rank {method.mean_rank:.2f} of {len(comparison.names)}"]
    if method.delta_m is not None:
        figures.append(f"Δm {percent(method.delta_m)} %")
    if method.name == name or name is None:
        return figures
    if method.error_ratio is not None and method.error_ratio.mean is not None:
        figures.append(f"mean error {number(method.error_ratio.mean)} × {name}'s")
    ratios = [line.ratios[i] for line in comparison.counted_lines]
    better = sum(ratio is not None and ratio < 1 for ratio in ratios)
    figures.append(f"better in {better} of {_count(len(ratios), 'metric')}")
    if method.worst is not None:
        figures.append(f"worst task {method.worst[1]}: {number(method.worst[0])} × {name}'s")
    return figures


# ---------------------------------------------------------------------------------------------------- words


def _noun(things: Sized, noun: str) -> str:
    return noun if len(things) == 1 else f"{noun}s"


def _count(count: int, noun: str) -> str:
    return f"{count} {_noun(range(count), noun)}"


def _all(count: int, noun: str) -> str:
    return f"the one {noun}" if count == 1 else f"all {count} {noun}s"


def _list(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"

"""What a reader has to know before believing a comparison's table: seeds, split, base, selection, epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_bilb.reporting.comparison import Comparison, Runs
from hf_bilb.reporting.results import RunResults


def comparison_notes(
    comparison: Comparison, runs: Mapping[str, Runs], seeds: Sequence[int], split_by_seed: bool
) -> list[str]:
    """The notes on `comparison`, a sentence each without its full stop.

    Args:
        comparison: as `compare_methods` made it.
        runs: label of each method asked for -> its finished runs.
        seeds: the ones asked for.
        split_by_seed: each seed split the data in its own way, too.
    """
    finished = [run for by_seed in runs.values() for run in by_seed.values()]
    first = finished[0]
    notes = [
        *_missing(runs, seeds),
        _epochs(finished),
        _selection(first),
        _seeds(first, seeds, split_by_seed),
        *_spread(seeds),
        *_base(comparison),
        f"MR: rank among the methods by the mean, over {len(comparison.counted_lines)} metrics; 1 + the number of "
        "better ones",
    ]
    if comparison.reference is not None:
        notes += _relation(comparison, first)
    return notes


def _missing(runs: Mapping[str, Runs], seeds: Sequence[int]) -> list[str]:
    missing = {name: [seed for seed in seeds if seed not in by_seed] for name, by_seed in runs.items()}
    said = [f"{name} seed {', '.join(map(str, without))}" for name, without in missing.items() if without]
    return [f"not finished, so not in here: {'; '.join(said)}"] if said else []


def _epochs(runs: Sequence[RunResults]) -> str:
    epochs = [run.training.get("epochs") for run in runs]
    steps = [run.training.get("steps") for run in runs]
    return f"each run trained {_range(epochs)} epochs ({_range(steps)} steps); longer training can turn the order"


def _range(values: Sequence[Any]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "an unknown number of"
    low, high = min(known), max(known)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _selection(first: RunResults) -> str:
    trainer = first.settings.get("trainer", {})
    if not trainer.get("load_best_model_at_end"):
        return f"no checkpoint was selected: the model after the last update is the one measured on {first.split}"
    metric = trainer.get("metric_for_best_model") or "loss"
    chosen = f"each run's checkpoint is the one with the best {metric} on the validation part"
    if first.split == "validation":
        return f"{chosen}, which is also what was measured: the figures are too good"
    return f"{chosen}; the {first.split} part was measured once, with that one"


def _seeds(first: RunResults, seeds: Sequence[int], split_by_seed: bool) -> str:
    said = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    data = first.settings.get("data", {})
    key, data_seed = "data.seed", data.get("seed")
    if "split" in data:
        key, data_seed = "data.split.seed", data["split"].get("seed")
    if split_by_seed:
        return f"{said} of initial weights, of the order of training (trainer.seed) and of the split ({key})"
    split = "the split is always the same" if data_seed is None else f"the split stays the same ({key}={data_seed})"
    return f"{said} of initial weights and of the order of training (trainer.seed); {split}"


def _spread(seeds: Sequence[int]) -> list[str]:
    if len(seeds) == 1:
        return ["one seed: whether a difference is more than the spread of seeds cannot be told"]
    return [
        "± is the sample standard deviation over the seeds; ~ marks what the seeds do not tell from the best",
        "within the seeds' spread: zero lies in the 95 % interval (Student's t) of the paired differences, seed by "
        "seed; there is no correction for the number of comparisons",
    ]


def _base(comparison: Comparison) -> list[str]:
    if not comparison.base_source:
        return ["no Delta_m: there are no single-task values (--stl trains them)"]
    lines, counted = comparison.based_lines, comparison.counted_lines
    over = "" if len(lines) == len(counted) else f", over the {len(lines)} of {len(counted)} metrics it has"
    source = comparison.base_source
    if lines[0].single_task is not None:
        source = f"{source} (linear scalarization, n = {len(lines[0].single_task.values)}, on {comparison.split})"
    notes = [f"Δm relates to {source}{over}"]
    if shown_only := [line.about for line in comparison.lines if not line.about.counted]:
        title = f"{shown_only[0].task} {shown_only[0].name}"
        notes.append(f"{len(shown_only)} metrics do not count, since another one of their task does ({title}, ...)")
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(line.about.group, []).append(line.about.task)
    named = [", ".join(dict.fromkeys(tasks)) for group, tasks in groups.items() if group]
    if comparison.has_groups:
        notes.append(f"grouped: nearly equivalent tasks count once ({'; '.join(named) or 'the metrics of a task'})")
    return notes


def _relation(comparison: Comparison, first: RunResults) -> list[str]:
    name = comparison.reference
    told = "Δm" if comparison.base_source else "that mean"
    notes = [f"error / {name}'s: geometric mean over the tasks; better or worse against {name} is told by {told}"]
    if any(line.about.ideal is not None for line in comparison.lines):
        notes.append("the error of a score is what it lacks to a perfect one")
    device = first.training.get("device")
    memory = "of the tensors of updates" if device == "cuda" else "of the whole process, data included"
    notes.append(
        f"step time (without evaluations and checkpoints) and peak memory ({memory}) relate to {name}'s in this study"
    )
    return notes

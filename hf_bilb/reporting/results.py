"""`results.json`: what a run measured, with everything needed to read the figures a year later."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_bilb.config.options import parse_options, shown
from hf_bilb.errors import OptionError
from hf_bilb.storage.writing import write_text

FILE_NAME = "results.json"
FORMAT = 1


@dataclass(frozen=True)
class MetricResult:
    """One metric of one task.

    Attributes:
        key: its name in the logs, `mae_homo`.
        task: the task, `homo`; empty for a figure over all tasks.
        name: the metric, `MAE`.
        unit: of both values, `meV`; empty when it has none.
        higher_is_better: which way is up.
        value: the model's; None when it was no finite number.
        trivial: the same for the predictor that sees no input (regression: always the training mean).
        ideal: the value of a perfect prediction, where higher is better and there is one; its distance is the error.
        base: the value of a model trained on this task alone, what Delta_m relates to; None where none is known.
        group: tasks of one group are nearly equivalent and count once in the grouped Delta_m; empty: the task itself.
        counted: whether ranks, means of ratios and Delta_m take it; False where another one of the task does.
    """

    key: str
    task: str
    name: str
    unit: str
    higher_is_better: bool
    value: float | None
    trivial: float | None
    ideal: float | None = None
    base: float | None = None
    group: str = ""
    counted: bool = True

    @property
    def beats_trivial(self) -> bool:
        """Whether the model is strictly better than the trivial predictor."""
        return is_better(self.value, self.trivial, self.higher_is_better)


@dataclass(frozen=True)
class RunResults:
    """One run.

    Attributes:
        recipe: name of the recipe's file.
        model, data, balancer: their names in the recipe.
        split: what `metrics` was measured on.
        metrics: in the data set's order.
        losses: part of the data -> `mean` and each task -> loss (training scale), with the measured model.
        training: steps, epochs, seconds, number of processes, ...
        settings: the resolved recipe.
        versions: of Python and the libraries.
        trivial_predictor: what `MetricResult.trivial` is the result of.
        base_source: where `MetricResult.base` is from.
        about: `rows`: part of the data -> number of rows; `balancer`: its `paper` and `equation`. Empty in older files.
        format: of this file.
    """

    recipe: str
    model: str
    data: str
    balancer: str
    split: str
    metrics: list[MetricResult]
    losses: dict[str, dict[str, float | None]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    trivial_predictor: str = "mean predictor"
    base_source: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def is_better(value: float | None, other: float | None, higher_is_better: bool) -> bool:
    """Whether `value` is strictly better than `other`; False when either is unknown."""
    if value is None or other is None:
        return False
    return value > other if higher_is_better else value < other


def finite(value: Any) -> float | None:
    """A number for JSON: None for what is missing, infinite or not a number."""
    return float(value) if value is not None and math.isfinite(value) else None


def as_json(value: Any) -> Any:
    """Nested plain values as strict JSON holds them: lists for tuples, and as words, as in YAML, what JSON has no
    number for (`.inf`, `-.inf`, `.nan`)."""
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return value


def write_results(results: RunResults, run_dir: Path) -> Path:
    """Write `results.json` into `run_dir`; strict JSON, so a value that is no finite number raises `ValueError`."""
    path = run_dir / FILE_NAME
    write_text(path, json.dumps(asdict(results), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def read_results(run_dir: str | Path) -> RunResults:
    """Read a run's `results.json`.

    Raises:
        OptionError: one line when it is missing, no JSON, or of another format.
    """
    path = Path(run_dir) / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_float=_number, parse_constant=_number)
    except FileNotFoundError:
        raise OptionError(f"{run_dir}: holds no {FILE_NAME}, so it is no run, or one that has not finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise OptionError(f"{path}: is not a results file of format {FORMAT}")
    return parse_options(RunResults, values, str(path))


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is no finite number")
    return number


def labels(runs: Sequence[RunResults], folders: Sequence[str]) -> list[str]:
    """A short name for each run: its balancer; where balancers repeat its recipe; where recipes repeat its folder."""
    for names in ([run.balancer for run in runs], [run.recipe for run in runs], [Path(f).name for f in folders]):
        if len(set(names)) == len(names):
            return names
    return list(folders)

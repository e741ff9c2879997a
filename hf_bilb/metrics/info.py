"""What a metric is, for tables and logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_bilb.errors import OptionError
from hf_bilb.metrics.delta_m import DELTA_M


@dataclass(frozen=True)
class MetricInfo:
    """One number that `compute_metrics` returns.

    Attributes:
        key: its name in the returned dict and in the logs (after `eval_`), `"mae_homo"`.
        task: the task it belongs to, `"homo"`; empty for a figure over all tasks.
        name: the metric, as a table's heading: `"MAE"`.
        unit: of its value, empty when it has none: `"meV"`.
        higher_is_better: which way is up.
        ideal: the value of a perfect prediction, where higher is better and there is one (1 for an accuracy): the
            errors that tables relate to each other are then `ideal - value`.
        counted: whether ranks, means of ratios and Delta_m take it; False where another one of the task does.
    """

    key: str
    task: str
    name: str
    unit: str
    higher_is_better: bool
    ideal: float | None = None
    counted: bool = True


DELTA_M_INFO = MetricInfo(DELTA_M, "", "Delta_m", "%", higher_is_better=False)


def check_different_keys(metrics: Sequence[MetricInfo]) -> None:
    """Raise `OptionError` where two tasks would have a metric of the same key (`a_balanced` + `accuracy`)."""
    owners: dict[str, str] = {}
    for metric in metrics:
        if metric.key in owners:
            raise OptionError(
                f"task_names: {owners[metric.key]!r} and {metric.task!r} would both have the metric {metric.key!r}"
            )
        owners[metric.key] = metric.task

"""`compute_metrics={"sst2": accuracy, "stsb": spearman}`: a function for each of several evaluation sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import EvalPrediction

from hf_bilb.metrics.trainer_metrics import StreamingMetrics

Metrics = Callable[..., dict[str, float]]


class MetricsByTask:
    """A `compute_metrics` that is another function for each task.

    Args:
        functions: task -> its `compute_metrics`; a task may have none. They are called as Trainer calls its own, with
            `compute_result` under `batch_eval_metrics`.

    State: the task of the evaluation under way.
    """

    def __init__(self, functions: Mapping[str, Metrics]) -> None:
        self.functions = dict(functions)
        self._function: Metrics | None = None

    def begin(self, task: str | None) -> None:
        """An evaluation of a set of `task` begins; None: of one that is of several."""
        self._function = None if task is None else self.functions.get(task)
        if isinstance(self._function, StreamingMetrics):
            self._function.reset()

    def __call__(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
        """The metrics that the task's function gives; of a task without one, none."""
        if self._function is None:
            return {}
        batchwise: dict[str, Any] = {} if compute_result is None else {"compute_result": compute_result}
        return self._function(prediction, **batchwise)

"""`TaskMetrics`: the metrics of K tasks as a `compute_metrics`, batch by batch, from sufficient statistics."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_bilb.config.options import nearest, unknown_name
from hf_bilb.errors import MetricError, OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.metrics.base import Accumulator, wide
from hf_bilb.metrics.delta_m import DELTA_M, delta_m

if TYPE_CHECKING:  # takes seconds to import, and only the name is needed
    from transformers import EvalPrediction


class StreamingMetrics(ABC):
    """A `compute_metrics` for `TrainingArguments(batch_eval_metrics=True)`, which keeps statistics between batches."""

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; with `compute_result` return the metrics of everything since the last result, else nothing.

        Raises:
            MetricError: a batch whose shapes or types do not fit; with `compute_result`, labels that are none.
        """
        try:
            self._add_batch(prediction)
            found = self._compute() if compute_result else {}
        except BaseException:
            self.reset()  # what is half added is no beginning for the next evaluation
            raise
        if compute_result:
            self.reset()
        return found

    @abstractmethod
    def reset(self) -> None:
        """Forget everything, such as what an evaluation that died has left."""

    @abstractmethod
    def _add_batch(self, prediction: EvalPrediction) -> None:
        """Take in a batch."""

    @abstractmethod
    def _compute(self) -> dict[str, float]:
        """The metrics of what was added since `reset`."""


class TaskMetrics(StreamingMetrics):
    """Metrics of every task, for `Trainer(compute_metrics=...)` with `TrainingArguments(batch_eval_metrics=True)`.

    The Trainer then hands over each batch, gathered from all ranks without the repetitions that fill up the last one,
    and keeps no predictions. Without `batch_eval_metrics` it works too, in one call with everything.

    Three layouts of a batch are read, of `EvalPrediction.predictions` and `label_ids`:

    * every task per row: predictions `[B, K]`, one output a task, and labels `[B, K]`;
    * the same with a tuple of K predictions, `[B, C]` or `[B]` for each task. A tuple of any other length, or with
      labels of another layout, is taken for the predictions with further outputs of the model behind them;
    * one task per row: predictions `[B, C]` (or `[B]`), label_ids = (labels `[B]`, task_ids `[B]`: integers, positions
      in `task_names`), which is what `label_names=["labels", "task_ids"]` gives; for a single task, labels `[B]` alone.

    Missing labels are NaN.

    Args:
        accumulators: task -> what computes its metrics, one object for each task.
        task_names: the K names in the order of the task ids and columns; the same names as in `accumulators`.
        mean_name: name of the mean over tasks (`"glue_score"`): unweighted, of each task's score, which is the mean of
            its metrics (as the GLUE benchmark does with a task's two metrics). None for none.
        mean_of: the metric that is a task's score instead, for the tasks that have it (`"roc_auc"`).
        delta_m_base: `<task>_<metric>` -> result of a model trained on that task alone: the metrics of Delta_m
            (`hf_bilb.metrics.delta_m.delta_m`, in percent, lower is better). None for none.

    Returned, at the last batch: `<task>_<metric>`, for the tasks that have a label in the set, `mean_name` over those
    tasks, and `delta_m` where all its metrics are there (of fewer it would be another figure).
    `metric_for_best_model: eval_<mean_name>` or `eval_<task>_<metric>` chooses a checkpoint by them (set
    `greater_is_better: false` for errors and for Delta_m).

    Attributes:
        keys: what is returned for a set with labels of every task, in order.

    State: that of the accumulators, and two numbers. It ends with the last batch, or an error in here; `reset` drops
    what an evaluation that died elsewhere left (`BilevelMTLTrainer` calls it before every evaluation).

    Cost of a batch: some operations on `[B]` for each of the K tasks, no device synchronisation; of the last one, a few
    host reads for each task.

    Raises:
        OptionError: names that do not match or that would collide, one accumulator for two tasks, a mean over errors
            and scores, or a base that is not above 0.
    """

    def __init__(
        self,
        accumulators: Mapping[str, Accumulator],
        task_names: Sequence[str],
        mean_name: str | None = None,
        mean_of: str | None = None,
        delta_m_base: Mapping[str, float] | None = None,
    ) -> None:
        self.task_names = check_task_names(task_names)
        _check_tasks(accumulators, self.task_names)
        self.accumulators = {name: accumulators[name] for name in self.task_names}
        self.mean_name = mean_name
        self.mean_of = mean_of
        self.delta_m_base = delta_m_base
        self._owners = self._check_keys()
        self.keys = (*self._owners, *self._check_mean(), *self._check_base())
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        for accumulator in self.accumulators.values():
            accumulator.reset()
        # Smallest and largest task id, so that a wrong one is found without reading every batch.
        self._extreme_ids = torch.zeros(2, dtype=torch.int64)

    def _add_batch(self, prediction: EvalPrediction) -> None:
        given, label_ids = prediction.predictions, prediction.label_ids
        if isinstance(label_ids, (tuple, list)):
            self._add_rows(as_tensor("predictions", _first(given)), *_rows(label_ids))
            return
        labels, tasks = as_tensor("label_ids", label_ids), len(self.task_names)
        if isinstance(given, tuple) and len(given) == tasks and labels.ndim == 2 and labels.shape[1] == tasks:
            for index, name in enumerate(self.task_names):
                self._update(name, as_tensor("predictions", given[index]), labels[:, index])
        else:
            self._add_columns(as_tensor("predictions", _first(given)), labels)

    def _add_rows(self, predictions: Tensor, labels: Tensor, task_ids: Tensor) -> None:
        if predictions.ndim not in (1, 2) or not len(predictions) == len(labels) == len(task_ids):
            raise MetricError(
                f"predictions {tuple(predictions.shape)}, labels {tuple(labels.shape)} and task_ids "
                f"{tuple(task_ids.shape)}, expected [B, C], [B] and [B]"
            )
        if len(task_ids) == 0:
            return
        found = torch.stack([task_ids.amin(), task_ids.amax()]).long()
        known = self._extreme_ids.to(found.device)
        self._extreme_ids = torch.stack([torch.minimum(known[0], found[0]), torch.maximum(known[1], found[1])])
        # Rows of other tasks are missing labels to a task: picking rows would have to wait for the device.
        labels = labels if labels.is_floating_point() else wide(labels)
        for index, name in enumerate(self.task_names):
            self._update(name, predictions, labels.where(task_ids == index, torch.nan))

    def _add_columns(self, predictions: Tensor, labels: Tensor) -> None:
        tasks = len(self.task_names)
        if tasks == 1 and labels.ndim == 1:
            self._update(self.task_names[0], predictions, labels)
            return
        if labels.ndim != 2 or labels.shape[1] != tasks or predictions.shape != labels.shape:
            raise MetricError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, expected both [B, {tasks}]; "
                'or labels [B] with task_ids [B], from label_names ["labels", "task_ids"]'
            )
        for index, name in enumerate(self.task_names):
            self._update(name, predictions[:, index], labels[:, index])

    def _update(self, name: str, predictions: Tensor, labels: Tensor) -> None:
        with of_task(name):
            self.accumulators[name].update(predictions, labels)

    def _compute(self) -> dict[str, float]:
        lowest, highest = self._extreme_ids.tolist()
        if lowest < 0 or highest >= len(self.task_names):
            wrong = lowest if lowest < 0 else highest
            raise MetricError(f"task_ids: {wrong} is not valid, expected 0 to {len(self.task_names) - 1}")
        found: dict[str, float] = {}
        scores = []
        for name, accumulator in self.accumulators.items():
            with of_task(name):
                values = accumulator.compute()
            found.update({f"{name}_{metric}": value for metric, value in values.items()})
            scored = [value for metric, value in values.items() if self.mean_of in (None, metric)]
            if scored:
                scores.append(sum(scored) / len(scored))
        delta = self._delta_m(found)
        if self.mean_name is not None and scores:
            found[self.mean_name] = sum(scores) / len(scores)
        return {**found, **delta}

    def _delta_m(self, found: Mapping[str, float]) -> dict[str, float]:
        base = self.delta_m_base
        if base is None or not base.keys() <= found.keys():
            return {}
        higher = [self.accumulators[self._owners[key]].higher_is_better for key in base]
        return {DELTA_M: delta_m([found[key] for key in base], list(base.values()), higher)}

    def _check_keys(self) -> dict[str, str]:
        """Metric key -> task, of a set that has labels of every task."""
        owners: dict[str, str] = {}
        for name, accumulator in self.accumulators.items():
            for metric in accumulator.metric_names:
                key = f"{name}_{metric}"
                if key in owners:
                    raise OptionError(f"task_names: {name!r} and {owners[key]!r} would both have the metric {key!r}")
                owners[key] = name
        return owners

    def _check_mean(self) -> tuple[str, ...]:
        """The mean's key, where there is one."""
        names = {metric for accumulator in self.accumulators.values() for metric in accumulator.metric_names}
        if self.mean_of is not None and self.mean_of not in names:
            raise unknown_name("mean_of", self.mean_of, names)
        if self.mean_name is None:
            if self.mean_of is not None:
                raise OptionError(f"mean_name: is required, since mean_of is {self.mean_of!r}")
            return ()
        if not self.mean_name or self.mean_name in self._owners:
            raise OptionError(f"mean_name: {self.mean_name!r} is not valid, expected a name that is no metric's")
        part = {n: a for n, a in self.accumulators.items() if self.mean_of is None or self.mean_of in a.metric_names}
        first, *others = part.items()
        for name, accumulator in others:
            if accumulator.higher_is_better != first[1].higher_is_better:
                raise OptionError(
                    f"mean_name: {self.mean_name!r} would be a mean of errors and scores, of {first[0]!r} and {name!r}"
                )
        return (self.mean_name,)

    def _check_base(self) -> tuple[str, ...]:
        """The key of Delta_m, where there is a base."""
        if self.delta_m_base is None:
            return ()
        check_base(self.delta_m_base, self._owners)
        if DELTA_M in self._owners or self.mean_name == DELTA_M:
            raise OptionError(f"delta_m_base: {DELTA_M!r} is the key of a metric or of the mean already")
        return (DELTA_M,)


def check_base(base: Mapping[str, float], keys: Collection[str]) -> None:
    """Raise `OptionError` unless the base of Delta_m has a finite number above 0 for some of `keys`, and no other."""
    if not base:
        raise OptionError("delta_m_base: is empty, expected a metric's single-task result or null")
    for key, value in base.items():
        if key not in keys:
            raise OptionError(f"delta_m_base: {key!r} is no metric{nearest(key, keys)}")
        if not (math.isfinite(value) and value > 0):
            raise OptionError(f"delta_m_base.{key}: {value!r} is not valid, expected a finite number above 0")


@contextlib.contextmanager
def of_task(name: str) -> Iterator[None]:
    """A `MetricError` from inside names the task."""
    try:
        yield
    except MetricError as error:
        raise MetricError(f"task {name!r}: {error}") from None


def _check_tasks(accumulators: Mapping[str, Accumulator], task_names: tuple[str, ...]) -> None:
    for name in accumulators:
        if name not in task_names:
            raise OptionError(f"accumulators: {name!r} is no task{nearest(name, task_names)}")
    owners: dict[int, str] = {}
    for name in task_names:
        if name not in accumulators:
            raise OptionError(f"accumulators: task {name!r} has none")
        other = owners.setdefault(id(accumulators[name]), name)
        if other != name:
            raise OptionError(f"accumulators: {other!r} and {name!r} share one, expected one object for each task")


def _rows(label_ids: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Labels `[B]` and task ids `[B]`."""
    expected = 'expected (labels [B], task_ids [B]), from label_names ["labels", "task_ids"] in this order'
    if len(label_ids) != 2:
        raise MetricError(f"label_ids: got {len(label_ids)} entries, {expected}")
    labels, task_ids = as_tensor("labels", label_ids[0]), as_tensor("task_ids", label_ids[1])
    if labels.ndim != 1 or task_ids.ndim != 1 or task_ids.is_floating_point() or task_ids.dtype == torch.bool:
        got = " and ".join(f"{values.dtype} {tuple(values.shape)}" for values in (labels, task_ids))
        raise MetricError(f"label_ids: got {got}, {expected}")
    return labels, task_ids


def _first(predictions: Any) -> Any:
    # Only a tuple: a list is what eval_do_concat_batches=False makes of the batches.
    return predictions[0] if isinstance(predictions, tuple) and predictions else predictions


def as_tensor(name: str, values: Any) -> Tensor:
    """What the Trainer hands over, a tensor or an array, as a tensor; raises `MetricError` for anything else."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values)
    raise MetricError(f"{name}: got {type(values).__name__}, expected a tensor or an array")

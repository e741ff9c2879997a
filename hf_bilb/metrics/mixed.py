"""`MixedMetrics`: the metrics of tasks of different types as a `compute_metrics`; and those of a constant predictor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_bilb.errors import MetricError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.masked import valid_labels
from hf_bilb.losses.task_types import LABELS, TAG_LABELS, TaskType, have_one_output
from hf_bilb.metrics.base import Accumulator
from hf_bilb.metrics.by_type import MEAN_SCORE, chosen_metrics, metric_infos
from hf_bilb.metrics.classification import CLASS_METRICS, ClassMetrics
from hf_bilb.metrics.columns import (
    BinaryColumns,
    ColumnStatistics,
    EntropyColumns,
    RegressionColumns,
    RocAucColumns,
    SpearmanColumns,
)
from hf_bilb.metrics.dense_accumulators import Segmentation
from hf_bilb.metrics.entities import EntityF1
from hf_bilb.metrics.mixed_batch import BatchReader
from hf_bilb.metrics.roc_auc import RocAuc
from hf_bilb.metrics.trainer_metrics import StreamingMetrics, of_task

if TYPE_CHECKING:  # takes seconds to import, and only the name is needed
    from transformers import EvalPrediction

_ROWS = 1024  # of a batch of the constant predictor


class MixedMetrics(StreamingMetrics):
    """Metrics of tasks of any types (`hf_bilb.losses.task_types`), for `Trainer(compute_metrics=...)`.

    With `TrainingArguments(batch_eval_metrics=True)` the Trainer hands over batch by batch, gathered from all ranks
    without the repetitions that fill up the last batch; without, everything in one call. The figures are the same.

    A batch:

    * predictions: `[B, K]` (or `[B]`) where each of the K tasks has one output; else a tuple with a tensor for each
      task, in their order: `[B, D]` regression, `[B, C]` classification, `[B, M]` multi_label, `[B, T, C]`
      token_classification, `[B, C, H, W]` segmentation, `[B, D, H, W]` dense_regression (for one task alone, its tensor
      will do). Further members of the tuple are passed over.
    * label_ids: the columns in the order of `label_names`: `labels [B, W]`, NaN where missing (-100, too, but for
      regression), `tag_labels [B, T, M]`, -100 where missing, and a column for each task of pixels. T may differ from
      batch to batch.

    Args:
        tasks: task -> its type, in the order of the model's outputs. Errors of a regression task are times its `stds`.
        metrics: task -> names of its metrics, the first being the one that `mean_score` takes; tasks that are not in
            it, and all without it, have the default ones (`hf_bilb.metrics.by_type`).
        label_names: the columns of labels, as in `TrainingArguments.label_names`.

    Returned, at the last batch: `<task>_<metric>`, without those that are not defined on the set: all of a task without
    a label, a `roc_auc` where there is one class, an `r2` of constant labels. `mean_score`, the mean over tasks of each
    one's first metric, where all of these are scores with 1 as their ideal, and over the tasks that have it.

    A model that diverged looks no better than it is: a NaN in a class's logits, or a label's, is a wrong answer
    (`normalized_entropy`: NaN), and a NaN that stands for a number makes the task's metrics NaN.

    Attributes:
        keys: what is returned for a set in which every metric is defined, in order.
        infos: title, unit, direction and ideal value of each of them, and whether Delta_m takes it (one of each task).

    State: some numbers for each output; for `roc_auc` and `spearman` prediction and label of every row. It ends with
    the last batch, or an error in here; `reset` drops it.

    Cost of a batch: no device synchronisation; columns of numbers and of binary labels are computed together, for all
    tasks; tasks of classes and of pixels one after the other.

    Raises:
        OptionError: no task; a metric that is unknown or does not fit its task; two metrics of one key; `label_names`
            without a column that the tasks need.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskType],
        metrics: Mapping[str, Sequence[str]] | None = None,
        label_names: Sequence[str] = (LABELS,),
    ) -> None:
        check_task_names(tuple(tasks), "tasks")
        self.tasks = dict(tasks)
        self.metrics = chosen_metrics(self.tasks, metrics)
        self.infos = metric_infos(self.tasks, self.metrics)
        self.keys = tuple(info.key for info in self.infos)
        self._batches = BatchReader(self.tasks, label_names)
        self._columns = _column_groups(self.tasks, self.metrics)
        self._classes = {name: _class_accumulators(task, self.metrics[name]) for name, task in self.tasks.items()}
        self._maps = {name: Segmentation(task.size) for name, task in self.tasks.items() if task.type == "segmentation"}

    def reset(self) -> None:
        """Forget everything."""
        for group in self._columns:
            group.statistics.reset()
        for accumulators in self._classes.values():
            for accumulator in accumulators:
                accumulator.reset()
        for maps in self._maps.values():
            maps.reset()

    def _add_batch(self, prediction: EvalPrediction) -> None:
        outputs, labels = self._batches.read(prediction)
        for group in self._columns:
            group.update(outputs, labels)
        for name, accumulators in self._classes.items():
            for accumulator in accumulators:
                with of_task(name):
                    accumulator.update(*_as_items(accumulator, outputs[name], labels[name]))
        for name, maps in self._maps.items():
            with of_task(name):
                maps.add(maps.per_image(outputs[name].detach(), labels[name]))

    def _compute(self) -> dict[str, float]:
        values: dict[str, dict[str, float]] = {name: {} for name in self.tasks}
        for group in self._columns:
            for name, of_columns in group.compute().items():
                values[name] |= of_columns
        for name, accumulators in self._classes.items():
            for accumulator in accumulators:
                with of_task(name):
                    values[name] |= accumulator.compute()
        for name, maps in self._maps.items():
            with of_task(name):
                values[name] |= maps.compute()
        found = {
            f"{name}_{metric}": values[name][metric]
            for name, metrics in self.metrics.items()
            for metric in metrics
            if metric in values[name]
        }
        return {**found, **self._mean_score(values)}

    def _mean_score(self, values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        firsts = [values[name][metrics[0]] for name, metrics in self.metrics.items() if metrics[0] in values[name]]
        return {MEAN_SCORE: sum(firsts) / len(firsts)} if MEAN_SCORE in self.keys and firsts else {}


# --- who computes what --------------------------------------------------------------------------------------------


class _ColumnGroup:
    """Columns of several tasks in one object."""

    def __init__(self, statistics: ColumnStatistics, metrics: Mapping[str, Sequence[str]]) -> None:
        self.statistics = statistics
        self.metrics = metrics  # task -> those that are wanted

    def update(self, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
        pairs = ([_as_rows(part[name]) for name in self.metrics] for part in (outputs, labels))
        self.statistics.update(*(torch.cat(columns, dim=1) for columns in pairs))

    def compute(self) -> dict[str, dict[str, float]]:
        """Task -> metric -> mean over the task's columns that have it."""
        columns = self.statistics.compute()
        found: dict[str, dict[str, float]] = {}
        for name, metrics in self.metrics.items():
            own = [place for place, owner in enumerate(self.statistics.names) if owner == name]
            known = {key: [v for v in (columns[key][place] for place in own) if v is not None] for key in metrics}
            found[name] = {key: sum(values) / len(values) for key, values in known.items() if values}
        return found


def _as_rows(values: Tensor) -> Tensor:
    """`[B, D]` of `[B, D]`; `[B H W, D]` of `[B, D, H, W]`."""
    return values if values.ndim == 2 else values.movedim(1, -1).flatten(0, 2)


def _column_groups(tasks: Mapping[str, TaskType], chosen: Mapping[str, Sequence[str]]) -> list[_ColumnGroup]:
    """One for each kind of statistics that some task needs."""
    groups = []
    for kind, statistics in (
        ("regression", RegressionColumns),
        ("regression", SpearmanColumns),
        ("multi_label", BinaryColumns),
        ("multi_label", RocAucColumns),
        ("multi_label", EntropyColumns),
    ):
        own = {name: [m for m in chosen[name] if m in statistics.metric_names] for name in tasks}
        wanted = {name: metrics for name, metrics in own.items() if metrics and tasks[name].type == kind}
        if wanted:
            groups.append(_ColumnGroup(_columns_of(statistics, {name: tasks[name] for name in wanted}), wanted))
    dense = {name: task for name, task in tasks.items() if task.type == "dense_regression"}
    # One by one: frames may differ, and joined columns would be a copy of all of them.
    groups += [
        _ColumnGroup(_columns_of(RegressionColumns, {name: dense[name]}), {name: chosen[name]}) for name in dense
    ]
    return groups


def _columns_of(statistics: type[ColumnStatistics], tasks: Mapping[str, TaskType]) -> ColumnStatistics:
    names = [name for name, task in tasks.items() for _ in range(task.size)]
    if issubclass(statistics, RegressionColumns):
        return statistics(names, [std for task in tasks.values() for std in task.stds or (1.0,) * task.size])
    return statistics(names)


def _class_accumulators(task: TaskType, chosen: Sequence[str]) -> list[Accumulator]:
    if not task.has_classes or task.items == "pixels":
        return []
    of_matrix = [metric for metric in chosen if metric in CLASS_METRICS]
    accumulators: list[Accumulator] = [ClassMetrics(task.size, of_matrix)] if of_matrix else []
    accumulators += [RocAuc()] if "roc_auc" in chosen else []
    accumulators += [EntityF1(task.names)] if "f1_entity" in chosen else []
    return accumulators


def _as_items(accumulator: Accumulator, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, C]` and `[B]`, of tokens too but for entities, whose order in a row counts."""
    if labels.ndim == 1 or isinstance(accumulator, EntityF1):
        return outputs, labels
    return outputs.flatten(0, 1), labels.flatten()


# --- the predictor that sees no input -----------------------------------------------------------------------------


def trivial_metrics(
    tasks: Mapping[str, TaskType],
    train_labels: Any,
    test_labels: Any,
    train_tag_labels: Any = None,
    test_tag_labels: Any = None,
    metrics: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """What `MixedMetrics` returns on the test part for a predictor that knows the training labels alone.

    It answers the mean of a number; the logarithms of the shares of classes or tags, hence the most frequent one; of a
    binary label the logarithm of its odds, hence class 1 where it is the more frequent.

    Args:
        tasks, metrics: as in `MixedMetrics`.
        train_labels, test_labels: `[N, W]` and `[N', W]` as in a batch; None where the tasks have no such column.
        train_tag_labels, test_tag_labels: `[N, T, M]` and `[N', T', M]`, -100 where missing; None likewise.

    Raises:
        MetricError: shapes that do not fit; a task without a label in the training part.
        OptionError: as `MixedMetrics`.
    """
    train = _present({LABELS: train_labels, TAG_LABELS: train_tag_labels})
    test = _present({LABELS: test_labels, TAG_LABELS: test_tag_labels})
    batches = zip(*(column.split(_ROWS) for column in test.values()), strict=True)
    return constant_metrics(tasks, constant_outputs(tasks, train), tuple(test), batches, metrics)


def constant_outputs(tasks: Mapping[str, TaskType], train: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The constant predictor's outputs `[size]` for each task.

    Args:
        tasks: of rows and tokens.
        train: columns of labels of the training part.

    Raises:
        MetricError: as `trivial_metrics`.
    """
    known = BatchReader(tasks, tuple(train)).labels(tuple(train.values()))
    outputs = {}
    for name, task in tasks.items():
        with of_task(name):
            outputs[name] = _constant_output(task, known[name])
    return outputs


def constant_metrics(
    tasks: Mapping[str, TaskType],
    outputs: Mapping[str, Tensor],
    label_names: Sequence[str],
    batches: Iterable[Sequence[Tensor]],
    metrics: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """What `MixedMetrics` returns for a model with the same outputs `[size]` for every row, token and pixel.

    Args:
        tasks, metrics, label_names: as in `MixedMetrics`.
        outputs: of each task.
        batches: of the labels, each with the columns of `label_names`.
    """
    from transformers import EvalPrediction

    measured = MixedMetrics(tasks, metrics, label_names)
    for columns in batches:
        labels = dict(zip(label_names, columns, strict=True))
        rows = tuple(_expanded(name, task, outputs[name], labels) for name, task in tasks.items())
        predictions = torch.cat(rows, dim=1) if have_one_output(tasks) else rows
        measured(EvalPrediction(predictions, tuple(columns)), compute_result=False)
    return measured._compute()


def _expanded(name: str, task: TaskType, output: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
    """The output `[size]` for everything in a batch."""
    if task.items == "pixels":
        shape = labels[name].shape
        return output[:, None, None].expand(shape[0], -1, *shape[-2:])
    return output.expand(*(labels[TAG_LABELS].shape[:2] if task.items == "tokens" else labels[LABELS].shape[:1]), -1)


def _present(columns: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(values) for name, values in columns.items() if values is not None}


def _constant_output(task: TaskType, labels: Tensor) -> Tensor:
    """`[size]`, from the task's labels in the training part."""
    if task.has_classes:
        classes = labels[valid_labels(labels)].long()
        if not len(classes):
            raise MetricError("there is no label in the training part")
        if classes.min() < 0 or classes.max() >= task.size:
            raise MetricError(f"labels of the training part: expected classes 0 to {task.size - 1}")
        counts = classes.bincount(minlength=task.size)
        return (counts / counts.sum()).log()
    labels = labels.double() if task.type == "regression" else labels.double().where(valid_labels(labels), torch.nan)
    means = labels.nanmean(dim=0)
    if means.isnan().any():
        raise MetricError("there is no label in the training part")
    return means if task.type == "regression" else means.logit()

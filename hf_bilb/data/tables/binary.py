"""Tables with binary tasks: what their columns are; numbers and one-hot categories in a row, and labels of 0 and 1.

They are read as the data set `table` reads them (`hf_bilb.data.own`), and become rows for any network: `features [F]`
and `labels [K]`, with one output for each task. Numbers are standardised, and categories known, by the training rows
alone; a category that is only in other rows is all zeros there. A row's codes become its one-hot columns when it is
asked for: hundreds of columns would take hundreds of megabytes, and their codes take a few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import FeatureInputs
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.joined import Joined, join_sources
from hf_bilb.data.own.options import InputOptions, OwnDataOptions, Patterns, SplitOptions, TaskOptions
from hf_bilb.data.own.source import Source
from hf_bilb.data.own.table import Encoder, read_cells
from hf_bilb.data.own.words import MISSING
from hf_bilb.data.rows import collate_vectors
from hf_bilb.data.tables.one_hot import OneHotRows
from hf_bilb.data.task_data import MetricInfo, TaskData, binary_losses
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.base import Accumulator
from hf_bilb.metrics.normalized_entropy import NormalizedEntropy
from hf_bilb.metrics.roc_auc import BinaryClassification

if TYPE_CHECKING:
    from transformers import EvalPrediction

#: The mean over the tasks of their areas under the ROC curve.
MEAN_ROC_AUC = "mean_roc_auc"


@dataclass(frozen=True)
class BinaryTask:
    """A task: the column that it is read from, and which values are class 1 and class 0."""

    column: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The columns of a table.

    Attributes:
        columns: of the file, in order.
        numbers: those that are quantities.
        left_out: those that are no features; the tasks' own are none either, whichever tasks are chosen, so that a
            model of one task sees what a model of all sees.
        tasks: every task there is.
    """

    columns: tuple[str, ...]
    numbers: tuple[str, ...]
    left_out: tuple[str, ...]
    tasks: Mapping[str, BinaryTask]

    @property
    def categories(self) -> tuple[str, ...]:
        """The columns whose values are words, or numbers that stand for words."""
        no_features = {*self.numbers, *self.left_out, *(task.column for task in self.tasks.values())}
        return tuple(name for name in self.columns if name not in no_features)

    def options(
        self, files: Patterns | dict[str, Patterns], tasks: Sequence[str] | None, split: SplitOptions
    ) -> OwnDataOptions:
        """The files as a table: with the columns' names in the first line, or without; None: all tasks."""
        chosen = {name: self.tasks[name] for name in (self.tasks if tasks is None else tasks)}
        return OwnDataOptions(
            files=files,
            csv=CsvOptions(columns=self.columns, comment="|"),  # UCI's adult.test begins with a remark
            inputs=InputOptions(numeric=self.numbers, categorical=self.categories),
            tasks={
                name: TaskOptions("classification", task.column, classes={"0": task.negative, "1": task.positive})
                for name, task in chosen.items()
            },
            split=split,
        )


def load_binary(options: OwnDataOptions) -> TaskData:
    """What `Layout.options` says, as everything that the Trainer needs: rows, metrics and losses of the binary tasks.

    Raises:
        OptionError: see `hf_bilb.data.own.data_set.load_own_data`; an empty cell where a number or a label should be.
    """
    joined = join_sources(options)
    (source,) = joined.sources
    _check_complete(joined, source)
    cells = read_cells(source, MISSING)  # an empty cell is a category, too
    encoder = Encoder.fit(source.options.inputs, [cells], [source.split.train], sorted)
    sizes = [len(categories) for categories in encoder.categories]

    def part(name: str) -> OneHotRows:
        (rows,) = joined.rows[name]
        encoded = encoder.encode(cells, rows)
        codes = (encoded["categorical"] - 1).to(torch.int16)
        return OneHotRows(encoded["numeric"], codes, sizes, torch.from_numpy(joined.labels(name)))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return binary_metrics(prediction.predictions, prediction.label_ids, names)

    names = tuple(options.tasks)
    of_categories = [
        f"{column}={value}"
        for column, values in zip(encoder.categorical, encoder.categories, strict=True)
        for value in values
    ]
    return TaskData(
        train=part("train"),
        validation=part("validation"),
        test=part("test"),
        task_names=names,
        label_names=("labels",),
        data_collator=collate_vectors,
        compute_metrics=compute_metrics,
        metrics=binary_metric_infos(names),
        trivial_metrics=_share_predictor(joined.labels("train"), joined.labels("test"), names),
        model_arguments={
            "num_features": len(encoder.numeric) + sum(sizes),
            "task_names": list(names),
            "feature_names": [*encoder.numeric, *of_categories],
            "feature_means": encoder.scale.means.tolist(),
            "feature_stds": encoder.scale.stds.tolist(),
        },
        trivial_predictor="training share",
        task_loss_func=binary_losses,
        format=DataFormat(
            FeatureInputs(
                tuple(encoder.numeric),
                tuple(encoder.scale.means.tolist()),
                tuple(encoder.scale.stds.tolist()),
                tuple(encoder.categorical),
                tuple(map(tuple, encoder.categories)),
            ),
            dict.fromkeys(names, TaskType("multi_label")),
        ),
    )


def _check_complete(joined: Joined, source: Source) -> None:
    """Raise `OptionError` for the first row that is cut short, or lacks a number or a label."""
    source.check_whole()
    for name in source.options.inputs.numeric or ():
        source.check_filled(name, np.isnan(source.numbers(name)), "a number")
    for name, task in source.options.tasks.items():
        column = task.label_columns(name)[0]
        source.check_filled(column, ~joined.tasks[name].has_label, f"a label of the task {name!r}")


# --- losses and metrics -------------------------------------------------------------------------------------------


def binary_metric_infos(names: Sequence[str]) -> tuple[MetricInfo, ...]:
    """What `binary_metrics` returns: three figures for each task, then the mean area."""
    infos = [
        info
        for name in names
        for info in (
            MetricInfo(f"{name}_roc_auc", name, "AUROC", "", higher_is_better=True, ideal=1.0),
            MetricInfo(f"{name}_accuracy", name, "accuracy", "", higher_is_better=True, ideal=1.0),
            MetricInfo(f"{name}_normalized_entropy", name, "NE", "", higher_is_better=False),
        )
    ]
    return (*infos, MetricInfo(MEAN_ROC_AUC, "", "mean AUROC", "", higher_is_better=True, ideal=1.0))


def binary_metrics(logits: NDArray[Any], labels: NDArray[Any], names: Sequence[str]) -> dict[str, float]:
    """Area under the ROC curve, accuracy and normalised entropy of each task; what is not defined is left out.

    Args:
        logits, labels: `[N, K]`; labels NaN where missing.
        names: of the K tasks.
    """
    found: dict[str, float] = {}
    areas = []
    for column, name in enumerate(names):
        accumulators: list[Accumulator] = [BinaryClassification(("roc_auc", "accuracy")), NormalizedEntropy()]
        for accumulator in accumulators:
            accumulator.update(torch.as_tensor(logits[:, column]), torch.as_tensor(labels[:, column]))
            found |= {f"{name}_{metric}": value for metric, value in accumulator.compute().items()}
        areas += [found[key] for key in (f"{name}_roc_auc",) if key in found]
    return {**found, **({MEAN_ROC_AUC: sum(areas) / len(areas)} if areas else {})}


def _share_predictor(train: NDArray[np.float32], test: NDArray[np.float32], names: Sequence[str]) -> dict[str, float]:
    """The metrics on `test [N, K]` of always predicting the share of positive labels in `train [M, K]`."""
    shares = train.mean(axis=0, dtype=np.float64)
    with np.errstate(divide="ignore"):  # a task with one class in the training rows: an infinite logit
        logits = np.log(shares) - np.log1p(-shares)
    return binary_metrics(np.broadcast_to(logits, test.shape).copy(), test, names)

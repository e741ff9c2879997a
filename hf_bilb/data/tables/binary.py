"""Tables with binary tasks: columns become numbers, one-hot codes and labels.

Numbers are standardised, and categories known, by the training rows alone; a category that is only in other rows is all
zeros there. A row's codes become its one-hot columns when it is asked for: hundreds of columns would take hundreds of
megabytes, and their codes take a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import FeatureInputs
from hf_bilb.data.rows import collate_vectors
from hf_bilb.data.splits import Split
from hf_bilb.data.tables.files import BinaryTask, Floats, Layout, TableRows
from hf_bilb.data.tables.one_hot import OneHotRows
from hf_bilb.data.task_data import MetricInfo, Standardizer, TaskData, binary_losses
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.base import Accumulator
from hf_bilb.metrics.normalized_entropy import NormalizedEntropy
from hf_bilb.metrics.roc_auc import BinaryClassification

if TYPE_CHECKING:
    from transformers import EvalPrediction

#: The mean over the tasks of their areas under the ROC curve.
MEAN_ROC_AUC = "mean_roc_auc"


def _codes(words: NDArray[np.object_], train: NDArray[np.int64]) -> tuple[NDArray[np.int16], list[list[str]]]:
    """`[N, C]`, positions among the categories of the training rows (-1: none of them), and those of each column."""
    import pandas as pd

    codes, known = [], []
    for column in words.T:
        values = pd.Series(column).str.strip()
        categories = sorted(set(values.iloc[train]))
        codes.append(pd.Index(categories).get_indexer(values).astype(np.int16))
        known.append(categories)
    return np.stack(codes, axis=1), known


def binary_task_data(rows: TableRows, split: Split, layout: Layout, tasks: Sequence[BinaryTask]) -> TaskData:
    """Everything the Trainer needs: features encoded by the training rows, metrics and losses of the binary tasks."""
    of_numbers = Standardizer.fit(rows.numbers[split.train])
    codes, known = _codes(rows.words, split.train)

    def part(chosen: NDArray[np.int64]) -> OneHotRows:
        numbers = of_numbers.tensor(rows.numbers[chosen])
        labels = torch.from_numpy(rows.labels[chosen]).float()
        return OneHotRows(numbers, torch.from_numpy(codes[chosen]), sizes, labels)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return binary_metrics(prediction.predictions, prediction.label_ids, names)

    names = tuple(task.name for task in tasks)
    sizes = [len(categories) for categories in known]
    of_categories = [
        f"{column}={value}" for column, values in zip(layout.categories, known, strict=True) for value in values
    ]
    return TaskData(
        train=part(split.train),
        validation=part(split.validation),
        test=part(split.test),
        task_names=names,
        label_names=("labels",),
        data_collator=collate_vectors,
        compute_metrics=compute_metrics,
        metrics=binary_metric_infos(names),
        trivial_metrics=_share_predictor(rows.labels[split.train], rows.labels[split.test], names),
        model_arguments={
            "num_features": rows.numbers.shape[1] + sum(sizes),
            "task_names": list(names),
            "feature_names": [*layout.numbers, *of_categories],
            "feature_means": of_numbers.means.tolist(),
            "feature_stds": of_numbers.stds.tolist(),
        },
        trivial_predictor="training share",
        task_loss_func=binary_losses,
        format=DataFormat(
            FeatureInputs(
                layout.numbers,
                tuple(of_numbers.means.tolist()),
                tuple(of_numbers.stds.tolist()),
                layout.categories,
                tuple(map(tuple, known)),
            ),
            dict.fromkeys(names, TaskType("multi_label")),
        ),
    )


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


def _share_predictor(train: Floats, test: Floats, names: Sequence[str]) -> dict[str, float]:
    """The metrics on `test [N, K]` of always predicting the share of positive labels in `train [M, K]`."""
    shares = train.mean(axis=0)
    with np.errstate(divide="ignore"):  # a task with one class in the training rows: an infinite logit
        logits = np.log(shares) - np.log1p(-shares)
    return binary_metrics(np.broadcast_to(logits, test.shape).copy(), test, names)

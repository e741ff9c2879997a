"""SARCOS: the inverse dynamics of a robot arm, seven regression tasks.

Vijayakumar and Schaal, Locally weighted projection regression, ICML 2000; in the form that comes with Rasmussen and
Williams, Gaussian Processes for Machine Learning (2006), section 8.3.7. From 7 joint positions, 7 velocities and 7
accelerations the torque of each of the 7 joints.

Metric: the mean squared error of each joint divided by the variance of its test targets, the book's SMSE (section 2.5),
usually written nMSE: 1 is the error of knowing their mean. Linear regression reaches 0.075 for joint 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import FeatureInputs
from hf_bilb.data.rows import VectorRows, collate_vectors
from hf_bilb.data.tables.options import TableOptions
from hf_bilb.data.task_data import DataSetSpec, MetricInfo, Standardizer, TaskData
from hf_bilb.errors import OptionError
from hf_bilb.losses.masked import masked_mse
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.regression import normalized_mean_squared_error

if TYPE_CHECKING:
    from transformers import EvalPrediction

NUM_FEATURES = 21
TASKS = tuple(f"joint_{number}" for number in range(1, 8))
FEATURES = tuple(f"{what}_{joint}" for what in ("position", "velocity", "acceleration") for joint in range(1, 8))


@dataclass(frozen=True)
class SarcosOptions(TableOptions):
    """`TableOptions`; all tasks are seven joints.

    `file` is an `.npz` whose array `data [N, 28]` holds 21 inputs and 7 torques in every row.
    """

    known_tasks = TASKS


def load_sarcos(options: SarcosOptions) -> TaskData:
    """SARCOS with standardised float32 columns `features [21]` and `labels [K]`.

    Raises:
        OptionError: the file is missing, damaged or laid out in another way, or a value in it is not finite: one line
            with file, row (the first one is 1) and task; too few rows to split.
    """
    path = Path(options.file)
    table = read_sarcos(path)
    names = TASKS if options.tasks is None else options.tasks
    targets = table[:, [NUM_FEATURES + TASKS.index(name) for name in names]]
    split = options.split(len(table))
    of_features = Standardizer.fit(table[split.train, :NUM_FEATURES])
    of_targets = Standardizer.fit(targets[split.train])

    def part(rows: NDArray[np.int64]) -> VectorRows:
        features, labels = of_features.tensor(table[rows, :NUM_FEATURES]), of_targets.tensor(targets[rows])
        return VectorRows({"features": features, "labels": labels})

    def errors(predictions: NDArray[np.floating], labels: NDArray[np.floating]) -> dict[str, float]:
        values = normalized_mean_squared_error(predictions, labels)  # the same in any units
        return {f"nmse_{name}": float(value) for name, value in zip(names, values, strict=True)}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return errors(prediction.predictions, prediction.label_ids)

    test = part(split.test)
    test_labels = test.columns["labels"].numpy()
    return TaskData(
        train=part(split.train),
        validation=part(split.validation),
        test=test,
        task_names=tuple(names),
        label_names=("labels",),
        data_collator=collate_vectors,
        compute_metrics=compute_metrics,
        metrics=tuple(MetricInfo(f"nmse_{name}", name, "nMSE", "", higher_is_better=False) for name in names),
        trivial_metrics=errors(np.zeros_like(test_labels), test_labels),  # the training mean is 0 after standardising
        model_arguments={
            "num_features": NUM_FEATURES,
            "task_names": list(names),
            "feature_names": list(FEATURES),
            "feature_means": of_features.means.tolist(),
            "feature_stds": of_features.stds.tolist(),
            "label_means": of_targets.means.tolist(),
            "label_stds": of_targets.stds.tolist(),
        },
        task_loss_func=squared_errors,
        format=_format(names, of_features, of_targets),
    )


def _format(names: Sequence[str], features: Standardizer, targets: Standardizer) -> DataFormat:
    scales = zip(names, targets.means.tolist(), targets.stds.tolist(), strict=True)
    return DataFormat(
        FeatureInputs(FEATURES, tuple(features.means.tolist()), tuple(features.stds.tolist())),
        {name: TaskType("regression", means=(mean,), stds=(std,)) for name, mean, std in scales},
    )


def read_sarcos(path: Path) -> NDArray[np.float64]:
    """The array `data [N, 28]`; errors as in `load_sarcos`."""
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files if name == "data"}
    except FileNotFoundError:
        raise OptionError(f"data.file: there is no file {str(path)!r}") from None
    except (OSError, ValueError, EOFError, BadZipFile, AttributeError) as error:
        raise OptionError(f"data.file: {path} cannot be read: {' '.join(str(error).split())}") from None
    columns = NUM_FEATURES + len(TASKS)
    if "data" not in found or found["data"].ndim != 2 or found["data"].shape[1] != columns:
        got = f"shape {found['data'].shape}" if found else "none"
        raise OptionError(f"data.file: {path}: array 'data': got {got}, expected [N, {columns}]")
    table = found["data"].astype(np.float64)
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        what = f"task {TASKS[column - NUM_FEATURES]!r}" if column >= NUM_FEATURES else f"input {column + 1}"
        raise OptionError(f"data.file: {path}, row {row + 1}: {what} is {table[row, column]}, expected a finite number")
    return table


def squared_errors(outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean squared errors `[K]` and counts `[K]` of `logits [B, K]` in a model's outputs, in standardised units."""
    return masked_mse(outputs["logits"], batch["labels"])


SPEC = DataSetSpec(options=SarcosOptions, load=load_sarcos)

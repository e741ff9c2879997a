"""Tasks of all types with drawn predictions and labels, and their metrics by scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn import metrics as sklearn
from torch import Tensor
from torch.nn import functional

from hf_bilb.losses.task_types import TaskType

TAGS = ("O", "B-PER", "I-PER")
TASKS = {
    "stars": TaskType("regression", unit="stars", means=(3.0,), stds=(1.5,)),
    "topic": TaskType("classification", 4),
    "size": TaskType("regression", 3, stds=(2.0, 0.5, 10.0)),
    "entities": TaskType("token_classification", 3, names=TAGS),
    "spam": TaskType("classification", 2),
    "flags": TaskType("multi_label", 3),
    "words": TaskType("token_classification", 2, names=("a", "b")),
    "ad": TaskType("multi_label"),
}
#: Every metric of every type.
ALL = {
    "stars": ("mae", "rmse", "mse", "nmse", "r2", "pearson", "spearman"),
    "size": ("spearman", "r2", "mae", "rmse", "mse", "nmse", "pearson"),
    "topic": ("accuracy", "f1_macro", "balanced_accuracy", "matthews"),
    "spam": ("accuracy", "f1", "f1_macro", "balanced_accuracy", "matthews", "roc_auc"),
    "flags": ("f1", "roc_auc", "accuracy", "normalized_entropy"),
    "ad": ("normalized_entropy", "accuracy", "f1", "roc_auc"),
    "entities": ("f1_entity", "accuracy", "f1_macro", "balanced_accuracy", "matthews"),
    "words": ("matthews", "accuracy", "f1", "f1_macro", "balanced_accuracy"),
}
LABEL_NAMES = ("labels", "tag_labels")


@dataclass
class Drawn:
    """Predictions, a tensor for each task, labels `[N, W]` and tags `[N, T, M]`."""

    predictions: tuple[Tensor, ...]
    labels: Tensor
    tags: Tensor

    def batches(self, size: int, padded: bool = False) -> Iterator[SimpleNamespace]:
        """With a T of their own: that of the longest row, and where asked for more, as the Trainer pads: with -100."""
        for rows in torch.arange(len(self.labels)).split(size):
            tags = self.tags[rows]
            length = longest(tags)
            more = 2 if padded else 0
            predictions = tuple(
                functional.pad(p[rows, :length], (0, 0, 0, more), value=-100.0) if p.ndim == 3 else p[rows]
                for p in self.predictions
            )
            columns = (self.labels[rows], functional.pad(tags[:, :length], (0, 0, 0, more), value=-100))
            yield batch(predictions, columns)


def longest(tags: Tensor) -> int:
    """Of `[B, T, M]`: up to the last token that has a tag, 1 at least."""
    places = (tags != -100).any(dim=2).any(dim=0).nonzero()
    return int(places.max()) + 1 if len(places) else 1


def batch(predictions: Any, label_ids: Any) -> SimpleNamespace:
    return SimpleNamespace(predictions=predictions, label_ids=label_ids)


def drawn(rows: int = 90, seed: int = 0, missing: float = 0.2) -> Drawn:
    """Predictions with ties that know something of the labels; rows have 1 to 9 tokens, some of them no tag."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(4).round().div(4)

    def gaps(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < missing

    lengths = 1 + torch.arange(rows) % 9
    beyond = torch.arange(9) >= lengths[:, None]
    predictions, labels, tags = [], [], []
    for task in TASKS.values():
        if task.type == "token_classification":
            own = torch.randint(0, task.size, (rows, 9), generator=generator)
            predictions.append(functional.one_hot(own, task.size) + noise(rows, 9, task.size))
            tags.append(own.masked_fill(beyond | gaps(rows, 9) & (torch.arange(9) > 0), -100))
        elif task.type == "classification":
            own = torch.randint(0, task.size, (rows,), generator=generator)
            predictions.append(functional.one_hot(own, task.size) + noise(rows, task.size))
            labels.append(own.float().masked_fill(gaps(rows), torch.nan)[:, None])
        else:
            outputs = noise(rows, task.size)
            own = outputs + noise(rows, task.size) + 0.3
            own = (own > 0.5).float() if task.type == "multi_label" else own
            predictions.append(outputs)
            labels.append(own.masked_fill(gaps(rows, task.size), torch.nan))
    return Drawn(tuple(predictions), torch.cat(labels, dim=1), torch.stack(tags, dim=2))


def expected(data: Drawn) -> dict[str, float]:
    """`<task>_<metric>` of `ALL`, without `f1_entity`."""
    found: dict[str, float] = {}
    row_column = tag_column = 0
    for (name, task), outputs in zip(TASKS.items(), data.predictions, strict=True):
        if task.type == "token_classification":
            own = data.tags[:, :, tag_column].flatten()
            tag_column += 1
            values = _of_classes(outputs.flatten(0, 1)[own != -100], own[own != -100], ALL[name])
        else:
            own = data.labels[:, row_column : row_column + task.label_width]
            row_column += task.label_width
            if task.type == "classification":
                there = ~own[:, 0].isnan()
                values = _of_classes(outputs[there], own[there, 0], ALL[name])
            else:
                function = _of_numbers if task.type == "regression" else _of_binary
                each = []
                for column in range(task.size):
                    there = ~own[:, column].isnan()
                    scale = task.stds[column] if task.stds else 1.0
                    x, y = (part[there, column].double().numpy() * scale for part in (outputs, own))
                    each.append(function(x, y))
                values = {metric: np.mean([v[metric] for v in each]) for metric in each[0]}
        found |= {f"{name}_{metric}": float(value) for metric, value in values.items()}
    return found


def _of_numbers(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    return {
        "mae": sklearn.mean_absolute_error(y, x),
        "rmse": sklearn.root_mean_squared_error(y, x),
        "mse": sklearn.mean_squared_error(y, x),
        "nmse": sklearn.mean_squared_error(y, x) / np.var(y),
        "r2": sklearn.r2_score(y, x),
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
    }


def _of_binary(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    probabilities = 1 / (1 + np.exp(-x))
    return {
        "f1": sklearn.f1_score(y, x > 0),
        "accuracy": sklearn.accuracy_score(y, x > 0),
        "roc_auc": sklearn.roc_auc_score(y, x),
        "normalized_entropy": sklearn.log_loss(y, probabilities) / sklearn.log_loss(y, np.full(len(y), y.mean())),
    }


def _of_classes(outputs: Tensor, labels: Tensor, wanted: tuple[str, ...]) -> dict[str, float]:
    x, y = outputs.argmax(dim=1).numpy(), labels.long().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {
            "accuracy": sklearn.accuracy_score(y, x),
            "f1_macro": sklearn.f1_score(y, x, average="macro"),
            "balanced_accuracy": sklearn.balanced_accuracy_score(y, x),
            "matthews": sklearn.matthews_corrcoef(y, x),
        }
    if outputs.shape[1] == 2:
        values["f1"] = sklearn.f1_score(y, x)
        values["roc_auc"] = sklearn.roc_auc_score(y, (outputs[:, 1] - outputs[:, 0]).numpy())
    return {metric: value for metric, value in values.items() if metric in wanted}

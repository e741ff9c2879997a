"""A mixture with one task per row, a small model for it, and what its metrics and losses should be, by other means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_bilb.metrics.classification import Accuracy, AccuracyAndF1, MatthewsCorrelation
from hf_bilb.metrics.correlation import PearsonSpearman
from hf_bilb.metrics.trainer_metrics import TaskMetrics

#: Task -> columns of its head; 1: regression.
COLUMNS = {"cola": 2, "mnli": 3, "stsb": 1, "mrpc": 2}
TASKS = tuple(COLUMNS)
LABEL_NAMES = ["labels", "task_ids"]
SCORE = "glue_score"


def task_metrics() -> TaskMetrics:
    return TaskMetrics(
        {"cola": MatthewsCorrelation(), "mnli": Accuracy(3), "stsb": PearsonSpearman(), "mrpc": AccuracyAndF1()},
        TASKS,
        mean_name=SCORE,
    )


class MixtureConfig(PretrainedConfig):
    model_type = "hf_bilb_mixture"

    def __init__(self, **kwargs: Any) -> None:
        self.task_names = list(TASKS)
        self.keys_to_ignore_at_inference = ["losses", "num_items"]
        super().__init__(**kwargs)


@dataclass
class MixtureOutput(ModelOutput):
    losses: Tensor | None = None
    num_items: Tensor | None = None
    logits: Tensor | None = None


class MixtureModel(PreTrainedModel):
    """A shared layer and a head for each task; a row gets the logits of its own task, -inf in further columns."""

    config_class = MixtureConfig
    accepts_loss_kwargs = False

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, columns) for columns in COLUMNS.values())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, features: Tensor, task_ids: Tensor, labels: Tensor | None = None) -> MixtureOutput:
        hidden = self.trunk(features)
        outputs = [head(hidden) for head in self.heads]
        widest = max(COLUMNS.values())
        padded = [functional.pad(out, (0, widest - out.shape[1]), value=-torch.inf) for out in outputs]
        logits = torch.stack(padded, dim=1)[torch.arange(len(features)), task_ids]
        if labels is None:
            return MixtureOutput(logits=logits)
        losses, counts = [], []
        for index, out in enumerate(outputs):
            there = (task_ids == index) & ~labels.isnan()
            values = _losses(out, labels.where(there, 0.0))
            losses.append(values.where(there, 0.0).sum() / there.sum().clamp(min=1))
            counts.append(there.sum())
        return MixtureOutput(losses=torch.stack(losses), num_items=torch.stack(counts), logits=logits)


def _losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """`[B]`: squared error or cross-entropy."""
    if outputs.shape[1] == 1:
        return (outputs[:, 0] - labels).square()
    return functional.cross_entropy(outputs, labels.long(), reduction="none")


def build_mixture_model(seed: int = 1) -> MixtureModel:
    """In float64, with weights that depend on `seed` alone."""
    model = MixtureModel(MixtureConfig()).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model


class MixtureData(Dataset):
    """Rows `{"features": [5], "labels": [], "task_ids": []}`; without `labelled`, no column `labels`."""

    def __init__(self, features: Tensor, labels: Tensor, task_ids: Tensor, labelled: bool = True) -> None:
        self.features, self.labels, self.task_ids, self.labelled = features, labels, task_ids, labelled

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"features": self.features[index], "task_ids": self.task_ids[index]}
        return {**row, "labels": self.labels[index]} if self.labelled else row

    def without_labels(self) -> MixtureData:
        return MixtureData(self.features, self.labels, self.task_ids, labelled=False)


def build_mixture(rows: int, missing: float = 0.2, seed: int = 1) -> MixtureData:
    """Labels float32 as in a text mixture, a share missing.

    The rows of `mrpc` lie in the first half of every eight rows: with four rows a rank, rank 1 has no label of it.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    task_ids = torch.randint(0, 4, (rows,), generator=generator)
    second_half = torch.arange(rows) % 8 >= 4
    task_ids[second_half & (task_ids == 3)] = 0
    noisy = features @ torch.randn(5, 4, dtype=torch.float64, generator=generator)
    noisy = noisy[torch.arange(rows), task_ids] + torch.randn(rows, dtype=torch.float64, generator=generator)
    classes = torch.tensor(list(COLUMNS.values()))[task_ids]
    labels = torch.where(classes == 1, noisy, (noisy.sigmoid() * classes).floor()).float()
    labels[torch.rand(rows, generator=generator) < missing] = torch.nan
    return MixtureData(features, labels, task_ids)


def expected_metrics(model: MixtureModel, data: MixtureData) -> dict[str, float]:
    """`loss`, `loss_<task>`, `<task>_<metric>` and the mean, on the whole set at once, by scikit-learn and scipy."""
    from scipy import stats
    from sklearn import metrics

    found: dict[str, float] = {}
    scores, losses = [], []
    for index, (name, columns) in enumerate(COLUMNS.items()):
        rows = (data.task_ids == index) & ~data.labels.isnan()
        labels = data.labels[rows]
        if not len(labels):
            continue
        with torch.no_grad():
            outputs = model.heads[index](model.trunk(data.features[rows]))
        losses.append(float(_losses(outputs, labels).mean()))
        found[f"loss_{name}"] = losses[-1]
        actual, predicted = labels.numpy(), outputs[:, :columns].argmax(dim=1).numpy()
        if name == "stsb":
            pairs = outputs[:, 0].numpy(), actual.astype(float)
            of_task = {"pearson": stats.pearsonr(*pairs).statistic, "spearman": stats.spearmanr(*pairs).statistic}
        elif name == "cola":
            of_task = {"matthews_correlation": metrics.matthews_corrcoef(actual, predicted)}
        elif name == "mnli":
            of_task = {"accuracy": metrics.accuracy_score(actual, predicted)}
        else:
            of_task = {
                "accuracy": metrics.accuracy_score(actual, predicted),
                "f1": metrics.f1_score(actual, predicted, zero_division=0),
            }
        scores.append(sum(of_task.values()) / len(of_task))
        found.update({f"{name}_{metric}": float(value) for metric, value in of_task.items()})
    return {**found, "loss": sum(losses) / len(losses), SCORE: float(sum(scores) / len(scores))}

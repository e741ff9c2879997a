"""docs/logs.md has the keys that are logged, and no others: short runs of every method, and of what adds keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from hf_bilb import BilevelMTLTrainer, list_balancers
from hf_bilb.metrics.perplexity import Perplexity
from tests.synthetic import SyntheticData, build_data
from tests.trainer.harness import BATCH, FLOAT, TASK_NAMES, arguments, build_model, run

PAGE = (Path(__file__).parents[1] / "docs" / "logs.md").read_text(encoding="utf-8")
LISTED = {
    key for line in re.findall(r"^\| (`.+?) \|", PAGE, flags=re.M) for key in re.findall(r"`([^`]+)`", line)
}  # fmt: skip
DATA_STEPS = 3


def general(key: str, tasks: tuple[str, ...] = TASK_NAMES) -> str:
    """`loss/b` -> `loss/<task>`: as the page writes it."""
    for task in tasks:
        key = re.sub(rf"(?<=[/_]){re.escape(task)}(?=$|[/_])", "<task>", key)
    return re.sub(r"^eval_<task>_(accuracy)$", "eval_<task>_<metric>", key)


def logged(trainer: BilevelMTLTrainer) -> set[str]:
    return {general(key, trainer.task_names) for entry in trainer.state.log_history for key in entry}


def data() -> SyntheticData:
    return build_data(DATA_STEPS * BATCH, dtype=FLOAT)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The keys of all the runs below together."""
    folder = tmp_path_factory.mktemp("logs")
    found: set[str] = set()
    for name in list_balancers():
        options: dict[str, Any] = {"aggregator": "Mean"} if name == "torchjd" else {}
        found |= logged(run(folder, data=data(), balancer={"name": name, **options}).trainer)
    looks = {"gradients": {"every_n_steps": 1}, "lower_level": {"every_n_steps": 1, "inner_steps": 1}}
    found |= logged(run(folder, data=data(), balancer="bilb", diagnostics=looks).trainer)
    for more in (dropped_step, summary, evaluated, set_for_each_task, sampled):
        found |= more(folder)
    return found


def dropped_step(folder: Path) -> set[str]:
    broken = data()
    broken.features[BATCH : 2 * BATCH] = torch.inf
    return logged(run(folder, model=build_model(FLOAT), data=broken, nonfinite_loss="skip").trainer)


class Many(nn.Module):
    """33 tasks, and a loss that is not balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.heads = nn.Linear(4, 8), nn.Linear(8, 33)

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        losses = (self.heads(torch.tanh(self.layer(features))) - labels).square().mean(0)
        return {"losses": losses, "auxiliary_loss": 0.01 * self.layer.weight.square().sum()}


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, labels: int = 33) -> None:
        self.features, self.labels = torch.randn(2 * BATCH, 4), torch.randn(2 * BATCH, labels)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"features": self.features[row], "labels": self.labels[row]}


def summary(folder: Path) -> set[str]:
    settings = {"balancer": "bilb", "task_names": [f"task {k}" for k in range(33)], "label_names": ["labels"]}
    looks = {"gradients": {"every_n_steps": 1}}
    return logged(run(folder, model=Many(), data=Rows(), diagnostics=looks, **settings).trainer)


def evaluated(folder: Path) -> set[str]:
    metrics = {f"{task}_accuracy": 1.0 for task in TASK_NAMES}
    found: set[str] = set()
    for compute in (lambda prediction: metrics, Perplexity()):
        more = {"eval_dataset": data(), "compute_metrics": compute}
        found |= logged(run(folder, data=data(), trainer_arguments=more, eval_strategy="epoch").trainer)
    return found


class OneTask(nn.Module):
    """A batch is of one task."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, features: Tensor, task_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        task = int(task_ids[0])
        return {"losses": {"ab"[task]: (self.layer(features)[:, task] - labels[:, 0]).square().mean()}}


def set_for_each_task(folder: Path) -> set[str]:
    trainer = BilevelMTLTrainer(
        OneTask(),
        arguments(folder, eval_strategy="epoch", train_sampling_strategy="random"),
        train_dataset={"a": Rows(1), "b": Rows(1)},
        eval_dataset={"a": Rows(1), "b": Rows(1)},
    )
    trainer.train()
    return logged(trainer)


class Named(ConcatDataset[dict[str, Tensor]]):
    task_ids = [0] * 2 * BATCH + [1] * 2 * BATCH


class Marked(Rows):
    def __init__(self, task: int) -> None:
        super().__init__(1)
        self.task = task

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {**super().__getitem__(row), "task_ids": torch.tensor(self.task)}


def sampled(folder: Path) -> set[str]:
    settings = {"task_sampling": {"strategy": "uniform", "batches_per_epoch": 2}, "task_names": ["a", "b"]}
    trainer = BilevelMTLTrainer(
        OneTask(),
        arguments(folder, train_sampling_strategy="random", **settings),
        train_dataset=Named([Marked(0), Marked(1)]),
    )
    trainer.train()
    return logged(trainer)


def test_every_logged_key_is_on_the_page(seen: set[str]) -> None:
    by_task = {re.sub(r"^eval_<task>_(runtime|samples_per_second|steps_per_second)$", r"eval_\1", key) for key in seen}
    assert by_task - LISTED == set()


def test_every_key_on_the_page_is_logged(seen: set[str]) -> None:
    assert LISTED - seen == set()

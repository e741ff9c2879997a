"""Whole runs: a resumed one ends where the uninterrupted one does, and the best model is the one that was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.task_losses import masked_mse
from tests.checkpoints.weight_models import ADAPTED, WRAPPED, Branches, OneParameter

STEPS, SAVED = 12, 4


class Rows(torch.utils.data.Dataset):
    def __init__(self, key: str, shape: tuple[int, ...], seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.key, self.inputs = key, torch.randn(32, *shape, generator=random)
        self.labels = torch.randn(32, 2, generator=random)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {self.key: self.inputs[index], "labels": self.labels[index]}


class SharedLayer(OneParameter):
    """Memory that overlaps, in a model that trains."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        hidden = self.c(self.b(self.a(features).tanh()).tanh()) + self.first * self.second
        return {"logits": hidden[:, :2]}


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    key: str
    shape: tuple[int, ...]


PIXELS = ("pixel_values", (3, 16, 16))
CASES = {
    "renamed": Case(WRAPPED["subclass"], *PIXELS),
    "compiled": Case(WRAPPED["compiled_part"], *PIXELS),
    "image_encoder": Case(WRAPPED["image_encoder"], *PIXELS),
    "branches": Case(Branches, "features", (8,)),
    "overlapping": Case(SharedLayer, "features", (6,)),
    "adapters": Case(ADAPTED["unfrozen_beside"], *PIXELS),
    "running_statistics": Case(ADAPTED["running_statistics"], *PIXELS),
}


class Seen(TrainerCallback):
    """The model's state at each evaluation, by its loss."""

    def __init__(self) -> None:
        self.states: list[tuple[float, dict[str, Tensor]]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, metrics: Any, **kwargs: Any) -> None:
        self.states.append((metrics["eval_loss"], {name: t.clone() for name, t in model.state_dict().items()}))


def train(case: Case, folder: Path, resume: str | None = None) -> tuple[BilevelMTLTrainer, Seen]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "balancer": {"name": "bilb", "learning_rate": 0.05},
        "task_names": ["a", "b"],
        "label_names": ["labels"],
        "max_steps": STEPS,
        "save_steps": SAVED,
        "eval_steps": SAVED,
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    seen = Seen()
    trainer = BilevelMTLTrainer(
        case.build(),
        BilevelMTLTrainingArguments(**settings),
        train_dataset=Rows(case.key, case.shape, 0),
        eval_dataset=Rows(case.key, case.shape, 1),
        task_loss_func=lambda outputs, batch: masked_mse(outputs["logits"][:, :2], batch["labels"]),
        callbacks=[seen],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("name", CASES)
def test_resumed_is_uninterrupted_and_best_is_what_was_measured(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    whole, seen = train(case, tmp_path / "whole")
    assert len(seen.states) == STEPS // SAVED
    losses = [loss for loss, _ in seen.states]
    best = losses.index(min(losses))
    assert_equal(whole.model.state_dict(), seen.states[best][1])
    last = seen.states[-1][1]
    assert whole.evaluate()["eval_loss"] == min(losses)
    # From the first checkpoint on, in a model that was built anew.
    _, again = train(case, tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert [loss for loss, _ in again.states] == losses[1:]
    assert_equal(again.states[-1][1], last)


def test_the_layers_are_still_shared(tmp_path: Path) -> None:
    train(CASES["branches"], tmp_path)
    trainer, _ = train(CASES["branches"], tmp_path / "resumed", str(tmp_path / f"checkpoint-{SAVED}"))
    first, second = trainer.model.tasks.values()
    assert first.encoder is second.encoder and first.encoder.weight is second.encoder.weight
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
        id(p) for p in trainer.model.parameters()
    }

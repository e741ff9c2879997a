"""Short runs with an evaluation and a checkpoint every few steps, of models whose weights are hard to bring back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.losses.masked import masked_mse
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

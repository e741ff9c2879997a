"""A small training run that is looked at in its steady steps, and the torch operations of such a step.

What is counted are calls of operations, views and questions about types among them: the same number on every machine.
On a GPU most of them are a launch. Only public names of the library are used, so that it runs on any state of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments

NUM_FEATURES, WIDTH, BATCH = 64, 64, 32
STEADY = 6  # the step that is looked at; earlier ones take references and fill caches


class Counting(TorchDispatchMode):
    """Notes the operations within it.

    Attributes:
        seen: their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(balancer: str | None, num_tasks: int, steps: int = 1) -> list[str]:
    """The operations of one steady step, or of several; without a balancer those of the plain Trainer."""
    counting = Counting()

    def stop() -> None:
        counting.__exit__(None, None, None)

    train(balancer, num_tasks, counting.__enter__, stop, steps=steps, says_items=True)
    return counting.seen


def train(
    balancer: str | None,
    num_tasks: int,
    begin: Callable[[], object],
    end: Callable[[], object],
    own: Mapping[str, Any] | None = None,
    steps: int = 1,
    says_items: bool = False,
) -> None:
    """Train for some steps.

    Args:
        balancer: None: the plain Trainer.
        num_tasks: K.
        begin, end: called when step `STEADY` begins, and when it, or the last of so many `steps`, has ended.
        own: further training arguments.
        says_items: the model returns how many items its losses have; else the library counts labels.
    """

    class Network(nn.Module):
        """A 3-layer MLP; its losses as a vector, or as their sum."""

        num_items: Tensor

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("num_items", torch.full((num_tasks,), float(BATCH)))
            self.layers = nn.Sequential(
                *(nn.Linear(NUM_FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()),
                nn.Linear(WIDTH, num_tasks),
            )

        def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
            losses = (self.layers(features) - labels).square().mean(0)
            if balancer is None:
                return {"loss": losses.sum()}
            return {"losses": losses, "num_items": self.num_items} if says_items else {"losses": losses}

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEADY - 1:
                begin()
            elif state.global_step == STEADY + steps - 1:
                end()

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"features": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}

    generator = torch.Generator().manual_seed(0)
    rows = (STEADY + steps + 2) * 2 * BATCH
    # Rows, so that fetching one is no operation.
    features = torch.randn(rows, NUM_FEATURES, generator=generator).unbind()
    labels = torch.randn(rows, num_tasks, generator=generator).unbind()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1000,
            "max_steps": STEADY + steps,
            "per_device_train_batch_size": BATCH,
            "dataloader_pin_memory": False,
            **(own or {}),
        }
        common: dict[str, Any] = {
            "model": Network(),
            "train_dataset": list(zip(features, labels, strict=True)),
            "data_collator": collate,
            "callbacks": [Marks()],
        }
        if balancer is None:
            trainer = Trainer(args=TrainingArguments(**settings), **common)
        else:
            names = [f"task_{k}" for k in range(num_tasks)]
            args = BilevelMTLTrainingArguments(**settings, balancer=balancer, task_names=names)
            trainer = BilevelMTLTrainer(args=args, **common)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

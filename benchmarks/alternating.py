"""What the benchmarks of training steps share: a small model, the Trainer's CPU time per step, blocks that alternate.

Blocks of different kinds take turns, so that a machine that slows down slows all of them; what is compared is a block
and the mean of the two blocks of the base that lie around it. Times are CPU times of this process, whole steps from one
`on_step_end` to the next, logging included.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.losses.masked import masked_mse

FEATURES = 64
#: Trains for some steps and returns the milliseconds of one.
Block = Callable[[], float]


class Network(nn.Module):
    """An MLP with K regression heads as one layer; returns the losses as a vector, or their sum (`plain`)."""

    def __init__(self, width: int, depth: int, num_tasks: int, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [FEATURES] + [width] * depth
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_tasks))
        self.plain = plain

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        losses, num_items = masked_mse(self.layers(features), labels)
        return {"loss": losses.sum()} if self.plain else {"losses": losses, "num_items": num_items}


def random_rows(count: int, num_tasks: int) -> tuple[Tensor, Tensor]:
    """Features `[count, FEATURES]` and labels `[count, K]`."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, FEATURES, generator=generator),
        torch.randn(count, num_tasks, generator=generator),
    )


class Stopwatch(TrainerCallback):
    """CPU time per step of the last run; the first `warm_up` steps do not count."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time())

    def milliseconds(self) -> float:
        counted = self.times[self.warm_up :]
        return 1e3 * (counted[-1] - counted[0]) / (len(counted) - 1)


def training_block(
    model: nn.Module,
    dataset: Dataset,
    collator: Callable[[list], dict[str, Tensor]],
    *,
    folder: str,
    batch_size: int,
    steps: int,
    warm_up: int,
    balancer: str | dict[str, Any] | None,
    num_tasks: int,
) -> Block:
    """A block of `warm_up + steps` steps of `BilevelMTLTrainer`, or of the plain `Trainer` (`balancer` None)."""
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 20,
        "max_steps": steps + warm_up,
        "per_device_train_batch_size": batch_size,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-4,
    }
    watch = Stopwatch(warm_up)
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": dataset,
        "data_collator": collator,
        "callbacks": [watch],
    }
    if balancer is None:
        trainer = Trainer(args=TrainingArguments(**settings), **common)
    else:
        names = [f"task_{k}" for k in range(num_tasks)]
        args = BilevelMTLTrainingArguments(**settings, balancer=balancer, task_names=names)
        trainer = BilevelMTLTrainer(args=args, **common)
    for callback in (transformers.PrinterCallback, transformers.trainer_callback.ProgressCallback):
        trainer.remove_callback(callback)

    def block() -> float:
        trainer.train()
        return watch.milliseconds()

    return block


@dataclass(frozen=True)
class Pairs:
    """Milliseconds a step of one kind of block, each beside the mean of the base's blocks before and after it."""

    own: list[float]
    base: list[float]

    @property
    def added(self) -> float:
        """The median of what is added to the base, in milliseconds."""
        return statistics.median(own - base for own, base in zip(self.own, self.base, strict=True))

    def ratio(self) -> tuple[float, float, float]:
        """The median of own / base, and the ends of the middle half."""
        ratios = sorted(own / base for own, base in zip(self.own, self.base, strict=True))
        return statistics.median(ratios), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]


def alternate(blocks: Mapping[str, Block], order: Sequence[str], repeats: int) -> tuple[dict[str, Pairs], list[float]]:
    """Run the blocks in `order` over and over.

    Args:
        order: names of blocks; the first is the base, which may stand there again.
        repeats: how often; the base runs once more at the end.

    Returns:
        the pairs of every block but the base, and the base's own times.
    """
    base = order[0]
    run = [(name, blocks[name]()) for name in [*list(order) * repeats, base]]
    pairs: dict[str, Pairs] = {name: Pairs([], []) for name in order if name != base}
    for i, (name, own) in enumerate(run):
        if name != base:
            before = next(other for at, other in reversed(run[:i]) if at == base)
            after = next(other for at, other in run[i:] if at == base)
            pairs[name].own.append(own)
            pairs[name].base.append((before + after) / 2)
    return pairs, [own for name, own in run if name == base]

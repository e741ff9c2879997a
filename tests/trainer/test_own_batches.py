"""A `get_batch_samples` of one's own, with accumulation: in a subclass or put on the trainer, with or without super."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_bilb import BilevelMTLTrainer
from hf_bilb.errors import TrainerError
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    arguments,
    build_data,
    build_model,
    close,
    flat_parameters,
    plain_settings,
    untimed,
)


def every_second(iterator: Any, num_batches: int, device: Any) -> tuple[list, None]:
    """Leaves every second batch out: what was read is not what is trained on."""
    found = []
    for _ in range(num_batches):
        batch = next(iterator, None)
        next(iterator, None)
        if batch is not None:
            found.append(batch)
    return found, None


class Own(BilevelMTLTrainer):
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        return every_second(epoch_iterator, num_batches, device)


class Fewer(BilevelMTLTrainer):
    """Calls super, and drops some of what it gets."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, 2 * num_batches, device)
        return batches[::2], None


def put_there(trainer: BilevelMTLTrainer) -> None:
    trainer.get_batch_samples = every_second  # type: ignore[assignment]


STEPS = 3


def trained(
    folder: Path, cls: Callable[..., Any], prepare: Callable[[Any], None] = lambda trainer: None, **settings: Any
) -> torch.Tensor:
    # Labels with gaps: each micro-batch's share of a window depends on all of its batches.
    data = build_data(6 * STEPS * BATCH, dtype=FLOAT, missing=0.4)
    model = build_model(FLOAT)
    args = arguments(folder, **{"max_steps": STEPS, "gradient_accumulation_steps": 2, "balancer": "bilb", **settings})
    trainer = cls(model=model, args=args, train_dataset=data)
    prepare(trainer)
    trainer.train()
    assert trainer.state.global_step == STEPS
    return flat_parameters(model)


def expected(folder: Path, **settings: Any) -> torch.Tensor:
    """The same batches by a plain data set, which holds no others."""
    data = build_data(6 * STEPS * BATCH, dtype=FLOAT, missing=0.4)
    rows = [data[i] for i in range(len(data)) if i // BATCH % 2 == 0]
    model = build_model(FLOAT)
    args = arguments(folder, **{"max_steps": STEPS, "gradient_accumulation_steps": 2, "balancer": "bilb", **settings})
    BilevelMTLTrainer(model=model, args=args, train_dataset=rows).train()
    return flat_parameters(model)


@pytest.mark.parametrize("balance_over", ["micro_batch", "window"])
def test_several_tasks_are_balanced_over_the_batches_that_it_returns(balance_over: str, tmp_path: Path) -> None:
    wanted = expected(tmp_path, balance_over=balance_over)
    assert close(trained(tmp_path, Own, balance_over=balance_over), wanted)
    assert close(trained(tmp_path, Fewer, balance_over=balance_over), wanted)
    assert close(trained(tmp_path, BilevelMTLTrainer, put_there, balance_over=balance_over), wanted)


def test_training_leaves_no_wrapper_on_the_trainer(tmp_path: Path) -> None:
    trainer = Own(
        model=build_model(FLOAT), args=arguments(tmp_path, max_steps=1), train_dataset=build_data(8, dtype=FLOAT)
    )
    trainer.train()
    assert "get_batch_samples" not in vars(trainer)
    put_there(trainer)
    trainer.train()
    assert trainer.get_batch_samples is every_second


class Ordinary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 1)

    def forward(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        predicted = self.layer(features)
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


@pytest.mark.parametrize("balance_over", ["micro_batch", "window"])
def test_an_ordinary_model_trains_as_with_trainer(balance_over: str, tmp_path: Path) -> None:
    data = build_data(12 * BATCH, num_tasks=1)
    found = []
    for base in (Trainer, BilevelMTLTrainer):

        class Mine(base):  # type: ignore[misc, valid-type]
            def get_batch_samples(self, iterator: Any, num_batches: int, device: Any) -> Any:
                return every_second(iterator, num_batches, device)

        settings = {"gradient_accumulation_steps": 2, "max_steps": STEPS}
        args = (
            TrainingArguments(**plain_settings(tmp_path, **settings))
            if base is Trainer
            else arguments(tmp_path, balance_over=balance_over, **settings)
        )
        trainer = Mine(model=Ordinary(), args=args, train_dataset=data)
        trainer.train()
        found.append((flat_parameters(trainer.model), untimed(trainer.state.log_history)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_a_step_by_hand_does_not_know_its_update(tmp_path: Path) -> None:
    data = build_data(BATCH, dtype=FLOAT)
    batch = {key: torch.stack([data[i][key] for i in range(BATCH)]) for key in data[0]}
    trainer = BilevelMTLTrainer(model=build_model(FLOAT), args=arguments(tmp_path, gradient_accumulation_steps=2))
    with pytest.raises(TrainerError, match=r"^gradient_accumulation_steps: 2 micro-batches make an update"):
        trainer.training_step(trainer.model, batch)

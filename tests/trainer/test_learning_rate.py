"""`step_lr`: torch's StepLR by epochs, under accumulation, with `max_steps`, over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bilb.errors import OptionError
from hf_bilb.experiments.recipe import parse_recipe
from tests.synthetic import build_data
from tests.trainer.harness import BATCH, FLOAT, arguments, run

STEP = {"epochs": 2, "factor": 0.3}
DATA = build_data(5 * BATCH - 1, dtype=FLOAT)  # 5 batches an epoch, the last one short


def expected(updates_per_epoch: int, epochs: int) -> list[float]:
    """The rate after each update: torch's StepLR stepped once an epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=STEP["epochs"], gamma=STEP["factor"])
    rates = []
    for _ in range(epochs):
        rates += [schedule.get_last_lr()[0]] * updates_per_epoch
        optimizer.step()
        schedule.step()
    return rates


def rates(folder: Path, **settings: Any) -> list[float]:
    return run(folder, data=DATA, step_lr=STEP, **settings).record.learning_rates


# What a callback sees after update i is the rate of update i + 1.
def test_equals_torchs_step_schedule(tmp_path: Path) -> None:
    assert rates(tmp_path, num_train_epochs=5)[:-1] == pytest.approx(expected(5, 5)[1:], rel=1e-12)


def test_counts_updates_under_accumulation(tmp_path: Path) -> None:
    found = rates(tmp_path, num_train_epochs=5, gradient_accumulation_steps=2)
    assert found[:-1] == pytest.approx(expected(3, 5)[1:], rel=1e-12)


def test_counts_epochs_when_steps_end_the_run(tmp_path: Path) -> None:
    found = rates(tmp_path, max_steps=12)
    assert found == pytest.approx(expected(5, 3)[1:13], rel=1e-12)


def test_goes_on_after_a_resume(tmp_path: Path) -> None:
    whole = rates(tmp_path / "whole", num_train_epochs=5)
    run(tmp_path / "parts", data=DATA, step_lr=STEP, num_train_epochs=5, save_strategy="epoch", max_steps=-1)
    checkpoint = tmp_path / "parts" / "checkpoint-10"
    again = run(tmp_path / "again", data=DATA, step_lr=STEP, num_train_epochs=5)
    again.record.learning_rates.clear()
    again.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert again.record.learning_rates == whole[10:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_lr": {"epochs": 0, "factor": 0.3}}, "step_lr.epochs: 0 is not valid"),
        ({"step_lr": {"epochs": 3, "factor": 1.5}}, "step_lr.factor: 1.5 is not valid"),
        ({"step_lr": {"epoch": 3, "factor": 0.5}}, "step_lr.epoch: unknown option"),
        ({"step_lr": STEP, "lr_scheduler_type": "cosine"}, "step_lr: does not go with lr_scheduler_type 'cosine'"),
        ({"step_lr": STEP, "warmup_steps": 3}, "step_lr: does not go with lr_scheduler_type 'constant' and warmup"),
    ],
)
def test_mistakes_are_one_line(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        arguments(tmp_path, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "step_lr",
            {"epochs": 3, "faktor": 0.3},
            'trainer.step_lr.faktor: unknown option, value 0.3 (did you mean "fac',
        ),
        ("diagnostics", {"every_n_stepz": 3}, "trainer.diagnostics.every_n_stepz: unknown option, value 3"),
        ("task_sampling", {"strategie": "uniform"}, "trainer.task_sampling.strategie: unknown option, value 'uniform'"),
    ],
)
def test_a_recipe_is_checked_in_its_nested_settings_too(key: str, value: Any, message: str) -> None:
    recipe = {"model": "qm9_mlp", "data": "qm9", "balancer": "ls", "trainer": {"output_dir": "runs/x", key: value}}
    with pytest.raises(OptionError) as error:
        parse_recipe(recipe, "x")
    assert str(error.value).startswith(message)

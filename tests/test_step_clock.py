"""The clock of a run's updates, in the Trainer of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_bilb.experiments import timing
from hf_bilb.experiments.timing import WARM_UP_UPDATES, StepClock

STEP, FIRST, EVALUATION, SAVE = 1.0, 20.0, 1000.0, 10_000.0  # seconds


class Time:
    """A `time` whose clock goes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock_time(monkeypatch) -> Time:
    fake = Time()
    monkeypatch.setattr(timing, "time", fake)
    return fake


class Slow(nn.Module):
    """A linear model whose training forward takes `STEP` seconds; its first two take `FIRST`."""

    def __init__(self, clock_time: Time) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.calls = 0
        self.time = clock_time

    def forward(self, x, labels):
        if self.training:
            self.calls += 1
            self.time.now += FIRST if self.calls <= 2 else STEP
        return {"loss": (self.linear(x) - labels).square().mean(), "logits": self.linear(x)}


class SlowSave(TrainerCallback):
    def __init__(self, clock_time: Time) -> None:
        self.time = clock_time

    def on_save(self, args, state, control, **kwargs):
        self.time.now += SAVE


def trained(clock_time: Time, folder, steps: int, resume: bool = False, **settings) -> tuple[Trainer, StepClock]:
    def measure(_prediction):
        clock_time.now += EVALUATION
        return {}

    clock = StepClock()
    rows = [{"x": torch.tensor([1.0, i]), "labels": torch.tensor([float(i)])} for i in range(8)]
    chosen = {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, "learning_rate": 1e-4, **settings}
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to="none", **chosen
    )
    callbacks = [clock, SlowSave(clock_time)]
    trainer = Trainer(
        Slow(clock_time), args, train_dataset=rows, eval_dataset=rows, compute_metrics=measure, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, clock


def evaluations(trainer: Trainer) -> list[float]:
    return [entry["training_seconds"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_evaluations_and_checkpoints_are_not_counted_and_a_resumed_run_goes_on(clock_time, tmp_path):
    trainer, clock = trained(clock_time, tmp_path, 20)
    assert evaluations(trainer) == [2 * FIRST + 8 * STEP, 2 * FIRST + 18 * STEP]
    assert clock.training_seconds == 2 * FIRST + 18 * STEP
    assert clock.step_seconds == STEP, "the slow first updates are no part of the mean"
    assert clock.facts() == {
        "training_seconds": 58.0,
        "step_seconds": 1.0,
        "peak_memory_bytes": clock.peak_memory_bytes,
    }
    assert 50e6 < clock.peak_memory_bytes < 100e9
    kept = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["StepClock"]["attributes"]["timed_updates"] == 20 - WARM_UP_UPDATES

    resumed, clock = trained(clock_time, tmp_path, 40, resume=True)
    assert evaluations(resumed) == [48.0, 58.0, 58.0 + 48.0, 58.0 + 58.0]
    assert (clock.training_seconds, clock.step_seconds) == (116.0, STEP)

    # Resumed when there is nothing left to train: the figures of before stay.
    finished, again = trained(clock_time, tmp_path, 40, resume=True)
    assert (again.training_seconds, again.step_seconds) == (116.0, STEP)
    assert again.peak_memory_bytes >= clock.peak_memory_bytes
    assert evaluations(finished) == evaluations(resumed)


def test_checkpoints_between_evaluations_are_not_counted(clock_time, tmp_path):
    trainer, clock = trained(clock_time, tmp_path, 20, save_steps=4)
    assert evaluations(trainer) == [2 * FIRST + 8 * STEP, 2 * FIRST + 18 * STEP]
    assert clock.step_seconds == STEP


def test_by_epoch_and_with_accumulation(clock_time, tmp_path):
    trainer, clock = trained(
        clock_time,
        tmp_path,
        8,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
    )
    assert evaluations(trainer) == [2 * FIRST + 2 * STEP * i for i in range(8)]  # two batches, one update an epoch
    assert clock.step_seconds == 2 * STEP


def test_a_run_of_few_updates_has_no_mean_of_an_update(clock_time, tmp_path):
    _, clock = trained(clock_time, tmp_path, 3, eval_strategy="no", save_strategy="no")
    assert clock.step_seconds is None
    assert clock.training_seconds == 2 * FIRST + STEP


def test_a_trainer_that_trains_twice_counts_the_second_time_alone(clock_time, tmp_path):
    trainer, clock = trained(clock_time, tmp_path, 10, eval_strategy="no", save_strategy="no")
    trainer.train()
    assert clock.training_seconds == 10 * STEP


def test_a_checkpoint_from_before_there_was_a_clock(clock_time, tmp_path):
    trained(clock_time, tmp_path, 10)
    path = tmp_path / "checkpoint-10" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["StepClock"]
    path.write_text(json.dumps(state))
    _, clock = trained(clock_time, tmp_path, 20, resume=True)
    assert clock.training_seconds == 2 * FIRST + 8 * STEP

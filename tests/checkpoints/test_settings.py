"""Trainer's settings around checkpoints: what the balancer has to do with each."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer
from hf_bilb.trainer.checkpointing import TENSORS
from tests.checkpoints.runs import BILB, DOUBLE, QM9, Begin, Run, build_trainer
from tests.synthetic import build_data


class StateAtBegin(TrainerCallback):
    """Copies the balancer's state at each beginning of a run, and once more after its first step."""

    def __init__(self) -> None:
        self.began: list[dict[str, torch.Tensor]] = []
        self.after_first_step: dict[str, torch.Tensor] = {}

    def on_train_begin(self, *args: Any, balancer: Any = None, **kwargs: Any) -> None:
        self.began.append(balancer.state_dict())

    def on_step_end(self, args: Any, state: Any, control: Any, balancer: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.after_first_step = balancer.state_dict()


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- save_only_model ----------------------------------------------------------------------------------------------


def test_save_only_model_resumes_with_a_fresh_balancer_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(0, 0, {"balancer": BILB, "num_train_epochs": 1, "save_only_model": True})
    build_trainer(run, tmp_path).train()
    assert not (tmp_path / "checkpoint-10" / TENSORS).exists()
    trainer = build_trainer(run, tmp_path)
    fresh = trainer.balancer.state_dict()
    state, begin = StateAtBegin(), Begin()
    trainer.add_callback(state)
    trainer.add_callback(begin)
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert begin.step == 10
    assert same_state(state.began[0], fresh)
    assert any("FRESH" in m and "checkpoint-10" in m and "save_only_model" in m for m in caplog.messages)


# --- load_best_model_at_end ---------------------------------------------------------------------------------------

#: The evaluation loss of `gamma` is lowest after 25 of 33 steps.
BEST = Run(
    0,
    0,
    {
        "balancer": BILB,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "load_best_model_at_end": True,
        "save_total_limit": 2,
        "metric_for_best_model": "eval_loss_gamma",
        "greater_is_better": False,
        "learning_rate": 0.02,
    },
)


def best_run(folder: Path) -> BilevelMTLTrainer:
    trainer = build_trainer(BEST, folder)
    trainer.train()
    return trainer


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_the_balancer_is_that_of_the_best_checkpoint(tmp_path: Path) -> None:
    trainer = best_run(tmp_path)
    best = Path(trainer.state.best_model_checkpoint)
    last = tmp_path / "checkpoint-33"
    assert best == tmp_path / "checkpoint-25"
    assert same_state(trainer.balancer.state_dict(), load_file(best / TENSORS))
    assert not same_state(trainer.balancer.state_dict(), load_file(last / TENSORS))
    weights = load_file(best / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_rotation_keeps_the_best_and_the_last(tmp_path: Path) -> None:
    best_run(tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-25", "checkpoint-33"]


def test_saved_states_name_checkpoints_that_exist(tmp_path: Path) -> None:
    best_run(tmp_path)
    for name in checkpoints(tmp_path):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        named = Path(state["best_model_checkpoint"])
        assert named.parent == tmp_path
        assert named.is_dir() and "_incomplete" not in str(named)


def test_the_best_checkpoint_is_found_after_the_run_was_moved(tmp_path: Path) -> None:
    best_run(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = build_trainer(BEST, tmp_path / "there", max_steps=35)
    moved.train(resume_from_checkpoint=True)
    # As with `Trainer`, which looks for the best one so far beside the checkpoint that it writes.
    assert Path(moved.state.best_model_checkpoint) == tmp_path / "there" / "checkpoint-25"
    assert checkpoints(tmp_path / "there") == ["checkpoint-25", "checkpoint-35"]


# --- auto_find_batch_size -----------------------------------------------------------------------------------------


class OutOfMemoryOnce:
    """Wraps a model's forward: the third call fails as a full GPU does."""

    def __init__(self, model: Any) -> None:
        self.calls = 0
        self.forward = model.forward
        model.forward = self

    def __call__(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("CUDA out of memory.")
        return self.forward(features=features, labels=labels)


@pytest.mark.parametrize(
    "more",
    [
        {},
        # The call that fails is the pass that counts, or lies in the inner loop, where the model's parameters are z.
        {"balance_over": "window", "gradient_accumulation_steps": 2},
        {"balancer": DOUBLE},
    ],
    ids=["batch", "window", "double loop"],
)
def test_auto_find_batch_size_starts_with_a_fresh_balancer(more: dict[str, Any], tmp_path: Path) -> None:
    # With learning rate 0 the failed attempt leaves the model alone, so that what follows equals a run that had the
    # smaller batch from the start. The balancer has its own learning rate.
    settings = {"balancer": QM9, "learning_rate": 0.0, "save_strategy": "no", "train_sampling_strategy": "sequential"}
    accumulation = more.get("gradient_accumulation_steps", 1)
    run = Run(0, 0, {**settings, "num_train_epochs": 1, **more}, dropout=0.0, accumulation=accumulation)
    found = build_trainer(run, tmp_path, auto_find_batch_size=True)
    OutOfMemoryOnce(found.model)
    at_begin = StateAtBegin()
    found.add_callback(at_begin)
    found.train()
    smaller = int(0.9 * run.batch)
    assert found._train_batch_size == smaller
    assert len(at_begin.began) == 2
    # z is set to the model's parameters when it starts.
    began = [{key: value for key, value in b.items() if not key.startswith("lower_level.z.")} for b in at_begin.began]
    assert same_state(began[0], began[1]) and not began[1].get("lower_level.started", False)

    expected = build_trainer(run, tmp_path, per_device_train_batch_size=smaller)
    expected_begin = StateAtBegin()
    expected.add_callback(expected_begin)
    expected.train()
    assert same_state(at_begin.after_first_step, expected_begin.after_first_step)
    assert torch.equal(found.balancer.reference_losses, expected.balancer.reference_losses)
    assert same_state(found.balancer.state_dict(), expected.balancer.state_dict())
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (found, expected)]
    assert losses[0] == losses[1] != []


# --- epochs -------------------------------------------------------------------------------------------------------


class References(TrainerCallback):
    """Notes the steps after which the reference losses are other ones than before; may end each epoch early."""

    def __init__(self, steps_in_epoch: int | None = None) -> None:
        self.steps_in_epoch = steps_in_epoch
        self.taken: list[int] = []
        self.last: torch.Tensor | None = None
        self.steps = 0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, balancer: Any = None, **kwargs: Any) -> None:
        self.steps += 1
        control.should_epoch_stop = self.steps == self.steps_in_epoch
        if self.last is None or not torch.equal(self.last, balancer.reference_losses):
            self.taken.append(state.global_step)
        self.last = balancer.reference_losses.clone()


class Stream(IterableDataset):
    """The rows of another data set, without its length."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (self.rows[i] for i in range(len(self.rows)))


EPOCHS = Run(0, 0, {"balancer": QM9, "save_strategy": "no"})


@pytest.mark.parametrize(
    ("stream", "steps_in_epoch", "max_steps", "expected"),
    [(False, None, 33, [1, 12, 23]), (True, None, 33, [1, 12, 23]), (False, 4, 30, [1, 5, 9])],
    ids=["whole epochs", "unknown length", "epochs cut short"],
)
def test_references_are_taken_once_in_every_epoch(
    tmp_path: Path, stream: bool, steps_in_epoch: int | None, max_steps: int, expected: list[int]
) -> None:
    trainer = build_trainer(EPOCHS, tmp_path, max_steps=max_steps)
    rows = build_data(EPOCHS.rows)
    trainer.train_dataset = Stream(rows) if stream else rows
    references = References(steps_in_epoch)
    trainer.add_callback(references)
    trainer.train()
    assert references.taken == expected

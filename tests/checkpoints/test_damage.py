"""A damaged, foreign or incomplete checkpoint: one clear line that names the file, before anything is trained."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_bilb.checkpointing import DESCRIPTION, MARKER, STAGING, TENSORS, verify
from hf_bilb.errors import CheckpointError
from tests.checkpoints.runs import Begin, Run, build_trainer
from tests.synthetic import build_data, build_model, flat_parameters

RUN = Run(0, 0, {"balancer": "bilb", "num_train_epochs": 1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with `checkpoint-5`, `checkpoint-10` and `checkpoint-11`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    build_trainer(RUN, folder).train()
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def scramble(path: Path) -> None:
    """Other bytes, same size: no size gives it away."""
    path.write_bytes(b"\x93" * path.stat().st_size)


def delete(path: Path) -> None:
    path.unlink()


def assert_refused(
    run_folder: Path, pattern: str, run: Run = RUN, last: str = "checkpoint-11", **settings: Any
) -> None:
    trainer = build_trainer(run, run_folder, **settings)
    before = flat_parameters(trainer.model)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        trainer.train(resume_from_checkpoint=str(run_folder / last))
    assert "\n" not in str(caught.value)
    assert str(run_folder / last) in str(caught.value)
    assert trainer.state.global_step == 0
    assert torch.equal(flat_parameters(trainer.model), before), "nothing may be loaded from it"


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION, "model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_truncated_file(run_folder: Path, name: str) -> None:
    truncate(run_folder / "checkpoint-11" / name)
    assert_refused(run_folder, rf"{name}: is damaged or truncated: \d+ bytes, expected \d+")


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION, "model.safetensors", "rng_state.pth"])
def test_a_missing_file(run_folder: Path, name: str) -> None:
    delete(run_folder / "checkpoint-11" / name)
    assert_refused(run_folder, f"{name}: is missing")


@pytest.mark.parametrize(
    ("name", "pattern"), [(TENSORS, "no safetensors file"), (DESCRIPTION, "damaged"), (MARKER, "is damaged")]
)
def test_scrambled_content(run_folder: Path, name: str, pattern: str) -> None:
    scramble(run_folder / "checkpoint-11" / name)
    assert_refused(run_folder, f"{name}: .*{pattern}")


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": []}', '{"files": 3}'])
def test_a_marker_of_another_form(run_folder: Path, content: str) -> None:
    (run_folder / "checkpoint-11" / MARKER).write_text(content)
    assert_refused(run_folder, f"{MARKER}: is damaged")


def test_no_marker(run_folder: Path) -> None:
    delete(run_folder / "checkpoint-11" / MARKER)
    assert_refused(run_folder, f"has no {MARKER}: writing it was not finished")


def test_another_balancer(run_folder: Path) -> None:
    assert_refused(run_folder, f"{DESCRIPTION}: was saved by balancer 'bilb', this run uses 'uw'", balancer="uw")


def test_the_same_method_with_state_of_another_kind(run_folder: Path) -> None:
    sgd = {"name": "bilb", "optimizer": "sgd"}
    assert_refused(run_folder, f"{TENSORS}: .*entry .*exp_avg", balancer=sgd)


def test_other_task_names(run_folder: Path) -> None:
    other = Run(0, 0, RUN.settings, task_names=["alpha", "beta", "gamma", "epsilon"])
    assert_refused(run_folder, f"{DESCRIPTION}: .*task 3 is 'delta' there and 'epsilon' in this run", other)


def test_another_number_of_tasks(run_folder: Path) -> None:
    other = Run(0, 0, RUN.settings, task_names=["alpha", "beta", "gamma"])
    assert_refused(run_folder, f"{DESCRIPTION}: was saved for 4 tasks, this run has 3", other)


def test_a_checkpoint_of_a_plain_trainer(tmp_path: Path) -> None:
    class SumTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs).losses.sum()

    args = TrainingArguments(str(tmp_path), max_steps=2, save_steps=2, report_to="none", use_cpu=True)
    SumTrainer(model=build_model(), args=args, train_dataset=build_data(16)).train()
    assert_refused(tmp_path, f"has no {MARKER}: .*not by BilevelMTLTrainer", last="checkpoint-2")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(tmp_path, "there is no such checkpoint folder", last="checkpoint-7")


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no complete checkpoint to resume from"):
        build_trainer(RUN, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", [truncate, delete])
def test_resuming_from_the_last_passes_over_a_damaged_one(
    run_folder: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(run_folder / "checkpoint-11" / "model.safetensors")
    trainer = build_trainer(RUN, run_folder, num_train_epochs=2)
    begin = Begin()
    trainer.add_callback(begin)
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        trainer.train(resume_from_checkpoint=True)
    assert begin.step == 10
    assert any("passing over" in m and "checkpoint-11" in m for m in caplog.messages)


def test_other_options_are_said(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_trainer(RUN, run_folder, balancer={"name": "bilb", "learning_rate": 0.2}, num_train_epochs=2)
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        trainer.train(resume_from_checkpoint=True)
    assert any(DESCRIPTION in m and "other options" in m for m in caplog.messages)


def test_a_half_written_folder_of_an_older_tool_is_passed_over(run_folder: Path) -> None:
    # What a killed plain Trainer leaves: the highest number, and half of the files.
    half = run_folder / "checkpoint-99"
    half.mkdir()
    shutil.copy(run_folder / "checkpoint-11" / "model.safetensors", half)
    trainer = build_trainer(RUN, run_folder, num_train_epochs=2)
    begin = Begin()
    trainer.add_callback(begin)
    trainer.train(resume_from_checkpoint=True)
    assert begin.step == 11


def test_the_marker_lists_every_file(trained: Path) -> None:
    checkpoint = trained / "checkpoint-10"
    listed = json.loads((checkpoint / MARKER).read_text())["files"]
    assert listed == {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.name != MARKER}
    assert {
        TENSORS,
        DESCRIPTION,
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    } <= listed.keys()


def test_a_kill_between_the_two_renames_that_replace_a_checkpoint(run_folder: Path) -> None:
    staging = run_folder / STAGING
    shutil.copytree(run_folder / "checkpoint-11", staging / "checkpoint-11")
    (run_folder / "checkpoint-11").rename(staging / "replaced-checkpoint-11")
    trainer = build_trainer(RUN, run_folder, num_train_epochs=2)
    begin = Begin()
    trainer.add_callback(begin)
    trainer.train(resume_from_checkpoint=True)
    assert begin.step == 11
    assert not staging.exists()


def test_a_run_started_over_replaces_the_checkpoints_of_the_first(run_folder: Path) -> None:
    before = load_file(run_folder / "checkpoint-10" / TENSORS)
    build_trainer(RUN, run_folder, seed=6).train()
    assert not torch.equal(
        before["memory.last_losses"], load_file(run_folder / "checkpoint-10" / TENSORS)["memory.last_losses"]
    )
    assert sorted(p.name for p in run_folder.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-5"]
    verify(run_folder / "checkpoint-10")

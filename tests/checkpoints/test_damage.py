"""A damaged, foreign or incomplete checkpoint: one clear line that names the file, before anything is trained."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_bilb.errors import CheckpointError
from hf_bilb.storage.folder_lock import LOCK_FILE
from hf_bilb.trainer.checkpointing import DESCRIPTION, MARKER, STAGING, TENSORS, verify
from tests.checkpoints.runs import Begin, Run, build_trainer
from tests.synthetic import flat_parameters

RUN = Run(0, 0, {"balancer": "bilb", "num_train_epochs": 1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with `checkpoint-5`, `checkpoint-10` and `checkpoint-11`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    build_trainer(RUN, folder).train()
    return folder


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with another seed: files of the same sizes."""
    folder = tmp_path_factory.mktemp("other") / "run"
    build_trainer(RUN, folder, seed=6).train()
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


def flip(path: Path, place: float = 0.5) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x40
    path.write_bytes(content)


def forget_digests(checkpoint: Path) -> None:
    """As a former version marked it."""
    marker = json.loads((checkpoint / MARKER).read_text())
    (checkpoint / MARKER).write_text(json.dumps({"format": 2, "files": marker["files"]}))


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
    assert not (run_folder / LOCK_FILE).exists(), "a refused run lets the folder go"
    assert trainer.state.global_step == 0
    assert torch.equal(flat_parameters(trainer.model), before), "nothing may be loaded from it"


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION, "model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_truncated_file(run_folder: Path, name: str) -> None:
    truncate(run_folder / "checkpoint-11" / name)
    assert_refused(run_folder, rf"{name}: is damaged or truncated: \d+ bytes, expected \d+")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_a_missing_file_without_which_nothing_goes_on(run_folder: Path, name: str) -> None:
    delete(run_folder / "checkpoint-11" / name)
    assert_refused(run_folder, f"Can't find a valid checkpoint at .*checkpoint-11: .*{name}: is missing")


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION, MARKER])
def test_scrambled_content(run_folder: Path, name: str) -> None:
    scramble(run_folder / "checkpoint-11" / name)
    assert_refused(run_folder, f"{name}: is damaged")


#: What a resume would load without noticing.
OF_TENSORS = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", TENSORS]


@pytest.mark.parametrize("name", OF_TENSORS)
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_flipped_bit_in_a_file_of_tensors(run_folder: Path, name: str, place: float) -> None:
    flip(run_folder / "checkpoint-11" / name, place)
    assert_refused(run_folder, rf"{name}: is damaged or another run's: its SHA-256 is \w+\.\.\., saved was \w+\.\.\.")


@pytest.mark.parametrize("name", OF_TENSORS)
def test_a_file_of_another_run(run_folder: Path, other_run: Path, name: str) -> None:
    theirs, ours = other_run / "checkpoint-11" / name, run_folder / "checkpoint-11" / name
    if name == "scheduler.pt":  # alike in both runs
        theirs = run_folder / "checkpoint-10" / name
    assert theirs.read_bytes() != ours.read_bytes()
    assert theirs.stat().st_size == ours.stat().st_size or name == "rng_state.pth"
    shutil.copy(theirs, ours)
    assert_refused(run_folder, f"{name}: is damaged or (another run's|truncated)")


def test_the_description_of_another_run(run_folder: Path, other_run: Path) -> None:
    shutil.copy(other_run / "checkpoint-11" / DESCRIPTION, run_folder / "checkpoint-11")
    assert_refused(run_folder, f"{DESCRIPTION}: is damaged or (another run's|truncated)")


@pytest.mark.parametrize("old", ['"finite_weights": true', '"run": "', '"model.safetensors": "', '"saved": 1'])
def test_a_flipped_bit_in_the_marker(run_folder: Path, old: str) -> None:
    path = run_folder / "checkpoint-11" / MARKER
    text = path.read_text()
    new = (
        text.replace("true", "null") if "true" in old else text.replace(old, f"{old}0" if old[-1] == "1" else old + "a")
    )
    assert new != text
    path.write_text(new)
    assert_refused(run_folder, f"{MARKER}: is damaged")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda text: text.replace('"global_step"', '"global_stop"'), "global_step is None, expected the number"),
        (
            lambda text: text.replace('"global_step": 11', '"global_step": "x"'),
            "global_step is 'x', expected the number",
        ),
        (lambda text: text.replace('"max_steps"', '"may_steps"'), "damaged or of another version: .*'may_steps'"),
        (lambda text: text.replace("{", "[", 1), "is damaged or another run's"),
        (lambda text: "[]", "is damaged"),
    ],
    ids=["no step", "no number", "unknown key", "no JSON", "a list"],
)
def test_a_damaged_state(run_folder: Path, change: Callable[[str], str], pattern: str) -> None:
    path = run_folder / "checkpoint-11" / "trainer_state.json"
    path.write_text(change(path.read_text()))
    assert_refused(run_folder, f"trainer_state.json: .*{pattern}")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", TENSORS])
@pytest.mark.parametrize("marker", [True, False], ids=["sizes alone", "no marker"])
def test_damage_where_no_digest_was_saved(run_folder: Path, name: str, marker: bool) -> None:
    checkpoint = run_folder / "checkpoint-11"
    forget_digests(checkpoint)
    if not marker:
        delete(checkpoint / MARKER)
    if name.endswith("safetensors"):  # without checksums of its own: only its form can be looked at
        scramble(checkpoint / name)
    else:  # its own checksums tell
        content = (checkpoint / name).read_bytes()
        third = len(content) // 3
        (checkpoint / name).write_bytes(
            content[:third] + bytes(255 - b for b in content[third:-third]) + content[-third:]
        )
    assert_refused(run_folder, f"{name}: is (truncated|damaged)")


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": []}', '{"files": 3}'])
def test_a_marker_of_another_form(run_folder: Path, content: str) -> None:
    (run_folder / "checkpoint-11" / MARKER).write_text(content)
    assert_refused(run_folder, f"{MARKER}: is damaged")


def test_one_that_was_not_finished(run_folder: Path) -> None:
    (run_folder / STAGING).mkdir()
    shutil.copytree(run_folder / "checkpoint-11", run_folder / STAGING / "checkpoint-12")
    delete(run_folder / STAGING / "checkpoint-12" / MARKER)
    assert_refused(
        run_folder,
        f"valid checkpoint at .*: .*has no {MARKER}: writing it was not finished",
        last=f"{STAGING}/checkpoint-12",
    )


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


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, "Can't find a valid checkpoint at .*: there is no such checkpoint folder", last="checkpoint-7"
    )


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No valid checkpoint found in output directory") as caught:
        build_trainer(RUN, tmp_path).train(resume_from_checkpoint=True)
    assert "has no complete checkpoint to resume from" in str(caught.value)


@pytest.mark.parametrize("damage", [truncate, delete, flip])
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
    marker = json.loads((checkpoint / MARKER).read_text())
    listed = marker["files"]
    assert listed == {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.name != MARKER}
    lines = subprocess.run(["sha256sum", *listed], cwd=checkpoint, capture_output=True, text=True, check=True).stdout
    assert marker["sha256"] == {name: digest for digest, name in (line.split() for line in lines.splitlines())}
    assert marker["format"] == 3 and marker["finite_weights"] is True
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


def test_all_of_it_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    before: dict[str, list[str]] = {}
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def noted_rename(source: Any, target: Any) -> None:
        before[str(source)] = list(synced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    build_trainer(RUN, tmp_path, max_steps=5).train()
    staged = str(tmp_path / STAGING / "checkpoint-5")
    names = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert {MARKER, TENSORS, "model.safetensors", "optimizer.pt"} <= names
    assert {staged, *(f"{staged}/{name}" for name in names)} <= set(before[staged])
    marker = before[staged].index(f"{staged}/{MARKER}")
    assert all(before[staged].index(f"{staged}/{name}") < marker for name in names - {MARKER}), "the marker comes last"
    assert str(tmp_path) in synced[len(before[staged]) :], "and the name itself, after it"

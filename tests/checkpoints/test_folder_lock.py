"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_bilb.errors import FolderInUseError, OptionError
from hf_bilb.storage import folder_lock
from hf_bilb.storage.folder_lock import LOCK_FILE, hold
from tests.checkpoints.conftest import ROOT
from tests.checkpoints.runs import Run, build_trainer
from tests.processes import wait_for
from tests.synthetic import flat_parameters

RUN = Run(0, 0, {"balancer": "bilb", "num_train_epochs": 1})


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """The id of another process that holds `tmp_path / "run"`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with hold(tmp_path / "run"):
            os.write(write, b"x")
            while True:
                signal.pause()
    os.read(read, 1)
    yield child
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def is_free(folder: Path) -> bool:
    """As another process would see it: asked for by other means than our own."""
    if not (folder / LOCK_FILE).exists():
        return True
    with (folder / LOCK_FILE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


# --- the lock -----------------------------------------------------------------------------------------------------


def test_the_second_process_is_refused_with_folder_and_holder(tmp_path: Path, holder: int) -> None:
    with (
        pytest.raises(FolderInUseError, match="another run is writing into this folder") as caught,
        hold(tmp_path / "run"),
    ):
        pass
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'run'}: ") and f"process {holder} on {os.uname().nodename}" in line
    assert "\n" not in line
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (tmp_path / "run" / LOCK_FILE).exists(), "left behind by a process that was killed"
    with hold(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_the_same_thread_may_hold_it_again_when_it_says_so_and_another_may_not(tmp_path: Path) -> None:
    found: list[str] = []

    def other() -> None:
        try:
            with hold(tmp_path):
                found.append("held")
        except FolderInUseError as error:
            found.append(str(error))

    def from_another_thread() -> str:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return found.pop()

    with hold(tmp_path) as outer:
        with hold(f"{tmp_path}/../{tmp_path.name}", again=True) as inner:
            assert inner == outer
        with pytest.raises(FolderInUseError, match="this process"), hold(tmp_path):
            pass
        assert "another thread of this process" in from_another_thread()
        assert not is_free(tmp_path)
    assert from_another_thread() == "held"
    assert is_free(tmp_path)


def test_it_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), hold(tmp_path):
        raise RuntimeError
    assert is_free(tmp_path)


def test_a_forked_child_neither_holds_it_nor_lets_it_go(tmp_path: Path) -> None:
    with hold(tmp_path):
        child = os.fork()
        if child == 0:  # outlives its parent
            signal.pause()
        try:
            ended = os.fork()
            if ended == 0:
                os._exit(0)
            os.waitpid(ended, 0)
            assert not is_free(tmp_path)
            # As if the parent were killed: its descriptor goes, and nothing else happens.
            folder_lock._forget()
            assert (tmp_path / LOCK_FILE).exists() and is_free(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_child_with_the_descriptor_goes_on_holding_it(tmp_path: Path) -> None:
    with hold(tmp_path) as descriptor:
        assert descriptor is not None
        child = subprocess.Popen(["sleep", "600"], pass_fds=[descriptor])
        # As if this process were killed: its own descriptor goes, and nothing else happens.
        folder_lock._forget()
    try:
        assert not is_free(tmp_path)
    finally:
        child.kill()
        child.wait()
    assert is_free(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_it_goes_on_with_a_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING, "hf_bilb"), hold(tmp_path) as descriptor:
        assert descriptor is None
    (message,) = caplog.messages
    assert str(tmp_path) in message and "cannot be locked" in message and os.strerror(number) in message


def test_a_read_only_place_is_a_warning_and_a_file_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def open_(*args: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OptionError, match="is no folder"), hold(place):
            pass
    monkeypatch.setattr(os, "open", open_)
    with caplog.at_level(logging.WARNING, "hf_bilb"), hold(tmp_path) as descriptor:
        assert descriptor is None
    assert len(caplog.messages) == 1


def test_a_lock_on_a_file_that_was_just_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one before lets go between our opening of the file and our lock on it.
    flock, calls = fcntl.flock, []

    def slow(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with hold(tmp_path):
        assert len(calls) == 2 and not is_free(tmp_path)


# --- the Trainer --------------------------------------------------------------------------------------------------


class During(TrainerCallback):
    """Calls something after the second step."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.action()


def test_a_second_run_is_refused_before_anything_is_trained_or_written(tmp_path: Path, holder: int) -> None:
    trainer = build_trainer(RUN, tmp_path / "run")
    before = flat_parameters(trainer.model)
    for resume in (False, True):
        with pytest.raises(FolderInUseError, match="another run is writing"):
            trainer.train(resume_from_checkpoint=resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
    assert trainer.state.global_step == 0 and flat_parameters(trainer.model).equal(before)


def test_one_that_writes_nothing_is_not_refused(tmp_path: Path, holder: int) -> None:
    trainer = build_trainer(RUN, tmp_path / "run", save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 11
    # A callback that asks for a checkpoint all the same: refused then.
    trainer = build_trainer(RUN, tmp_path / "run", save_strategy="no")
    trainer.add_callback(During(lambda: setattr(trainer.control, "should_save", True)))
    with pytest.raises(FolderInUseError):
        trainer.train()


def test_it_is_held_from_the_first_step_to_the_end_whatever_the_end_is(tmp_path: Path) -> None:
    trainer, seen = build_trainer(RUN, tmp_path), []

    def look() -> None:
        seen.append(is_free(tmp_path))
        if len(seen) == 1:
            raise KeyboardInterrupt

    trainer.add_callback(During(look))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert is_free(tmp_path)
    trainer.train()
    assert seen == [False, False] and is_free(tmp_path)
    build_trainer(RUN, tmp_path, max_steps=12).train(resume_from_checkpoint=True)  # another one, afterwards
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (10, 11, 12, 5)]


def test_two_trainers_in_two_threads(tmp_path: Path) -> None:
    first, second, failures = build_trainer(RUN, tmp_path), build_trainer(RUN, tmp_path), []

    def train() -> None:
        try:
            second.train()
        except FolderInUseError as error:
            failures.append(str(error))

    def in_another_thread() -> None:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

    first.add_callback(During(in_another_thread))
    first.train()
    assert len(failures) == 1 and "another thread" in failures[0] and second.state.global_step == 0


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    script = "import sys; from tests.checkpoints.test_folder_lock import *; until_killed(sys.argv[1])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    wait_for((tmp_path / "checkpoint-5").is_dir, 120)
    assert not is_free(tmp_path)
    process.kill()
    process.wait()
    trainer = build_trainer(RUN, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 11


def until_killed(folder: str) -> None:
    trainer = build_trainer(RUN, Path(folder))
    trainer.args.dataloader_num_workers = 1  # a worker that may live longer holds nothing

    class Wait(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                threading.Event().wait()

    trainer.add_callback(Wait())
    trainer.train()

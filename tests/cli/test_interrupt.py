"""Ctrl-C: one line, which says how the run can go on; and it does."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hf_bilb.cli import main
from hf_bilb.data import DATA_SETS
from tests.cli.made_up import MADE_UP, RECIPE

STOP = """
import signal
from transformers import TrainerCallback

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 25:
            signal.raise_signal(signal.SIGINT)
"""
SAVING = ("trainer.save_strategy=steps", "trainer.save_steps=10", "trainer.load_best_model_at_end=false")
NOT_SAVING = ("trainer.save_strategy=no", "trainer.load_best_model_at_end=false")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setitem(DATA_SETS, "made_up", MADE_UP)
    monkeypatch.chdir(tmp_path)
    # A shell starts what it runs in the background so that it ignores Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "stop.py").write_text(STOP)
    yield tmp_path
    signal.signal(signal.SIGINT, handler)


def train(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["train", "small.yaml", *arguments])


def interrupted(*arguments: str) -> str:
    done = train("callbacks=[stop.py:Stop]", *arguments)
    assert done.exit_code == 130, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hf-bilb: ")]
    return line


def test_an_interrupted_run_goes_on_from_the_checkpoint_that_is_named(folder: Path) -> None:
    line = "hf-bilb: interrupted; the same command with --resume goes on from run/checkpoint-20"
    assert interrupted(*SAVING) == line
    assert interrupted(*SAVING, "--resume") == line
    done = train(*SAVING, "--resume")
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "run" / "results.json").read_text())["training"]["resumed_from"] == "checkpoint-20"


def test_without_a_checkpoint_the_same_command_begins_again() -> None:
    line = interrupted(*NOT_SAVING)
    assert line == "hf-bilb: interrupted; run has no checkpoint yet, the same command begins again"
    assert train(*NOT_SAVING).exit_code == 0


def test_a_push_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_bilb.hub.repository import Repository

    def push(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_bilb.experiments.train.prepare_push", lambda recipe: Repository("me/small"))
    monkeypatch.setattr("hf_bilb.experiments.train.push_after_training", push)
    done = train()
    said = "hf-bilb: interrupted; run is complete, but was not pushed; this pushes it: hf-bilb push run me/small\n"
    assert done.exit_code == 130 and done.stderr.endswith(said) and done.stderr.count("hf-bilb: ") == 1

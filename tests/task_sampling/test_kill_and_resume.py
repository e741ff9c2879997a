"""Killed in the middle of an epoch, resumed in a fresh interpreter: the same batches, the same run to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints.test_kill_and_resume import assert_bit_identical
from tests.task_sampling.runs import BATCH, EPOCHS, LOGGING_STEPS, RUNS, SAVE_STEPS, Run
from tests.task_sampling.training import TASKS_OF_SETS, TaskData, expected_batches

pytestmark = pytest.mark.slow

NAMES = [pytest.param(name, marks=pytest.mark.distributed if run.num_ranks > 1 else ()) for name, run in RUNS.items()]


def designed(run: Run, rank: int) -> list[list[int]]:
    size = run.settings.get("per_device_train_batch_size", BATCH)
    if run.settings.get("accelerator_config", {}).get("split_batches"):
        size //= run.num_ranks
    data = TASKS_OF_SETS if run.several_sets else TaskData()
    return expected_batches(data, run.sampling, EPOCHS, size, run.num_ranks, rank)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_as_if_never_stopped(resumed: Path, name: str) -> None:
    run = RUNS[name]
    assert run.kill_at % LOGGING_STEPS and run.kill_at % SAVE_STEPS
    whole, after = torch.load(resumed / name / "whole.pt"), torch.load(resumed / name / "resumed.pt")
    epoch = whole["steps"] / EPOCHS
    assert epoch < run.resumes_from < run.kill_at < 2 * epoch, "the checkpoint is to lie inside the second epoch"
    assert (whole["began_at"], after["began_at"]) == (0, run.resumes_from)
    assert whole["world_size"] == after["world_size"] == run.num_ranks
    assert whole["steps"] == after["steps"]
    assert_bit_identical(whole, after)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_sees_the_rest_of_its_epoch(resumed: Path, name: str) -> None:
    run = RUNS[name]
    steps = torch.load(resumed / name / "whole.pt")["steps"]
    epochs, updates = divmod(run.resumes_from, steps // EPOCHS)
    for rank in range(run.num_ranks):
        whole = torch.load(resumed / name / f"whole-seen{rank}.pt")
        assert whole == designed(run, rank)
        done = epochs * len(whole) // EPOCHS + updates * run.accumulation
        assert torch.load(resumed / name / f"resumed-seen{rank}.pt") == whole[done:]

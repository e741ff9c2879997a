"""Killed with SIGKILL and resumed in a fresh interpreter: as if never stopped, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.checks import assert_bit_identical, assert_went_on, load
from tests.checkpoints.runs import KILLED_SAVE, LOGGING_STEPS, POINTS, RUNS, SAVE_STEPS

NAMES = [pytest.param(name, marks=pytest.mark.distributed if run.num_ranks > 1 else ()) for name, run in RUNS.items()]


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_as_if_never_stopped(resumed_runs: Path, name: str) -> None:
    assert_went_on(resumed_runs / name, RUNS[name])


def test_the_compared_state_holds_router_moments_and_references(resumed_runs: Path) -> None:
    whole, _ = load(resumed_runs / "qm9")
    names = " ".join(whole["balancer"])
    for part in ("router.logits", "exp_avg", "exp_avg_sq", "step", "reference_losses", "last_losses", "epoch"):
        assert part in names
    assert whole["logs"][0].keys() >= {
        "loss",
        "loss_mean",
        "loss/alpha",
        "weight/alpha",
        "coefficient/alpha",
        "discrepancy",
    }


def entries(found: dict[str, Any], key: str) -> list[int]:
    return [entry["step"] for entry in found["logs"] if key in entry]


def test_the_runs_were_stopped_in_the_phases_they_are_named_after(resumed_runs: Path) -> None:
    every = list(range(LOGGING_STEPS, 34, LOGGING_STEPS))
    for name, first in (("in_warm_up", 14), ("after_warm_up", 14), ("double_loop", 7)):
        whole, resumed = load(resumed_runs / name)
        for found in (whole, resumed):
            assert entries(found, "loss") == every
            assert entries(found, "weight/alpha") == [step for step in every if step >= first]
    for name in ("before_freezing", "frozen"):
        whole, resumed = load(resumed_runs / name)
        # Adam's step counter: it has learned in twelve updates, whatever came between.
        assert float(whole["balancer"]["optimizer.router.logits.step"]) == 12
        assert float(resumed["balancer"]["optimizer.router.logits.step"]) == 12


def test_a_resumed_run_does_not_begin_from_the_other_one_again(resumed_runs: Path) -> None:
    whole, resumed = load(resumed_runs / "begun_from_another")
    source, _ = load(resumed_runs / "bilb")
    key = "optimizer.router.logits.step"
    assert float(source["balancer"][key]) == 33 and float(resumed["balancer"][key]) == 66
    references = "normalization.reference_losses"
    assert torch.equal(whole["balancer"][references], source["balancer"][references])


def test_z_and_what_was_looked_at_are_compared(resumed_runs: Path) -> None:
    for name in ("double_loop", "double_loop_window", "double_loop_two_ranks"):
        whole, _ = load(resumed_runs / name)
        assert bool(whole["balancer"]["lower_level.started"]) and "lower_level.z.heads.weight" in whole["balancer"]
    for found in load(resumed_runs / "diagnostics"):
        assert entries(found, "bilevel/gradient_ratio") == list(range(3, 34, 3))


def test_dropped_steps_are_counted_over_the_kill(resumed_runs: Path) -> None:
    _, resumed = load(resumed_runs / "dropped")
    counts = [value for key, value in resumed["logs"][-2].items() if key.startswith("dropped_steps/")]
    assert sum(counts) >= 2, resumed["logs"][-2]


def test_task_vectors_are_written_once_per_logging_step(resumed_runs: Path) -> None:
    _, resumed = load(resumed_runs / "many_tasks")
    assert [line[: line.index(",")] for line in resumed["vectors"].splitlines()] == [
        f'{{"step": {step}' for step in range(LOGGING_STEPS, 33, LOGGING_STEPS)
    ]


def test_the_best_checkpoint_survives_a_kill(resumed_runs: Path) -> None:
    whole, resumed = load(resumed_runs / "best_model")
    assert Path(whole["best"]).name == Path(resumed["best"]).name
    assert Path(resumed["best"]).is_dir()


def test_a_run_killed_from_outside_four_times(resumed_runs: Path) -> None:
    # It saves in every step, so that most of these kills hit a checkpoint that is being written.
    whole, resumed = load(resumed_runs / "outside")
    assert resumed["began_at"] > 4
    assert resumed["steps"] == 66
    assert_bit_identical(whole, resumed)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_while_saving_leaves_no_half_checkpoint(resumed_runs: Path, point: str) -> None:
    folder = resumed_runs / point
    left = ["checkpoint-10", "checkpoint-5"] if point == "before_rotation" else ["_incomplete", "checkpoint-5"]
    assert torch.load(folder / "left.pt") == left
    # A checkpoint that only its rename was missing is taken over.
    complete = point in ("before_rename", "before_rotation")
    resumed = torch.load(folder / "resumed.pt")
    assert resumed["began_at"] == (KILLED_SAVE if complete else SAVE_STEPS)
    passed_over = [text for text in resumed["messages"] if "passed over" in text]
    assert len(passed_over) == (0 if complete else 1)
    assert all(f"checkpoint-{KILLED_SAVE}" in text for text in passed_over)
    assert not (folder / "killed" / "_incomplete").exists(), "the next save is to clean up"
    assert_bit_identical(torch.load(resumed_runs / POINTS[0] / "whole.pt"), resumed)


def test_the_records_of_other_methods_are_compared(resumed_runs: Path) -> None:
    records = {
        "famo_next_batch": ("progress.losses", "objective.logits"),
        "stch_schedule": ("totals", "items", "passed"),
        "marigold_exact": ("objective.logits", "objective.worst_logits", "objective.direction"),
    }
    for name, parts in records.items():
        whole, _ = load(resumed_runs / name)
        names = " ".join(whole["balancer"])
        assert all(part in names for part in parts), names

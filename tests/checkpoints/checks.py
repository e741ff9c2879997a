"""What a run that was killed and resumed is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.runs import LOGGING_STEPS, SAVE_STEPS, Run


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return torch.load(folder / "whole.pt"), torch.load(folder / "resumed.pt")


def assert_bit_identical(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert torch.equal(whole["parameters"], resumed["parameters"]), "the parameters differ"
    assert whole["balancer"].keys() == resumed["balancer"].keys()
    for key, value in whole["balancer"].items():
        assert torch.equal(value, resumed["balancer"][key]), f"balancer state {key} differs"
    # As text, exact: the gradient norm of a dropped step is NaN, which equals nothing.
    assert json.dumps(whole["logs"], sort_keys=True) == json.dumps(resumed["logs"], sort_keys=True), "the logs differ"
    assert whole["training_loss"] == resumed["training_loss"] == whole["logs"][-1]["train_loss"]
    assert whole["vectors"] == resumed["vectors"]


def assert_went_on(folder: Path, run: Run) -> None:
    """Killed and resumed in `folder`: as if never stopped, to the last bit."""
    assert run.kill_at % LOGGING_STEPS and run.kill_at % SAVE_STEPS and run.kill_at % 11
    whole, resumed = load(folder)
    assert whole["began_at"] == 0
    assert resumed["began_at"] == run.resumes_from, "it has to go on, not to start over"
    assert whole["steps"] == resumed["steps"] == 33
    assert whole["world_size"] == resumed["world_size"] == run.num_ranks
    assert_bit_identical(whole, resumed)

"""Whole runs: a resumed one ends where the uninterrupted one does, and the best model is the one that was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints.weight_runs import CASES, SAVED, STEPS, train


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("name", CASES)
def test_resumed_is_uninterrupted_and_best_is_what_was_measured(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    whole, seen = train(case, tmp_path / "whole")
    assert len(seen.states) == STEPS // SAVED
    losses = [loss for loss, _ in seen.states]
    best = losses.index(min(losses))
    assert_equal(whole.model.state_dict(), seen.states[best][1])
    last = seen.states[-1][1]
    assert whole.evaluate()["eval_loss"] == min(losses)
    # From the first checkpoint on, in a model that was built anew.
    _, again = train(case, tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert [loss for loss, _ in again.states] == losses[1:]
    assert_equal(again.states[-1][1], last)


def test_the_layers_are_still_shared(tmp_path: Path) -> None:
    train(CASES["branches"], tmp_path)
    trainer, _ = train(CASES["branches"], tmp_path / "resumed", str(tmp_path / f"checkpoint-{SAVED}"))
    first, second = trainer.model.tasks.values()
    assert first.encoder is second.encoder and first.encoder.weight is second.encoder.weight
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
        id(p) for p in trainer.model.parameters()
    }

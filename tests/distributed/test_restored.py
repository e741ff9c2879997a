"""Weights come back under DistributedDataParallel, the same ones on both ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.conftest import Runs

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("name", ["renamed", "branches", "adapters"])
def test_resumed_is_uninterrupted_on_both_ranks(runs: Runs, name: str) -> None:
    first = runs.ranks[0][f"restored/{name}"]
    for rank in runs.ranks:
        found = rank[f"restored/{name}"]
        assert found["world_size"] == 2
        losses = [loss for loss, _ in found["states"]]
        measured = found["states"][losses.index(min(losses))][1]
        assert [loss for loss, _ in found["again"]] == losses[1:]
        for state, wanted in (
            (found["best"], measured),
            (found["best_again"], measured),
            (found["again"][-1][1], found["states"][-1][1]),
            (found["best"], first["best"]),
        ):
            assert state.keys() == wanted.keys()
            assert [key for key in wanted if not torch.equal(state[key], wanted[key])] == []

"""`diagnostics.gradients`: two ranks with other data and other tasks see what one process with the whole batch sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.checks import assert_equals_one_process, assert_same_state
from tests.distributed.conftest import Runs
from tests.distributed.gradient_looks import BALANCERS, LOOK
from tests.distributed.training import GLOBAL_BATCH, uneven_data
from tests.synthetic import TASK_NAMES

pytestmark = pytest.mark.distributed


def looks(found: dict[str, Any]) -> list[dict[str, float]]:
    return [entry for entry in found["logs"] if any(key.startswith("gradient_") for key in entry)]


def cosines(line: dict[str, Any]) -> dict[str, float]:
    """Those that are known."""
    rows = enumerate(line["cosines"])
    return {f"{a}/{b}": value for a, row in rows for b, value in enumerate(row) if value is not None}


@pytest.mark.parametrize("name", ["ls/batch", "bilb/window", "mgda/batch", "chosen"])
def test_two_ranks_see_what_one_process_sees(runs: Runs, name: str) -> None:
    name = f"gradient_looks/{name}"
    assert_equals_one_process(runs, name)
    first, second = (rank[name] for rank in runs.ranks)
    assert looks(first) == looks(second)
    assert len(looks(first)) == -(-first["steps"] // LOOK["gradients"]["every_n_steps"]) == len(looks(runs.one[name]))
    for ours, expected in zip(looks(first), looks(runs.one[name]), strict=True):
        assert ours == pytest.approx(expected, rel=1e-10, abs=1e-12)
    # The first rank alone writes.
    assert [line["step"] for line in first["lines"]] == [line["step"] for line in runs.one[name]["lines"]]
    for ours, expected in zip(first["lines"], runs.one[name]["lines"], strict=True):
        assert cosines(ours) == pytest.approx(cosines(expected), rel=1e-10, abs=1e-12)


def test_a_task_without_labels_on_one_rank_is_there(runs: Runs) -> None:
    steps = uneven_data(torch.float64).labels.view(-1, 2, GLOBAL_BATCH // 2, len(TASK_NAMES))
    there = steps.isfinite().any(dim=2)
    assert not there.all(), "the ranks' tasks are to differ"
    for entry in looks(runs.ranks[0]["gradient_looks/ls/batch"]):
        present = there[int(entry["step"]) - 1].any(dim=0).tolist()
        assert [f"gradient_norm/{task}" in entry for task in TASK_NAMES] == present


@pytest.mark.parametrize("balancer", BALANCERS)
def test_training_goes_on_as_without(runs: Runs, balancer: str) -> None:
    for results in (runs.one, *runs.ranks):
        found, expected = (results[f"gradients_beside/{balancer}/{looks}"] for looks in (True, False))
        assert torch.equal(found["parameters"], expected["parameters"])
        assert_same_state(found["buffers"], expected["buffers"])
        assert_same_state(found["balancer"], expected["balancer"])
        assert torch.equal(found["drawn"], expected["drawn"])
        assert len(looks(found)) == -(-found["steps"] // 2)
        assert [entry for entry in found["logs"] if entry not in looks(found)] == expected["logs"]

"""F over a whole accumulation window, on two ranks: equal to one batch, and no trace of the first pass."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.checks import LOG_TOLERANCE, assert_equals_one_process, assert_same_state
from tests.distributed.conftest import Runs
from tests.distributed.windows import BALANCERS, EPOCHS, MICRO_BATCHES, UPDATES
from tests.synthetic import relative_difference

pytestmark = pytest.mark.distributed

EQUALITY = [*(f"window/{balancer}/float64" for balancer in BALANCERS), "window/features/float32"]
#: Micro-batches of a rank: the last window of an epoch has half of them.
PER_RANK = 6 * MICRO_BATCHES * EPOCHS + MICRO_BATCHES // 2 * EPOCHS


@pytest.mark.parametrize("name", EQUALITY)
def test_two_ranks_with_four_micro_batches_equal_one_batch(runs: Runs, name: str) -> None:
    precision = name.split("/")[-1]
    assert_equals_one_process(runs, name, precision)
    found, expected = runs.ranks[0][name], runs.one[name]
    assert found["steps"] == UPDATES
    tolerance = LOG_TOLERANCE[precision]
    torch.testing.assert_close(found["coefficients"], expected["coefficients"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", EQUALITY)
def test_one_more_forward_pass_and_one_decision(runs: Runs, name: str) -> None:
    assert len(runs.one[name]["passes"]["grad"]) == runs.one[name]["objective_calls"] == UPDATES
    for rank in runs.ranks:
        assert rank[name]["objective_calls"] == UPDATES
        assert len(rank[name]["passes"]["grad"]) == 2 * PER_RANK
        assert int(rank[name]["passes"]["grad"].sum()) == PER_RANK


def test_both_passes_see_the_same_dropout_masks(runs: Runs) -> None:
    for results in (runs.one, *runs.ranks):
        passes = results["window_dropout"]["passes"]
        first, second = passes["losses"][~passes["grad"]], passes["losses"][passes["grad"]]
        assert torch.equal(first, second) and len(first) == PER_RANK
        assert len(first.unique(dim=0)) == PER_RANK
    ours, theirs = (rank["window_dropout"] for rank in runs.ranks)
    assert torch.equal(ours["parameters"], theirs["parameters"])
    assert_same_state(ours["balancer"], theirs["balancer"])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_pass_leaves_no_trace_in_buffers_and_random_numbers(runs: Runs, rank: int) -> None:
    found, expected = (runs.ranks[rank][f"window_buffers/{over}"] for over in ("window", "micro_batch"))
    assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
    assert found["buffers"].keys() == {f"trunk.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    for name, buffer in found["buffers"].items():
        torch.testing.assert_close(buffer, expected["buffers"][name], rtol=1e-12, atol=1e-12)

"""Two real processes (gloo, DistributedDataParallel) against one process with the whole batch, after 50 steps.

Each rank has other data and other missing tasks, with unequal counts; see `training.uneven_data`. `scenarios.py` says
what runs, `conftest.py` launches it once.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed import scenarios
from tests.distributed.checks import (
    LOG_TOLERANCE,
    MARGIN,
    TOLERANCE,
    assert_equals_one_process,
    assert_ranks_agree,
    assert_same_balancer,
    assert_same_logs,
)
from tests.distributed.conftest import Runs
from tests.distributed.scenarios import BALANCERS, RESTS, SABOTAGE
from tests.synthetic import TASK_NAMES, relative_difference

pytestmark = pytest.mark.distributed

EQUALITY = [f"equality/{name}" for name in scenarios.EQUALITY]
MISSING_HEADS = [f"{over}/{kind}/{find_unused}" for over, kind, find_unused in scenarios.MISSING_HEADS]


@pytest.mark.parametrize("name", EQUALITY)
def test_two_ranks_equal_one_process(runs: Runs, name: str) -> None:
    precision = name.split("/")[-1]
    found, expected = runs.ranks[0][name], runs.one[name]
    assert found["steps"] == expected["steps"] == 50
    assert_ranks_agree(runs, name)
    assert relative_difference(found["parameters"], expected["parameters"]) <= TOLERANCE[precision]
    assert_same_balancer(found["balancer"], expected["balancer"], LOG_TOLERANCE[precision])
    torch.testing.assert_close(
        found["coefficients"], expected["coefficients"], rtol=LOG_TOLERANCE[precision], atol=LOG_TOLERANCE[precision]
    )


@pytest.mark.parametrize("name", EQUALITY)
def test_logged_losses_equal_those_of_one_process(runs: Runs, name: str) -> None:
    found, expected = runs.ranks[0][name]["logs"], runs.one[name]["logs"]
    assert {"loss", "loss_mean", "loss/alpha", "loss/delta", "coefficient/alpha"} <= expected[0].keys()
    assert "train_loss" in expected[-1]
    assert_same_logs(found, expected, LOG_TOLERANCE[name.split("/")[-1]])


@pytest.mark.parametrize("name", [name for name in EQUALITY if "bilb" in name])
def test_no_difference_crosses_zero_within_rounding(runs: Runs, name: str) -> None:
    assert MARGIN[name.split("/")[-1]] < runs.one[name]["smallest_gap"] < 1


@pytest.mark.parametrize("balancer", BALANCERS)
def test_the_standalone_balancer_equals_one_process(runs: Runs, balancer: str) -> None:
    name = f"standalone/{balancer}"
    found, expected = runs.ranks[0][name], runs.one[name]
    assert_ranks_agree(runs, name)
    assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
    assert_same_balancer(found["balancer"], expected["balancer"], 1e-11)
    torch.testing.assert_close(found["values"], expected["values"], rtol=1e-11, atol=1e-11)
    assert torch.equal(found["values"], runs.ranks[1][name]["values"]), "F is the same on every rank"


@pytest.mark.parametrize("balancer", BALANCERS)
def test_the_standalone_loop_equals_the_trainer(runs: Runs, balancer: str) -> None:
    by_hand, by_trainer = runs.ranks[0][f"standalone/{balancer}"], runs.ranks[0][f"equality/{balancer}/skip/float64"]
    assert relative_difference(by_hand["parameters"], by_trainer["parameters"]) <= 1e-12


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_local_denominator_or_objective_is_noticed(runs: Runs, name: str) -> None:
    kind, balancer = name.split("/")
    expected = runs.one[f"equality/{balancer}/skip/float32"]["parameters"]
    first, second = (rank[f"sabotage/{name}"] for rank in runs.ranks)
    assert relative_difference(first["parameters"], expected) > 1e-4
    if kind == "local_objective":
        state = next(key for key in first["balancer"] if "last_losses" in key)
        assert not torch.equal(first["balancer"][state], second["balancer"][state])


@pytest.mark.parametrize("name", MISSING_HEADS)
def test_heads_that_are_not_connected_on_one_rank(runs: Runs, name: str) -> None:
    found, expected = runs.ranks[0][name], runs.one[name]
    assert_ranks_agree(runs, name)
    assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
    assert_same_logs(found["logs"], expected["logs"], 1e-11)


@pytest.mark.parametrize("name", [f"rest/{several}/{heads}" for several, heads in RESTS])
def test_the_rest_is_reached_once_by_one_loss_or_several(runs: Runs, name: str) -> None:
    expected = runs.one[name]["gradients"]
    assert expected.count_nonzero() > 20
    for results in runs.ranks:
        assert results[name]["world_size"] == 2
        assert relative_difference(results[name]["gradients"], expected) <= 1e-15


@pytest.mark.parametrize("name", ["poisoned/skip", "steep/skip"])
def test_a_loss_or_gradient_that_is_not_finite_on_one_rank_drops_the_step_on_both(runs: Runs, name: str) -> None:
    found, expected = runs.ranks[0][name], runs.one[name]
    assert_ranks_agree(runs, name)
    assert found["parameters"].isfinite().all()
    assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
    assert sum(value for key, value in found["logs"][-2].items() if key.startswith("dropped_steps/")) == 1
    assert_same_logs(found["logs"], expected["logs"], 1e-11)


def test_a_loss_that_is_not_finite_on_one_rank_raises_the_same_on_both(runs: Runs) -> None:
    errors = {results["poisoned/raise"]["error"] for results in (runs.one, *runs.ranks)}
    assert len(errors) == 1
    assert "task 'alpha' is nan at step 10" in errors.pop()


def test_a_gradient_that_is_not_finite_on_one_rank_raises_the_same_on_both(runs: Runs) -> None:
    errors = {results["steep/raise"]["error"] for results in (runs.one, *runs.ranks)}
    assert len(errors) == 1
    assert (
        "the gradient is not finite at step 10, though all losses are: that of task 'gamma' is not defined"
        in errors.pop()
    )


def test_a_look_of_one_rank_alone_changes_nothing_and_waits_for_nobody(runs: Runs) -> None:
    assert_equals_one_process(runs, "looked_at")


@pytest.mark.parametrize("rows", [3, 13, 16, 21])
@pytest.mark.parametrize("scenario", ["evaluated", "evaluated_stream"])
def test_evaluation_counts_every_example_once(runs: Runs, scenario: str, rows: int) -> None:
    name = f"{scenario}/{rows}"
    expected = runs.one[name]["metrics"]
    assert expected.keys() == {"eval_loss", *(f"eval_loss_{task}" for task in TASK_NAMES)}
    for results in runs.ranks:
        assert results[name]["metrics"] == pytest.approx(expected, rel=1e-12)

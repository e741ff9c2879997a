"""The double loop, its diagnostics and phases on two ranks: one process, and a run resumed in the middle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.by_autograd import train_by_autograd
from tests.distributed.checks import assert_equals_one_process, assert_same_state
from tests.distributed.conftest import Runs
from tests.distributed.double_loop import CHECKPOINTS, DIAGNOSTICS, DOUBLE, FREEZE_AFTER, STEPS, STEPS_BY_HAND, WARMUP
from tests.distributed.models import build_feature_model
from tests.distributed.training import uneven_data
from tests.synthetic import relative_difference

pytestmark = pytest.mark.distributed


def z_of(found: dict[str, Any]) -> torch.Tensor:
    """In the order of the parameters."""
    return torch.cat([value.flatten() for key, value in found["balancer"].items() if key.startswith("lower_level.z.")])


@pytest.mark.parametrize("router", DOUBLE)
@pytest.mark.parametrize("scenario", ["double_trainer", "double_by_hand", "double_windows"])
def test_two_ranks_equal_one_process(runs: Runs, scenario: str, router: str) -> None:
    name = f"{scenario}/{router}"
    assert_equals_one_process(runs, name)  # z is part of the balancer's state
    found = runs.ranks[0][name]
    z = z_of(found)
    assert len(z) == len(found["parameters"])
    assert (z - found["parameters"]).norm() > 0.1 * z.norm(), "z is to go its own way"


@pytest.mark.parametrize("router", DOUBLE)
def test_two_ranks_equal_two_models_and_autograd(runs: Runs, router: str) -> None:
    model, data = build_feature_model(torch.float64), uneven_data(torch.float64)
    parameters, z = train_by_autograd(DOUBLE[router], model, data, steps=STEPS_BY_HAND)
    found = runs.ranks[0][f"double_by_hand/{router}"]
    assert relative_difference(found["parameters"], parameters) <= 1e-12
    assert relative_difference(z_of(found), z) <= 1e-12


def test_nothing_but_the_router_sees_the_double_loop(runs: Runs) -> None:
    for results in (runs.one, *runs.ranks):
        double, single = results["beside/double"], results["beside/single"]
        assert_untouched(double, single)
        assert {key for key in double["balancer"] if not key.startswith("lower_level.")} == single["balancer"].keys()


@pytest.mark.parametrize("place", [0, 1])
def test_a_group_of_its_own(runs: Runs, place: int) -> None:
    found, expected = runs.ranks[place][f"alone/{place}"], runs.one[f"alone/{place}"]
    assert found["world_size"] == 2 and found["groups"] == 0
    assert torch.equal(found["parameters"], expected["parameters"])
    assert_same_state(found["balancer"], expected["balancer"])


def test_a_group_that_is_given_is_the_one_in_use(runs: Runs) -> None:
    for rank in runs.ranks:
        found, expected = rank["group/True"], rank["group/False"]
        assert found["in_the_default_group"] == 0 < found["groups"] == expected["in_the_default_group"]
        assert torch.equal(found["parameters"], expected["parameters"])
        assert_same_state(found["balancer"], expected["balancer"])


def test_an_update_that_is_dropped_on_both_ranks(runs: Runs) -> None:
    assert_equals_one_process(runs, "poisoned_window")
    found = runs.ranks[0]["poisoned_window"]
    assert found["parameters"].isfinite().all()
    assert sum(value for key, value in found["logs"][-2].items() if key.startswith("dropped_steps/")) == 1


def test_the_wrapped_model_may_be_run_again_too(runs: Runs) -> None:
    for results in (runs.one, *runs.ranks):
        found, expected = results["reevaluated/True"], results["reevaluated/False"]
        assert torch.equal(found["parameters"], expected["parameters"])
        assert_same_state(found["buffers"], expected["buffers"])
        assert_same_state(found["balancer"], expected["balancer"])


@pytest.mark.parametrize("stochastic", [False, True])
def test_diagnostics_leave_training_alone(runs: Runs, stochastic: bool) -> None:
    for results in (runs.one, *runs.ranks):
        found, expected = results[f"diagnosed/{stochastic}/True"], results[f"diagnosed/{stochastic}/False"]
        assert_untouched(found, expected)
        assert_same_state(found["balancer"], expected["balancer"])
        looks = [entry for entry in found["logs"] if "bilevel/gradient_ratio" in entry]
        assert len(looks) == found["steps"] // DIAGNOSTICS["every_n_steps"]
        assert [entry for entry in found["logs"] if entry not in looks] == expected["logs"]


def test_diagnostics_see_what_one_process_sees(runs: Runs) -> None:
    name = "diagnosed/False/True"
    assert_equals_one_process(runs, name)
    assert runs.ranks[0][name]["logs"] == runs.ranks[1][name]["logs"]


def test_phases(runs: Runs) -> None:
    assert_equals_one_process(runs, "phases")
    found = runs.ranks[0]["phases"]
    assert (found["coefficients"][:WARMUP] == 1).any(dim=1).all()
    assert (found["coefficients"][WARMUP:] != 1).all()
    # Adam counts its steps: those of the balancing phase.
    steps = [value for key, value in found["balancer"].items() if key.endswith(".step")]
    assert steps and all(float(step) == FREEZE_AFTER - WARMUP for step in steps)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_run_goes_on_from_a_checkpoint_in_each_phase(runs: Runs, checkpoint: int) -> None:
    for results in (runs.one, *runs.ranks):
        whole, resumed = results["resumed"]["whole"], results["resumed"][str(checkpoint)]
        assert whole["steps"] == resumed["steps"] == STEPS
        assert_untouched(resumed, whole)
        assert_same_state(resumed["balancer"], whole["balancer"])
        assert resumed["logs"] == whole["logs"]


def test_a_resumed_run_is_alike_on_both_ranks(runs: Runs) -> None:
    ours, theirs = (rank["resumed"]["whole"] for rank in runs.ranks)
    assert torch.equal(ours["parameters"], theirs["parameters"])
    assert_same_state(ours["balancer"], theirs["balancer"])
    assert bool(ours["balancer"]["lower_level.started"])


def assert_untouched(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(found["parameters"], expected["parameters"])
    assert_same_state(found["buffers"], expected["buffers"])
    assert torch.equal(found["coefficients"][-1], expected["coefficients"][-1])

"""Routers that look at features: the global mean over ranks and rows, and its gradient through the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.by_autograd import train_by_autograd
from tests.distributed.checks import LOG_TOLERANCE, TOLERANCE, assert_equals_one_process, assert_same_balancer
from tests.distributed.conftest import Runs
from tests.distributed.feature_routers import NUM_TASKS, ROUTER_SABOTAGE, ROUTERS, router_data
from tests.distributed.models import build_feature_model
from tests.synthetic import TASK_NAMES, relative_difference

pytestmark = pytest.mark.distributed

PARAMETERS = ("objective.router.weight", "objective.router.bias")


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("absent", "precision"), [("skip", "float64"), ("hold", "float32")])
def test_two_ranks_equal_one_process(runs: Runs, router: str, absent: str, precision: str) -> None:
    name = f"router/{router}/{absent}/{precision}"
    assert_equals_one_process(runs, name, precision)
    found, expected = runs.ranks[0][name], runs.one[name]
    assert found["steps"] == 50
    tolerance = LOG_TOLERANCE[precision]
    torch.testing.assert_close(found["coefficients"], expected["coefficients"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_standalone_balancer_with_unequal_numbers_of_rows(runs: Runs, router: str) -> None:
    name = f"router_standalone/{router}"
    assert_equals_one_process(runs, name)
    torch.testing.assert_close(runs.ranks[0][name]["values"], runs.one[name]["values"], rtol=1e-11, atol=1e-11)
    assert torch.equal(runs.ranks[0][name]["values"], runs.ranks[1][name]["values"]), "F is the same on every rank"


def test_a_decision_for_each_micro_batch(runs: Runs) -> None:
    assert_equals_one_process(runs, "router_accumulated")


def test_a_micro_batch_that_is_repeated_counts_once(runs: Runs) -> None:
    for results in (runs.one, *runs.ranks):
        found, expected = results["router_repeated/3"], results["router_repeated/1"]
        assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
        assert_same_balancer(found["balancer"], {**expected["balancer"], **counters_of(found)}, 1e-11)


def counters_of(found: dict[str, Any]) -> dict[str, Tensor]:
    """What counts decisions, not updates."""
    return {key: value for key, value in found["balancer"].items() if key.startswith("guards.")}


@pytest.mark.parametrize("router", ROUTERS)
def test_two_ranks_equal_autograd_through_losses_and_features(runs: Runs, router: str) -> None:
    num_tasks = NUM_TASKS[router]
    model = build_feature_model(torch.float64, task_names=TASK_NAMES[:num_tasks])
    expected, _ = train_by_autograd(ROUTERS[router], model, router_data(num_tasks, torch.float64), steps=50)
    assert relative_difference(runs.ranks[0][f"router_standalone/{router}"]["parameters"], expected) <= 1e-12


@pytest.mark.parametrize("router", ROUTERS)
def test_the_router_learns(runs: Runs, router: str) -> None:
    # Else its equality on both ranks would say nothing.
    moments = runs.one[f"router_standalone/{router}"]["balancer"]
    for parameter in PARAMETERS:
        assert (moments[f"optimizer.{parameter.removeprefix('objective.')}.exp_avg"] != 0).all()


@pytest.mark.parametrize("kind", ROUTER_SABOTAGE)
def test_local_features_or_a_wrong_feature_gradient_are_noticed(runs: Runs, kind: str) -> None:
    expected = runs.one["router_standalone/default"]["parameters"]
    first, second = (rank[f"router_sabotage/{kind}"] for rank in runs.ranks)
    assert relative_difference(first["parameters"], expected) > 1e8 * TOLERANCE["float64"]
    # The ranks' routers part only where each looks at features of its own.
    same = all(torch.equal(first["balancer"][name], second["balancer"][name]) for name in PARAMETERS)
    assert same == (kind != "local_features")

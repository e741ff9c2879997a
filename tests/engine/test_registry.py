"""The registry: names, duplicates, and a method registered by a user that works from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from hf_bilb import OptionError, build_balancer, list_balancers, register_balancer
from hf_bilb.balancers import BalancerOptions, get_balancer_spec, registry
from hf_bilb.engine.objective import Objective, ObjectiveValue
from hf_bilb.engine.options import masked_sum
from tests.contract.cases import advance, random_losses


@dataclass(frozen=True, kw_only=True)
class PowerMeanOptions(BalancerOptions):
    """`p` of the mean; a trainable temperature starts at `temperature`."""

    p: float = 2.0
    temperature: float = 1.0


class PowerMean(Objective):
    def __init__(self, num_tasks: int, options: PowerMeanOptions) -> None:
        super().__init__()
        self.p = options.p
        self.temperature = nn.Parameter(torch.tensor(options.temperature, dtype=torch.float64))

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        return ObjectiveValue(self.temperature * masked_sum(losses.pow(self.p), active))


@pytest.fixture
def registered() -> Iterator[str]:
    register_balancer("power_mean", options=PowerMeanOptions, paper="ours")(PowerMean)
    yield "power_mean"
    del registry._REGISTRY["power_mean"]


def test_the_methods_are_listed_sorted() -> None:
    names = list_balancers()
    assert names == sorted(names) and {"ls", "si", "uw", "bilb"} <= set(names)
    for name in names:
        spec = get_balancer_spec(name)
        assert spec.name == name and spec.paper and spec.objective.__doc__ and spec.options.__doc__


def test_a_duplicate_name_raises_and_says_who_has_it() -> None:
    with pytest.raises(ValueError, match=r"balancer 'ls' is already registered, by hf_bilb.balancers.*LinearScalariz"):
        register_balancer("ls", options=PowerMeanOptions, paper="")(PowerMean)
    assert get_balancer_spec("ls").objective is not PowerMean


def test_a_users_method_works_from_end_to_end(registered: str) -> None:
    assert registered in list_balancers()
    balancer = build_balancer({"name": registered, "p": "3", "optimizer": "sgd"}, 3, dtype=torch.float64)
    row = random_losses(3, 1)[0]
    coefficients = advance(balancer, row)
    torch.testing.assert_close(coefficients, 3 * row.square(), rtol=1e-14, atol=0)
    state = balancer.state_dict()
    assert float(state["objective.temperature"]) == pytest.approx(1 - 1e-3 * float(row.pow(3).sum()), rel=1e-12)
    other = build_balancer(registered, 3, p=3, optimizer="sgd", dtype=torch.float64)
    other.load_state_dict(state)
    next_row = random_losses(3, 1, seed=1)[0]
    assert torch.equal(advance(balancer, next_row), advance(other, next_row))
    with pytest.raises(OptionError, match=r'balancer.temprature: unknown option, value 1 \(did you mean "temperature"'):
        build_balancer(registered, 3, temprature=1)

"""`edge_fraction`: the edge is exactly the lambda beyond which a coefficient of bilb can turn negative."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.engine.objective import differentiate
from hf_bilb.errors import NonFiniteLossError
from tests.contract.cases import advance, random_losses
from tests.products import in_pairs

TAUS, PAIRS, DENOMINATORS = ("weights", "one"), ("adjacent", "all"), ("none", "sum", "detached_sum")
ACTIVE = {
    "two": [1, 1],
    "three": [1, 1, 1],
    "six": [1, 1, 1, 1, 1, 1],
    "gaps": [1, 0, 1, 1, 0, 1],
    "two_apart": [0, 1, 0, 0, 0, 1],
}

kinds = pytest.mark.parametrize(
    ("tau", "pairs", "denominator"),
    list(itertools.product(TAUS, PAIRS, DENOMINATORS)),
    ids=lambda value: str(value),
)
kinds_and_tasks = pytest.mark.parametrize(
    ("active", "tau", "pairs", "denominator"), in_pairs(ACTIVE, TAUS, PAIRS, DENOMINATORS)
)


def build(tau: str, pairs: str, denominator: str, logits: list[float], weight: Any, **more: Any) -> LossBalancer:
    options = {"normalization": "none", "tau": tau, "pairs": pairs, "weight_denominator": denominator, **more}
    return build_balancer(
        "bilb", len(logits), dtype=torch.float64, initial_logits=logits, discrepancy_weight=weight, **options
    )


def coefficients(balancer: LossBalancer, losses: Tensor, active: Tensor) -> Tensor:
    return differentiate(balancer.objective, balancer.normalization, losses, active).coefficients[active]


def configurations(balancer: LossBalancer, active: Tensor) -> list[Tensor]:
    """Losses that pull each task in turn below and above all others, and every order of the (tau-weighted) losses."""
    size = len(active)
    sigma = balancer.objective.router().detach()
    tau = sigma if balancer.options.tau == "weights" else torch.ones_like(sigma)
    orders = itertools.islice(itertools.permutations(range(size)), 0, None, 1 if size < 6 else 7)
    return [torch.tensor([1.0 + 3 * rank for rank in order], dtype=torch.float64) / tau for order in orders]


def logits_for(size: int, seed: int) -> list[float]:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul(1.5).tolist()


@kinds_and_tasks
@pytest.mark.slow
def test_below_the_edge_no_coefficient_is_negative(active: str, tau: str, pairs: str, denominator: str) -> None:
    mask = torch.tensor(ACTIVE[active], dtype=torch.bool)
    for seed in range(4):
        balancer = build(tau, pairs, denominator, logits_for(len(mask), seed), {"edge_fraction": 1 - 1e-9})
        worst = [coefficients(balancer, losses, mask).min() for losses in configurations(balancer, mask)]
        rows = random_losses(len(mask), 50, seed=seed)
        searched = [coefficients(balancer, row, mask).min() for row in rows]
        assert min(worst + searched) > 0


@kinds_and_tasks
def test_just_beyond_the_edge_one_is(active: str, tau: str, pairs: str, denominator: str) -> None:
    mask = torch.tensor(ACTIVE[active], dtype=torch.bool)
    for seed in range(4):
        balancer = build(tau, pairs, denominator, logits_for(len(mask), seed), {"edge_fraction": 1 + 1e-9})
        assert any(coefficients(balancer, losses, mask).min() < 0 for losses in configurations(balancer, mask))


@kinds
def test_a_fraction_is_that_share_of_the_edge(tau: str, pairs: str, denominator: str) -> None:
    logits, active = logits_for(5, 1), torch.ones(5, dtype=torch.bool)
    losses = random_losses(5, 1)[0]
    ratios = {}
    for fraction in (0.25, 1.0):
        balancer = build(tau, pairs, denominator, logits, {"edge_fraction": fraction})
        output = differentiate(balancer.objective, balancer.normalization, losses, active).output
        assert float(output.edge_ratio) == pytest.approx(fraction, rel=1e-12)
        g = differentiate(build(tau, pairs, denominator, logits, 0.0).objective, balancer.normalization, losses, active)
        ratios[fraction] = (output.value - g.output.value) / output.discrepancy
    assert float(ratios[0.25] / ratios[1.0]) == pytest.approx(0.25, rel=1e-12)
    # The same lambda as a number is reported at the same share of the edge.
    number = build(tau, pairs, denominator, logits, float(ratios[0.25]))
    again = differentiate(number.objective, number.normalization, losses, active).output
    assert float(again.edge_ratio) == pytest.approx(0.25, rel=1e-9)


def test_the_formulas_of_the_notes() -> None:
    # Adjacent pairs, detached sum: 1 / (2 sum sigma) for tau = weights, min sigma / (2 sum sigma) for tau = one, when
    # the smallest weight is no end of the chain.
    logits = [0.3, -1.0, 0.5, 0.1]
    sigma = torch.sigmoid(torch.tensor(logits, dtype=torch.float64))
    for tau, edge in (("weights", 1 / (2 * sigma.sum())), ("one", sigma.min() / (2 * sigma.sum()))):
        balancer = build(tau, "adjacent", "detached_sum", logits, float(edge))
        output = differentiate(
            balancer.objective, balancer.normalization, random_losses(4, 1)[0], torch.ones(4, dtype=torch.bool)
        ).output
        assert float(output.edge_ratio) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("normalization", ["none", "initial", "rescaled", "log", "power"])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.slow
def test_no_normalization_moves_the_edge(pairs: str, normalization: str) -> None:
    # They are increasing functions of each loss, so they keep the signs.
    signs = {}
    for fraction in (0.999, 1.001):
        lowest = torch.inf
        for seed in range(6):
            options = {"normalization": normalization}
            balancer = build("weights", pairs, "sum", [0.0] * 4, {"edge_fraction": fraction}, **options)
            advance(balancer, torch.ones(4, dtype=torch.float64))
            lows = [advance(balancer, row).min() for row in 10 ** (random_losses(4, 20, seed=seed) - 2)]
            lowest = min([lowest, *map(float, lows)])
        signs[fraction] = lowest > 0
    assert signs == {0.999: True, 1.001: False}


def test_one_task_has_no_edge() -> None:
    for weight in (5.0, {"edge_fraction": 0.4}, {"edge_fraction": 3.0}):
        balancer = build("weights", "all", "detached_sum", [1.0, 1.0], weight)
        items = torch.tensor([1.0, 0.0])
        for _ in range(3):
            assert advance(balancer, torch.tensor([2.0, 1.0], dtype=torch.float64), items)[0] == pytest.approx(1.0)
        assert balancer.diagnose() == []


@pytest.mark.parametrize("weight", [0.01, {"edge_fraction": 0.4}])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_saturated_router_stays_finite(activation: str, tau: str, pairs: str, weight: Any) -> None:
    # Long runs drive a logit so far down that its weight underflows to zero in float32.
    logits = [0.0, -200.0, 1.0]
    balancer = build_balancer(
        "bilb", 3, activation=activation, initial_logits=logits, tau=tau, pairs=pairs, discrepancy_weight=weight
    )
    for row in random_losses(3, 3, dtype=torch.float32):
        for items in ([1.0, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 1]):
            assert advance(balancer, row, torch.tensor(items)).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in balancer.state_dict().values())


def test_a_task_without_weight_alone_is_refused() -> None:
    # Its weight is all there is to divide by.
    balancer = build_balancer("bilb", 3, initial_logits=[0.0, -200.0, 1.0])
    with pytest.raises(NonFiniteLossError, match=r"^the coefficient of task 'task_1' is nan: balancer 'bilb' cannot"):
        advance(balancer, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0]))


@kinds
def test_an_underflowed_weight_of_an_absent_task_leaves_the_edge_alone(tau: str, pairs: str, denominator: str) -> None:
    logits, active = [0.5, -1000.0, 1.0], torch.tensor([True, False, True])
    ratios = []
    for chosen, mask in ((logits, active), ([0.5, 1.0], torch.tensor([True, True]))):
        balancer = build(tau, pairs, denominator, chosen, 0.2)
        losses = torch.ones(len(chosen), dtype=torch.float64)
        ratios.append(differentiate(balancer.objective, balancer.normalization, losses, mask).output.edge_ratio)
    assert float(ratios[0]) == pytest.approx(float(ratios[1]), rel=1e-12) and ratios[0] > 0

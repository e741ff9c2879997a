"""The guards: each warning is given once, and only when it is due."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from tests.contract.cases import advance


def losses(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


APART = losses(1.0, 5.0, 1.0)


def celeba(weight: float, **more: object) -> LossBalancer:
    return build_balancer("bilb", task_names=["a", "b", "c"], preset="celeba", discrepancy_weight=weight, **more)


def test_nothing_to_say_about_a_healthy_run() -> None:
    for name in ("ls", "uw", "bilb"):
        balancer = build_balancer(name, 3)
        for _ in range(120):
            advance(balancer, APART)
        assert balancer.diagnose() == []


def test_negative_coefficient_and_edge_once_each() -> None:
    balancer = celeba(10.0)
    advance(balancer, APART)
    negative, edge = balancer.diagnose()
    assert negative == "a coefficient was negative in 1 of 1 steps: gradient ascent on that task"
    assert edge.startswith("discrepancy_weight was beyond its edge in 1 of 1 steps: a")
    advance(balancer, APART)
    assert balancer.diagnose() == []


def test_edge_without_a_negative_coefficient() -> None:
    # Beyond the edge a coefficient can be negative; with equal losses none is.
    balancer = celeba(1.0)
    advance(balancer, losses(2.0, 2.0, 2.0))
    messages = balancer.diagnose()
    assert len(messages) == 1 and "beyond its edge" in messages[0]
    advance(balancer, APART)
    assert [message[:22] for message in balancer.diagnose()] == ["a coefficient was nega"]


@pytest.mark.parametrize("fraction", [0.4, 1.0])
def test_at_the_edge_and_below_it_there_is_no_warning(fraction: float) -> None:
    balancer = celeba({"edge_fraction": fraction})  # type: ignore[arg-type]
    for _ in range(30):
        advance(balancer, APART)
    assert [m for m in balancer.diagnose() if "edge" in m] == []


def test_collapsed_router() -> None:
    balancer = build_balancer("bilb", 3, initial_logits=[-3.5, -4.0, -5.0], discrepancy_weight=0.0)
    advance(balancer, APART)
    assert balancer.diagnose() == ["all weights were below 0.05 in 1 of 1 steps: the method is now nearly ls"]
    for activation, initial in (("sigmoid", [-5.0, -5.0, 0.0]), ("softmax", 0.0)):
        options = {"activation": activation, "initial_logits": initial, "discrepancy_weight": 0.0}
        healthy = build_balancer("bilb", 3 if activation == "sigmoid" else 40, **options)
        advance(healthy, torch.linspace(1, 2, healthy.num_tasks))
        assert healthy.diagnose() == []


def test_domination_after_a_hundred_steps() -> None:
    # si: coefficients 1 / l.
    balancer = build_balancer("si", task_names=["small", "large"])
    for t in range(99):
        advance(balancer, losses(0.01, 1.0) if t < 2 else losses(1.0, 1.0))
        assert balancer.diagnose() == []
    advance(balancer, losses(1.0, 1.0))
    assert balancer.diagnose() == ["task 'small' had over 90 % of the sum of |coefficients| in 2 of 100 steps"]
    advance(balancer, losses(0.01, 1.0))
    assert balancer.diagnose() == []


def test_one_per_cent_is_not_over_one_per_cent() -> None:
    balancer = build_balancer("si", 2)
    for t in range(100):
        advance(balancer, losses(0.01, 1.0) if t < 1 else losses(1.0, 1.0))
    assert balancer.diagnose() == []


def test_a_single_task_dominates_nobody() -> None:
    one = build_balancer("bilb", 1)
    alone = build_balancer("bilb", 2)
    for _ in range(120):
        advance(one, losses(1.0))
        advance(alone, losses(1.0, 1.0), torch.tensor([1.0, 0.0]))
    assert one.diagnose() == [] and alone.diagnose() == []


def test_a_refused_step_is_not_counted() -> None:
    balancer = celeba(10.0)
    with pytest.raises(ArithmeticError):
        advance(balancer, losses(1.0, float("nan"), 1.0))
    assert balancer.diagnose() == []
    assert balancer.state_dict()["guards.counts"].tolist() == [0.0] * 4


def test_steps_that_are_counted_together_are_those_of_every_step() -> None:
    # 64 steps are put together at a time; the state, and a look, have those that wait, too.
    balancer, negative = celeba(10.0, absent_tasks="skip"), 0
    for t in range(1, 151):
        if t % 3:
            advance(balancer, APART)
        else:
            advance(balancer, losses(1.0, 1.0, 2.0), torch.tensor([1.0, 0.0, 0.0]))  # alone no task descends too far
        negative += bool((balancer.coefficients < 0).any())
        if t in (1, 63, 64, 65, 150):
            assert balancer.state_dict()["guards.counts"][:2].tolist() == [t, negative]
        if t == 70:
            balancer.to(dtype=torch.float64)
            balancer.to(dtype=torch.float32)
    assert negative == 100
    before = balancer.snapshot()
    advance(balancer, APART)
    balancer.rollback(before)
    assert balancer.state_dict()["guards.counts"][:2].tolist() == [150.0, 100.0]


def test_counters_are_state() -> None:
    first, second = build_balancer("si", 2), build_balancer("si", 2)
    for _ in range(60):
        advance(first, losses(0.01, 1.0))
    second.load_state_dict(first.state_dict())
    for _ in range(40):
        advance(second, losses(1.0, 1.0))
    assert second.diagnose() == ["task 'task_0' had over 90 % of the sum of |coefficients| in 60 of 100 steps"]

"""Floor, scale and priors: what happens to dF/dl before the backward pass, and what F is then said to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from tests.contract.cases import advance, random_losses


def losses(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def build(name: str, num_tasks: int, **options: object):
    return build_balancer(name, num_tasks, dtype=torch.float64, **options)


def test_floor_is_a_share_of_the_plain_sums_coefficient() -> None:
    # si: c = 1/l = (10, 1, 0.1); the plain sum with the same total has 3.7 each.
    floored = advance(build("si", 3, coefficient_floor=0.5), losses(0.1, 1.0, 10.0))
    torch.testing.assert_close(floored, losses(10.0, 1.85, 1.85), rtol=1e-14, atol=0)
    assert torch.equal(advance(build("si", 3), losses(0.1, 1.0, 10.0)), 1 / losses(0.1, 1.0, 10.0))
    unchanged = advance(build("si", 3, coefficient_floor=0.0), losses(0.1, 1.0, 10.0))
    torch.testing.assert_close(unchanged, losses(10.0, 1.0, 0.1), rtol=1e-14, atol=0)


def test_floor_lifts_negative_coefficients_and_leaves_absent_tasks() -> None:
    options = {"preset": "celeba", "discrepancy_weight": 10.0}
    row, items = losses(1.0, 5.0, 1.0, 9.0), torch.tensor([1.0, 1, 1, 0])
    assert advance(build("bilb", 4, **options), row, items).min() < 0
    floored = advance(build("bilb", 4, coefficient_floor=0.1, **options), row, items)
    assert floored[:3].min() > 0 and floored[3] == 0
    # A share of mean |c|: with the signed mean, tasks that cancel would have no floor.
    plain = advance(build("bilb", 4, **options), row, items)
    assert float(floored[:3].min()) == pytest.approx(0.1 * float(plain.abs().sum()) / 3, rel=1e-12)


def test_the_floor_leaves_the_router_alone() -> None:
    rows = random_losses(4, 5)
    free, floored = build("bilb", 4), build("bilb", 4, coefficient_floor=1.0)
    for row in rows:
        advance(free, row)
        advance(floored, row)
    name = "objective.router.logits"
    assert torch.equal(free.state_dict()[name], floored.state_dict()[name])


@pytest.mark.parametrize(("scale", "total"), [("sum_to_one", 1.0), ("sum_to_k", 3.0)])
@pytest.mark.parametrize("name", ["ls", "si", "bilb"])
def test_scale_brings_the_sum_of_absolute_values(name: str, scale: str, total: float) -> None:
    row, items = losses(0.1, 1.0, 7.0, 10.0), torch.tensor([1.0, 1, 0, 1])
    plain = advance(build(name, 4), row, items)
    scaled = advance(build(name, 4, coefficient_scale=scale), row, items)
    assert float(scaled.abs().sum()) == pytest.approx(total, rel=1e-14)
    torch.testing.assert_close(scaled / scaled[0], plain / plain[0], rtol=1e-13, atol=0)
    nothing = advance(build(name, 4, coefficient_scale=scale), row, torch.zeros(4))
    assert not nothing.any()


def test_scale_uses_absolute_values_under_negative_coefficients() -> None:
    options = {"preset": "celeba", "discrepancy_weight": 0.3, "coefficient_scale": "sum_to_one"}
    scaled = advance(build("bilb", 3, **options), losses(5.0, 1.0, 5.0))
    assert scaled.min() < 0 and float(scaled.abs().sum()) == pytest.approx(1.0)


def test_priors_of_ls_are_the_weights_of_the_sum() -> None:
    balancer = build("ls", 3, task_priors=[1.0, 0.0, 2.5])
    leaf = losses(2.0, 3.0, 4.0).requires_grad_()
    value = balancer.backward(leaf)
    assert leaf.grad.tolist() == [1.0, 0.0, 2.5]
    assert float(value) == 2.0 + 10.0


@pytest.mark.parametrize("name", ["si", "uw", "bilb"])
def test_priors_multiply_the_coefficients_of_every_method(name: str) -> None:
    priors = losses(1.0, 0.5, 3.0)
    row = losses(0.2, 1.0, 4.0)
    plain, weighted = build(name, 3), build(name, 3, task_priors=priors.tolist())
    leaf = row.clone().requires_grad_()
    plain_value = plain.backward(leaf)
    expected = leaf.grad * priors
    leaf = row.clone().requires_grad_()
    value = weighted.backward(leaf)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(value, plain_value + ((priors - 1) * plain.coefficients * row).sum(), rtol=1e-14, atol=0)
    # The balancer's own parameters descend F, not the user's priors.
    plain.step()
    weighted.step()
    ours, theirs = weighted.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_order_is_floor_scale_priors() -> None:
    options = {"coefficient_floor": 0.5, "coefficient_scale": "sum_to_one", "task_priors": [1.0, 2.0, 1.0]}
    found = advance(build("si", 3, **options), losses(0.1, 1.0, 10.0))
    floored = losses(10.0, 1.85, 1.85)
    torch.testing.assert_close(found, floored / floored.sum() * losses(1.0, 2.0, 1.0), rtol=1e-14, atol=0)


def test_priors_are_not_state() -> None:
    old, new = build("ls", 2, task_priors=[1.0, 5.0]), build("ls", 2, task_priors=[1.0, 7.0])
    new.load_state_dict(old.state_dict())
    assert advance(new, losses(1.0, 1.0)).tolist() == [1.0, 7.0]

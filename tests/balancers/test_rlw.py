"""RLW draws what it says, from nowhere else, once per update, and again where an update is dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.errors import NonFiniteLossError
from hf_bilb.losses.contract import TaskLosses

ROW = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


def rlw(num_tasks: int = 3, **options: object) -> LossBalancer:
    return build_balancer("rlw", num_tasks, dtype=torch.float64, **options)


def draws(balancer: LossBalancer, steps: int) -> Tensor:
    rows = []
    for _ in range(steps):
        balancer.backward(torch.ones(balancer.num_tasks, dtype=torch.float64, requires_grad=True))
        balancer.step()
        rows.append(balancer.coefficients)
    return torch.stack(rows)


@pytest.mark.slow
def test_the_weights_are_the_softmax_of_independent_normal_numbers() -> None:
    weights = draws(rlw(4), 4000)
    torch.testing.assert_close(weights.sum(1), torch.ones(4000, dtype=torch.float64))
    # The logarithms less their mean are the normal numbers less theirs: covariance I - 1/K.
    logits = weights.log() - weights.log().mean(1, keepdim=True)
    expected = torch.eye(4, dtype=torch.float64) - 0.25
    assert logits.mean(0).abs().max() < 0.05  # three standard errors of 0.014
    assert (logits.T.cov() - expected).abs().max() < 0.07
    standard = (logits / expected.diagonal().sqrt()).flatten()
    assert abs(standard.pow(4).mean() - 3) < 0.25  # kurtosis of a normal distribution
    # One draw says nothing about the next, nor one seed about its neighbour.
    assert (logits[1:] * logits[:-1]).mean().abs() < 0.03
    others = draws(rlw(4, seed=1), 4000).log()
    assert (logits * (others - others.mean(1, keepdim=True))).mean().abs() < 0.03


def test_neither_takes_from_nor_leaves_to_torchs_own_generator() -> None:
    torch.manual_seed(1)
    first, after = draws(rlw(), 5), torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), after)
    torch.manual_seed(2)
    assert torch.equal(draws(rlw(), 5), first)
    assert not torch.equal(draws(rlw(seed=1), 5), first)
    assert len(first.unique(dim=0)) == 5


def test_single_precision_draws_the_same() -> None:
    balancer = build_balancer("rlw", 3)
    balancer.backward(torch.ones(3, requires_grad=True))
    torch.testing.assert_close(balancer.coefficients.double(), draws(rlw(), 1)[0], rtol=1e-6, atol=0)


def test_the_micro_batches_of_an_update_share_their_weights() -> None:
    balancer = rlw()
    first = balancer.decide([TaskLosses(ROW, torch.ones(3))])
    second = balancer.decide([TaskLosses(2 * ROW, torch.ones(3))])
    assert torch.equal(first.coefficients, second.coefficients)
    balancer.step()
    assert not torch.equal(balancer.decide([TaskLosses(ROW, torch.ones(3))]).coefficients, first.coefficients)


def test_a_dropped_update_is_drawn_again() -> None:
    balancer, expected = rlw(), draws(rlw(), 3)
    assert torch.equal(draws(balancer, 1)[0], expected[0])
    before = balancer.state_dict()
    with pytest.raises(NonFiniteLossError):
        balancer.backward(ROW.where(ROW < 2, torch.nan).requires_grad_())
    balancer.step()
    assert torch.equal(balancer.state_dict()["objective.draws._extra_state"], before["objective.draws._extra_state"])
    # As the Trainer drops one: the decision is taken, then undone.
    balancer.decide([TaskLosses(ROW, torch.ones(3))])
    balancer.discard()
    balancer.rollback(before)
    balancer.step()
    assert torch.equal(draws(balancer, 2), expected[1:])


def test_drawing_begins_after_the_warm_up_and_goes_on_when_frozen() -> None:
    balancer, expected = rlw(), draws(rlw(), 4)
    balancer.phase = "warmup"
    assert torch.equal(draws(balancer, 2), torch.ones(2, 3, dtype=torch.float64))
    balancer.phase = "balancing"
    assert torch.equal(draws(balancer, 2), expected[:2])
    balancer.phase = "frozen"
    assert torch.equal(draws(balancer, 2), expected[2:])


def test_absent_tasks_take_no_part() -> None:
    balancer = rlw(absent_tasks="skip")
    expected = draws(rlw(), 1)[0]
    balancer.backward(ROW.where(ROW != 0.5, torch.nan).requires_grad_(), num_items=torch.tensor([1.0, 0.0, 1.0]))
    there = torch.tensor([True, False, True])
    torch.testing.assert_close(balancer.coefficients[there], expected[there] / expected[there].sum())
    assert balancer.coefficients[1] == 0

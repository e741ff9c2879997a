"""STCH between the mean and the maximum; the schedule's nadir and its identity at mu = 1; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.errors import NonFiniteLossError, OptionError
from tests.contract.cases import advance, random_losses

SOME = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def stch(num_tasks: int = 3, **options: Any) -> LossBalancer:
    return build_balancer("stch", num_tasks, dtype=torch.float64, **options)


def value_of(balancer: LossBalancer, losses: Tensor) -> float:
    return float(balancer.backward(losses.clone().requires_grad_()))


def test_a_small_mu_is_the_weighted_maximum_and_a_large_one_the_mean() -> None:
    losses = torch.tensor([0.2, 0.9, 3.0], dtype=torch.float64)
    preference, ideal = torch.tensor([4.0, 5.0, 1.0], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3])
    given = {"preference": preference.tolist(), "ideal_point": ideal.double().tolist()}
    terms = preference / preference.sum() * (losses - ideal)
    small = stch(mu=1e-3, **given)
    assert value_of(small, losses) == pytest.approx(float(terms.max()), abs=2e-3)
    torch.testing.assert_close(small.coefficients, torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64))
    large = stch(mu=1e6, **given)
    advance(large, losses)
    torch.testing.assert_close(large.coefficients, preference / preference.sum() / 3, rtol=1e-5, atol=0)


def test_only_the_ratios_of_the_preference_count() -> None:
    losses = torch.tensor([0.2, 0.9, 3.0], dtype=torch.float64)
    one, other = stch(preference=[4.0, 5.0, 1.0], mu=0.1), stch(preference=[0.4, 0.5, 0.1], mu=0.1)
    assert value_of(one, losses) == pytest.approx(value_of(other, losses), rel=1e-14)
    equal, default = stch(preference=[3.0] * 3, mu=0.1), stch(mu=0.1)
    assert value_of(equal, losses) == pytest.approx(value_of(default, losses), rel=1e-14)
    # Over the tasks that are there.
    absent = stch(preference=[4.0, 5.0, 1.0], mu=0.1, absent_tasks="skip")
    expected = advance(stch(2, preference=[4.0, 1.0], mu=0.1), losses[[0, 2]])
    found = advance(absent, losses.where(SOME > 0, torch.nan), SOME)
    torch.testing.assert_close(found[[0, 2]], expected, rtol=1e-12, atol=0)


def test_the_papers_form_takes_any_loss_and_does_not_overflow() -> None:
    balancer = stch(mu=1e-3)
    losses = torch.tensor([-1e3, 0.0, 1e6], dtype=torch.float64)
    torch.testing.assert_close(advance(balancer, losses), torch.tensor([0.0, 0.0, 1 / 3], dtype=torch.float64))
    assert advance(stch(normalization="log"), losses.abs() + 1).isfinite().all()


def follow(balancer: LossBalancer, rows: Tensor, length: int, start: int = 0) -> Tensor:
    """One update per row in epochs of `length`, numbered from `start`; returns the coefficients."""
    found = []
    for t, row in enumerate(rows):
        balancer.on_epoch_begin(start + t // length)
        found.append(advance(balancer, row))
    return torch.stack(found)


def test_the_schedule_at_mu_one_is_a_plain_sum_of_relative_losses() -> None:
    rows = random_losses(3, 10)
    found = follow(stch(warmup_epochs=2), rows, 2)
    torch.testing.assert_close(found[:6], 1 / rows[:6], rtol=1e-12, atol=0)
    nadir = rows[4:6].mean(0)
    relative = rows[6:] / nadir
    torch.testing.assert_close(found[6:], 3 / nadir / relative.sum(1, keepdim=True), rtol=1e-12, atol=0)


def test_epochs_count_from_the_first_that_is_balanced() -> None:
    rows, balancer = random_losses(3, 10), stch(warmup_epochs=1, mu=0.2)
    balancer.phase = "warmup"
    follow(balancer, rows, 2)
    balancer.phase = "balancing"
    found = follow(balancer, rows, 2, start=5)
    assert torch.equal(found, follow(stch(warmup_epochs=1, mu=0.2), rows, 2))
    assert (found[4:] - 1 / rows[4:]).abs().max() > 1e-3


def test_items_weigh_in_the_nadir_and_a_late_task_gets_its_first_loss() -> None:
    rows, balancer = random_losses(3, 5), stch(warmup_epochs=0, mu=0.5, absent_tasks="skip")
    rest = random_losses(3, 1, seed=1)[0]
    items = torch.tensor([[3.0, 0.0, 1.0], [1.0, 0.0, 2.0]], dtype=torch.float64)
    balancer.on_epoch_begin(0)
    for row, counts in zip(rows, items, strict=False):
        advance(balancer, row.where(counts > 0, torch.nan), counts)
    balancer.on_epoch_begin(1)
    advance(balancer, rest.where(SOME > 0, torch.nan), SOME)  # still without it
    nadir = (rows[:2] * items).sum(0) / items.sum(0).clamp(min=1)
    nadir[1] = rows[2, 1]
    for row in rows[2:]:
        exponents = 2 * (row / nadir).log()
        torch.testing.assert_close(advance(balancer, row), 3 * torch.softmax(exponents, 0) / row, rtol=1e-12, atol=0)


def test_the_first_comparison_after_the_warm_up_may_be_with_a_held_loss() -> None:
    # Task 1 is known from the warm-up epoch before the nadir's, and is not there in the nadir's own.
    rows, balancer = random_losses(3, 3), stch(warmup_epochs=1, absent_tasks="hold")
    balancer.on_epoch_begin(0)
    advance(balancer, rows[0])
    for epoch in (1, 2):
        balancer.on_epoch_begin(epoch)
        coefficients = advance(balancer, rows[epoch].where(SOME > 0, torch.nan), SOME)
    relative = rows[2] / rows[1]
    relative[1] = 1.0  # its last known loss over itself
    expected = 3 / rows[1] / relative.sum()
    torch.testing.assert_close(coefficients[[0, 2]], expected[[0, 2]], rtol=1e-12, atol=0)


def test_a_held_loss_is_no_nadir_where_the_task_itself_comes_back() -> None:
    # Task 1 is not there in the nadir's epoch, and is there again in the first step after it.
    rows, balancer = random_losses(3, 3), stch(warmup_epochs=1, mu=0.5, absent_tasks="hold")
    counts = torch.ones(3, 3, dtype=torch.float64)
    counts[1] = SOME
    for epoch in range(3):
        balancer.on_epoch_begin(epoch)
        found = advance(balancer, rows[epoch].where(counts[epoch] > 0, torch.nan), counts[epoch])
    nadir = torch.stack([rows[1, 0], rows[2, 1], rows[1, 2]])
    expected = 3 * torch.softmax(2 * (rows[2] / nadir).log(), 0) / rows[2]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_frozen_schedule_goes_no_further() -> None:
    balancer, rows = stch(warmup_epochs=0), random_losses(3, 6)
    follow(balancer, rows[:2], 2)
    balancer.phase = "frozen"
    torch.testing.assert_close(follow(balancer, rows[2:], 2, start=1), 1 / rows[2:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_the_schedule_refuses_a_loss_that_has_no_logarithm(loss: float) -> None:
    balancer = stch(2, warmup_epochs=1)
    balancer.on_epoch_begin(0)
    with pytest.raises(NonFiniteLossError, match=rf"'task_1' is {loss}, but balancer 'stch' takes logarithms"):
        value_of(balancer, torch.tensor([1.0, loss], dtype=torch.float64))


def test_what_is_refused() -> None:
    for options, message in (
        ({"mu": 0.0}, r"^balancer.mu: 0.0 is not valid, expected a number > 0$"),
        ({"warmup_epochs": -1}, r"^balancer.warmup_epochs: -1 is not valid, expected an integer >= 0 or null$"),
        (
            {"preference": [1.0, 0.0, 1.0]},
            r"^balancer.preference: \[1.0, 0.0, 1.0\] is not valid, expected numbers > 0$",
        ),
        ({"preference": [1.0]}, r"^balancer.preference: got 1 values, expected one for each of the 3 tasks$"),
        ({"ideal_point": [1.0]}, r"^balancer.ideal_point: got 1 values, expected one for each of the 3 tasks$"),
        ({"warmup_epochs": 4, "preference": [1.0] * 3}, r"^balancer.preference: .* not valid with warmup_epochs"),
        ({"warmup_epochs": 4, "ideal_point": 0.1}, r"^balancer.ideal_point: 0.1 is not valid with warmup_epochs"),
        ({"warmup_epochs": 4, "normalization": "log"}, r"^balancer.normalization: 'log' is not valid"),
    ):
        with pytest.raises(OptionError, match=message):
            stch(**options)
    with pytest.raises(OptionError, match=r"^warmup_epochs: needs balancer.on_epoch_begin\(epoch\)"):
        value_of(stch(warmup_epochs=4), torch.ones(3, dtype=torch.float64))

"""IMTL-L beside the methods that its formula is tied to."""

from __future__ import annotations

import pytest
import torch

from hf_bilb import build_balancer
from hf_bilb.errors import OptionError
from tests.contract.cases import advance, random_losses


def test_it_is_twice_uw_with_the_sign_of_s_turned() -> None:
    # Plain descent of s is the same path where UW's rate, with half the gradient, is twice as large.
    scale = build_balancer("imtl_l", 3, dtype=torch.float64, optimizer="sgd", learning_rate=0.1, initial_log_scale=0.3)
    variance = build_balancer(
        "uw", 3, dtype=torch.float64, optimizer="sgd", learning_rate=0.2, initial_log_variance=-0.3
    )
    for row in random_losses(3, 20):
        torch.testing.assert_close(advance(scale, row), 2 * advance(variance, row), rtol=1e-12, atol=0)
    # As numbers that moved.
    assert (scale.state_dict()["objective.log_scale"] - 0.3).abs().min() > 0.01


def test_constant_losses_are_brought_to_one() -> None:
    balancer = build_balancer("imtl_l", 3, dtype=torch.float64)
    losses = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    for _ in range(600):
        coefficients = advance(balancer, losses)
    torch.testing.assert_close(coefficients * losses, torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0)


def test_initial_log_scale_takes_one_number_per_task() -> None:
    balancer = build_balancer("imtl_l", 2, initial_log_scale=[0.0, 1.0])
    torch.testing.assert_close(advance(balancer, torch.ones(2)), torch.tensor([1.0, torch.e]))
    with pytest.raises(OptionError, match=r"^balancer.initial_log_scale: got 1 values, expected one for each of the 2"):
        build_balancer("imtl_l", 2, initial_log_scale=[0.0])

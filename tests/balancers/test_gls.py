"""GLS where a product of losses would fail, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from hf_bilb import build_balancer
from hf_bilb.errors import NonFiniteLossError, OptionError


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_a_thousand_tasks_neither_underflow_nor_overflow(size: float) -> None:
    balancer = build_balancer("gls", 1000)
    losses = torch.full((1000,), size, requires_grad=True)
    assert losses.prod().item() in (0.0, float("inf"))
    # All alike: the geometric mean is the loss itself, and each task has 1 / K of it.
    torch.testing.assert_close(balancer.backward(losses), torch.tensor(size), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.grad, torch.full((1000,), 1e-3), rtol=1e-5, atol=0)


def test_absent_tasks_are_no_factor_of_the_mean() -> None:
    balancer = build_balancer("gls", 3, dtype=torch.float64, absent_tasks="skip")
    losses = torch.tensor([4.0, torch.nan, 9.0], dtype=torch.float64, requires_grad=True)
    value = balancer.backward(losses, num_items=torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(value, torch.tensor(6.0, dtype=torch.float64))
    torch.testing.assert_close(losses.grad, torch.tensor([0.75, 0.0, 1 / 3], dtype=torch.float64))


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_a_loss_that_has_no_logarithm_is_refused(loss: float) -> None:
    balancer = build_balancer("gls", 2)
    with pytest.raises(NonFiniteLossError, match=rf"'task_1' is {loss}, but balancer 'gls' takes logarithms: .* > 0"):
        balancer.backward(torch.tensor([1.0, loss], requires_grad=True))
    with pytest.raises(OptionError, match=r"^balancer.normalization: 'log' is not valid, .* gls takes the logarithm"):
        build_balancer("gls", 2, normalization="log")

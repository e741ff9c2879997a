"""UW: half the precision of each task is what its loss is multiplied with; IMTL-L: its scale."""

from __future__ import annotations

import pytest
import torch

from hf_bilb import build_balancer
from tests.contract.cases import advance, random_losses


@pytest.mark.parametrize(("name", "factor", "sign"), [("uw", 0.5, -1), ("imtl_l", 1.0, 1)])
def test_the_weights_are_the_coefficients(name: str, factor: float, sign: int) -> None:
    balancer = build_balancer(name, 3, dtype=torch.float64, learning_rate=0.3)
    (own,) = balancer.objective.parameters()
    for row in random_losses(3, 3):
        expected = factor * torch.exp(sign * own.detach())
        advance(balancer, row)
        torch.testing.assert_close(balancer.weights, expected, rtol=1e-15, atol=0)
        torch.testing.assert_close(balancer.coefficients, expected, rtol=1e-14, atol=0)

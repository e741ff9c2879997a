"""UW: half the precision of each task is what its loss is multiplied with; IMTL-L: its scale."""

from __future__ import annotations

import pytest
import torch

from hf_bilb import build_balancer
from hf_bilb.losses.contract import TaskLosses
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


def test_micro_batches_are_combined_by_their_items() -> None:
    # s <- s - rate (n1 g1 + n2 g2) / (n1 + n2),   g = dF/ds = 0.5 (1 - exp(-s) l)
    balancer = build_balancer("uw", 3, dtype=torch.float64, optimizer="sgd", learning_rate=0.4)
    start = balancer.objective.log_variance.detach().clone()
    first, second = random_losses(3, 2)
    numbers = torch.tensor([[1.0, 2, 1], [4, 5, 3]], dtype=torch.float64)
    for losses, items in zip((first, second), numbers, strict=True):
        balancer.decide([TaskLosses(losses, items)])
    balancer.step()
    mean = (numbers[0].sum() * first + numbers[1].sum() * second) / numbers.sum()
    expected = start - 0.4 * 0.5 * (1 - torch.exp(-start) * mean)
    torch.testing.assert_close(balancer.objective.log_variance.detach(), expected, rtol=1e-14, atol=0)

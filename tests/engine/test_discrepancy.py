"""The discrepancy against an explicit double loop: value and gradient, ties, gaps, smoothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_bilb.balancers.discrepancy import discrepancy, largest_slopes


def by_loops(values: Tensor, active: Tensor, pairs: str, smoothing: float) -> Tensor:
    """The definition: over neighbours among the active tasks, or the mean over their pairs times n - 1."""
    there = [i for i in range(len(values)) if active[i]]
    chosen = list(itertools.pairwise(there)) if pairs == "adjacent" else list(itertools.combinations(there, 2))
    total = values.new_zeros(())
    for i, j in chosen:
        difference = values[i] - values[j]
        total = total + (difference.abs() if smoothing == 0 else (difference**2 + smoothing).sqrt())
    return total if pairs == "adjacent" or not chosen else total / len(chosen) * (len(there) - 1)


VALUES = {
    "apart": [0.3, -1.0, 2.0, 0.1, 5.0, 0.7, 0.2],
    "ties": [1.0, 1.0, 0.5, 1.0, 0.5, 2.0, 2.0],
    "all_equal": [1.5] * 7,
}
ACTIVE = {
    "all": [1] * 7,
    "gaps": [0, 1, 1, 0, 0, 1, 1],
    "two": [1, 0, 0, 0, 0, 0, 1],
    "one": [0, 0, 1, 0, 0, 0, 0],
    "none": [0] * 7,
}


@pytest.mark.parametrize("smoothing", [0.0, 1e-2])
@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@pytest.mark.parametrize("active", ACTIVE.values(), ids=ACTIVE)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_value_and_gradient(values: list[float], active: list[int], pairs: str, smoothing: float) -> None:
    mask = torch.tensor(active, dtype=torch.bool)
    results = []
    for function in (discrepancy, by_loops):
        # Inactive entries are meaningless: they must not enter.
        leaf = torch.where(mask, torch.tensor(values, dtype=torch.float64), torch.full((7,), 77.0, dtype=torch.float64))
        leaf.requires_grad_()
        value = function(leaf, mask, pairs, smoothing)
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True) if value.requires_grad else (None,)
        results.append((value.detach(), torch.zeros_like(leaf) if gradient is None else gradient))
    (ours, our_gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(our_gradient, expected_gradient, rtol=1e-12, atol=1e-13)


def test_random_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in range(1, 9):
        for _ in range(20):
            # Rounded, so that ties are common.
            values = torch.randn(size, dtype=torch.float64, generator=generator).mul(2).round().div(2).requires_grad_()
            active = torch.rand(size, generator=generator) < 0.7
            for pairs in ("adjacent", "all"):
                ours, expected = discrepancy(values, active, pairs), by_loops(values, active, pairs, 0.0)
                torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
                if not expected.requires_grad:
                    continue
                found, wanted = (torch.autograd.grad(x, values, retain_graph=True)[0] for x in (ours, expected))
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_equal_values_have_no_gradient() -> None:
    values = torch.full((5,), 0.1, dtype=torch.float64, requires_grad=True)
    for pairs in ("adjacent", "all"):
        value = discrepancy(values, torch.ones(5, dtype=torch.bool), pairs)
        assert value == 0
        assert not torch.autograd.grad(value, values)[0].any()


def test_a_thousand_tasks() -> None:
    values = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    value = discrepancy(values, torch.ones(1000, dtype=torch.bool), "all")
    expected = (values.unsqueeze(0) - values.unsqueeze(1)).abs().sum() / 2 * 2 / 1000
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(x, values)[0] for x in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@pytest.mark.parametrize("active", ACTIVE.values(), ids=ACTIVE)
@pytest.mark.slow
def test_largest_slopes_are_reached_and_never_passed(active: list[int], pairs: str) -> None:
    mask = torch.tensor(active, dtype=torch.bool)
    bounds = largest_slopes(mask, pairs, torch.float64)
    largest = torch.zeros(7, dtype=torch.float64)
    for order in itertools.islice(itertools.permutations(range(7)), 0, 5040, 3):
        values = torch.tensor(order, dtype=torch.float64, requires_grad=True)
        value = discrepancy(values, mask, pairs)
        largest = torch.maximum(largest, torch.autograd.grad(value, values)[0].abs())
    torch.testing.assert_close(bounds, largest, rtol=1e-14, atol=0)

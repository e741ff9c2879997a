"""How the tasks go through the backward pass: at once or one by one, with the same result."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bilb.engine.task_gradients import at_once, gradient_rows, gramian_of
from hf_bilb.losses.contract import TaskLosses, as_task_losses

FLOAT = torch.float64
NAMES = ("a", "b", "c")


class ReadsOnTheHost(torch.autograd.Function):
    """An operation whose backward pass cannot take several gradients at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Tensor:
        return incoming[0] * (2.0 if incoming[0].sum().item() < 1e9 else 0.0)


def losses_of(middle: Any) -> tuple[Tensor, list[nn.Parameter]]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 6, dtype=FLOAT)
    features = middle(layer(torch.randn(2, 4, dtype=FLOAT)))
    heads = torch.randn(3, *features.shape, dtype=FLOAT)
    return (heads * features).sum((1, 2)), list(layer.parameters())


@pytest.mark.parametrize("tasks_per_pass", [2, 3])
def test_what_cannot_be_batched_goes_one_by_one(tasks_per_pass: int) -> None:
    losses, parameters = losses_of(ReadsOnTheHost.apply)
    batch = TaskLosses(losses, torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradient_rows(batch, parameters, tasks_per_pass)
    alone = gradient_rows(batch, parameters, 1)
    assert found.whole is not None and alone.whole is not None and torch.equal(found.whole, alone.whole)
    assert found.whole.any(dim=1).all()


def test_all_at_once_where_layers_are_small() -> None:
    small, large = nn.Linear(16, 16), nn.Linear(512, 512)
    assert at_once(list(small.parameters()), 40) == 40
    assert at_once(list(large.parameters()), 40) == 1
    assert at_once(list(nn.Conv2d(1, 1, 3).parameters()), 40) == 1
    features = small(torch.randn(64, 16))
    assert at_once([features], 40) == 40
    assert at_once([features, features[None]], 40) == 1
    assert at_once([torch.autograd.graph.get_gradient_edge(features)], 40) == 1


@pytest.mark.parametrize("tasks_per_pass", [1, 3])
def test_scalars_go_through_their_own_head_alone(tasks_per_pass: int) -> None:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 5), nn.ModuleList(nn.Linear(5, 1) for _ in NAMES)
    passed = []

    def model() -> dict[str, Tensor]:
        features, losses = trunk(torch.ones(2, 4)), {}
        for name, head in zip(NAMES, heads, strict=True):
            out = head(features)
            out.register_hook(lambda _, name=name: passed.append(name))
            losses[name] = out.square().mean()
        return losses

    batch = as_task_losses(model(), None, NAMES)
    rows = gradient_rows(batch, list(trunk.parameters()), tasks_per_pass)
    if tasks_per_pass == 1:
        assert passed == list(NAMES)
    expected = [torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True) for loss in model().values()]
    for row, *of_tasks in zip(rows, *expected, strict=True):
        torch.testing.assert_close(row, torch.stack([g.flatten() for g in of_tasks]))


@pytest.mark.parametrize("size", [300, 8])
def test_an_absent_task_is_not_passed(size: int) -> None:
    layer = nn.Linear(size, size, dtype=FLOAT)
    out = layer(torch.ones(2, size, dtype=FLOAT)).sum()
    losses = torch.stack([out, out + torch.nan, out * 3])
    rows = gradient_rows(TaskLosses(losses, torch.tensor([1.0, 0.0, 1.0])), list(layer.parameters()), None)
    assert (rows.whole is None) == (size == 8)  # small ones go through all at once
    for row in rows:
        assert not row[1].any() and row[0].any()
        assert torch.equal(row[2], 3 * row[0])


def test_gramian_and_sums_side_by_side_or_not() -> None:
    losses, parameters = losses_of(torch.tanh)
    batch = TaskLosses(losses, torch.ones(3))
    apart, together = (gradient_rows(batch, parameters, n) for n in (3, 1))
    assert apart.whole is None and together.whole is not None
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=FLOAT)
    torch.testing.assert_close(gramian_of(apart, apart), gramian_of(together, together), rtol=1e-13, atol=0)
    both = [rows.times(weights).plus(rows).weighted(weights) for rows in (apart, together)]
    for one, two in zip(*both, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)

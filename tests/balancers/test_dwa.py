"""DWA's two records against plain loops over everything seen; absent tasks, accumulation, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.errors import NonFiniteLossError, OptionError
from hf_bilb.losses.contract import TaskLosses
from tests.contract.cases import advance, random_losses


def dwa(num_tasks: int = 3, **options: Any) -> LossBalancer:
    return build_balancer("dwa", num_tasks, dtype=torch.float64, **options)


def weights_of(ratios: list[float], temperature: float) -> list[float]:
    raised = [math.exp(ratio / temperature) for ratio in ratios]
    return [len(ratios) * value / sum(raised) for value in raised]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def by_window(rows: Tensor, n: int, temperature: float) -> list[float]:
    """The coefficients after all `rows` [t, K] were seen, with ones where the window reaches back before the first."""
    if len(rows) <= n + 1:
        return [1 / rows.shape[1]] * rows.shape[1]
    ratios = []
    for column in rows.T.tolist():
        seen = [1.0] * (2 * n) + column
        ratios.append(mean(seen[-n:]) / mean(seen[-2 * n : -n]))
    return [weight / len(ratios) for weight in weights_of(ratios, temperature)]


@pytest.mark.parametrize(("n", "temperature"), [(1, 2.0), (3, 0.5), (25, 2.0)])
def test_the_window_is_that_of_a_plain_loop(n: int, temperature: float) -> None:
    rows = random_losses(3, 2 * n + 8)
    balancer = dwa(window=n, temperature=temperature)
    for t, row in enumerate(rows):
        expected = torch.tensor(by_window(rows[: t + 1], n, temperature), dtype=torch.float64)
        torch.testing.assert_close(advance(balancer, row), expected, rtol=1e-12, atol=0)
    assert (expected - 1 / 3).abs().max() > 1e-3


def test_epochs_of_different_lengths_average_items() -> None:
    rows, balancer = random_losses(2, 9), dwa(2, window="epoch", temperature=0.5)
    epochs = [[0, 1, 2], [3], [4, 5], [6, 7, 8]]
    items = torch.rand(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(5).ceil()
    means: list[list[float]] = []
    for epoch, steps in enumerate(epochs):
        balancer.on_epoch_begin(epoch)
        ratios = [1.0, 1.0] if epoch < 2 else [b / a for a, b in zip(*means[-2:], strict=True)]
        for t in steps:
            balancer.backward(rows[t].clone().requires_grad_(), num_items=items[t])
            balancer.step()
            torch.testing.assert_close(balancer.coefficients.tolist(), weights_of(ratios, 0.5), rtol=1e-12, atol=0)
        means.append(((rows * items)[steps].sum(0) / items[steps].sum(0)).tolist())
    assert max(ratios) > 1.1 * min(ratios)


def test_an_epoch_in_micro_batches_is_the_same_epoch() -> None:
    rows, items = random_losses(2, 16), torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    whole, parts = dwa(2, window="epoch"), dwa(2, window="epoch")
    for t in range(8):
        pair = [TaskLosses(*one) for one in zip(rows[2 * t : 2 * t + 2], items, strict=True)]
        for balancer, micro_batches in ((whole, [pair]), (parts, [[one] for one in pair])):
            balancer.on_epoch_begin(t // 2)
            decisions = [balancer.decide(one) for one in micro_batches]
            balancer.step()
        torch.testing.assert_close(decisions[-1].coefficients, whole.coefficients, rtol=1e-12, atol=0)
    assert (whole.coefficients - 1).abs().max() > 1e-3


def test_a_task_that_is_absent_keeps_its_record() -> None:
    rows, other = random_losses(2, 12), random_losses(1, 6, seed=9)[:, 0]
    balancer, present = dwa(window=2, absent_tasks="skip"), dwa(2, window=2)
    some = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    for t, row in enumerate(rows):
        if t % 2:
            # The task that comes every other time has a window over its own losses.
            coefficients = advance(balancer, torch.cat([row, other[None, t // 2]]))
            advance(present, row)
        else:
            found = advance(balancer, torch.cat([row, row.new_full((1,), torch.nan)]), some)
            torch.testing.assert_close(found[:2], advance(present, row), rtol=1e-12, atol=0)
            assert found[2] == 0
    ratios = [mean(rows[-2:, k].tolist()) / mean(rows[-4:-2, k].tolist()) for k in range(2)]
    ratios.append(mean(other[-2:].tolist()) / mean(other[-4:-2].tolist()))
    torch.testing.assert_close(coefficients.tolist(), [w / 3 for w in weights_of(ratios, 2.0)], rtol=1e-12, atol=0)


def test_a_task_at_zero_counts_as_neither_faster_nor_slower() -> None:
    rows = random_losses(2, 8)
    rows[:, 0] = 0.0
    balancer = dwa(2, window=2)
    for row in rows:
        coefficients = advance(balancer, row)
    ratio = mean(rows[-2:, 1].tolist()) / mean(rows[-4:-2, 1].tolist())
    expected = [weight / 2 for weight in weights_of([1.0, ratio], 2.0)]
    torch.testing.assert_close(coefficients.tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{"window": 2}, {"window": "epoch"}])
def test_a_batch_that_is_refused_leaves_no_trace(options: dict[str, Any]) -> None:
    balancer = dwa(absent_tasks="hold", **options)
    for epoch, row in enumerate(random_losses(3, 5)):
        balancer.on_epoch_begin(epoch)
        advance(balancer, row)
    before = balancer.state_dict()
    balancer.on_epoch_begin(5)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteLossError):
            balancer.backward(torch.tensor([1.0, bad, 1.0], dtype=torch.float64, requires_grad=True))
    # Neither does a decision that nobody takes back, nor a batch without any task.
    row, nothing = torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert balancer.refused([balancer.decide([TaskLosses(row, torch.ones(3))])])[0] is not None
    balancer.discard()
    advance(balancer, row, nothing)
    after = balancer.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"epoch", "guards.counts"}


def test_frozen_weights_stay_over_the_epochs() -> None:
    balancer = dwa(window="epoch", temperature=0.5)
    rows = random_losses(3, 10)
    for t, row in enumerate(rows[:7]):
        balancer.on_epoch_begin(t // 2)
        coefficients = advance(balancer, row)
    assert (coefficients - 1).abs().max() > 1e-3
    balancer.phase = "frozen"
    for t, row in enumerate(rows[7:]):
        balancer.on_epoch_begin(4 + t)
        assert torch.equal(advance(balancer, row), coefficients)


def test_what_is_refused() -> None:
    for options, message in (
        ({"temperature": 0.0}, r"^balancer.temperature: 0.0 is not valid, expected a number > 0$"),
        ({"window": 0}, r'^balancer.window: 0 is not valid, expected "epoch" or an integer >= 1$'),
        ({"window": "epochs"}, r'^balancer.window: \'epochs\' is not valid, .*"epoch"'),
        ({"normalization": "log"}, r"^balancer.normalization: 'log' is not valid, .* ratios of the losses$"),
    ):
        with pytest.raises(OptionError, match=message):
            dwa(**options)
    balancer = dwa(window="epoch")
    with pytest.raises(OptionError, match=r"^window: 'epoch' needs balancer.on_epoch_begin\(epoch\)"):
        balancer.backward(torch.ones(3, dtype=torch.float64, requires_grad=True))
    balancer.on_epoch_begin(0)
    advance(balancer, torch.ones(3, dtype=torch.float64))

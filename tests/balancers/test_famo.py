"""FAMO beside the recorded trajectories: the toy problem, the next batch's losses, bounds, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from examples import toy
from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.errors import NonFiniteLossError, OptionError
from hf_bilb.losses.contract import TaskLosses
from tests.balancers.reference import load

GAMMA = 1e-3


def famo(num_tasks: int = 3, **options: Any) -> LossBalancer:
    return build_balancer("famo", num_tasks, dtype=torch.float64, weight_decay=GAMMA, **options)


def rows(steps: int, num_tasks: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + torch.rand(steps, num_tasks, generator=generator, dtype=torch.float64)


class ByHand:
    """Algorithm 1 as it stands in the paper, on K numbers."""

    def __init__(self, num_tasks: int) -> None:
        self.logits = torch.zeros(num_tasks, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=0.025, weight_decay=GAMMA)

    def coefficients(self, losses: Tensor) -> Tensor:
        weighted = torch.softmax(self.logits.detach(), 0) / (losses + 1e-8)
        return weighted / weighted.sum()

    def follow(self, before: Tensor, after: Tensor) -> None:
        delta = (before + 1e-8).log() - (after + 1e-8).log()
        (self.logits.grad,) = torch.autograd.grad(torch.softmax(self.logits, 0), self.logits, delta)
        self.optimizer.step()


def update(balancer: LossBalancer, losses: Tensor, after: Tensor | None = None, items: Tensor | None = None) -> Tensor:
    balancer.backward(losses.clone().requires_grad_(), num_items=items)
    balancer.step(reevaluate=None if after is None else lambda: after)
    assert balancer.coefficients is not None
    return balancer.coefficients


@pytest.mark.parametrize(("reevaluate", "steps"), [("same_batch", 20), ("next_batch", 1001)])
@pytest.mark.slow
def test_the_toy_problem_is_the_official_one(reevaluate: str, steps: int) -> None:
    # Nothing is drawn there: the next step's losses are those after this one, and both must go the same way. From the
    # starts above the chaotic valleys, and the symmetric one, rounding errors grow.
    case, start = load("toy_famo"), 3
    lowest = [-21.0 * toy.SCALE, -21.0]
    balancer = build_balancer(
        "famo", 2, dtype=torch.float64, weight_decay=0.0, min_losses=lowest, reevaluate=reevaluate
    )
    point = torch.tensor(case["inits"][start], requires_grad=True)
    optimizer = torch.optim.Adam([point], lr=case["lr"])
    points, logits = [], []
    for _ in range(steps):
        points.append(point.detach().numpy().copy())
        losses = toy.task_losses(point)
        optimizer.zero_grad()
        balancer.backward(losses)
        logits.append(balancer.state_dict()["objective.logits"].numpy())
        optimizer.step()
        balancer.step(reevaluate=lambda: toy.task_losses(point))
    assert np.abs(np.stack(points[:20]) - case["x_first20"][start]).max() <= 1e-9
    if steps > 1000:
        assert np.abs(points[1000] - case["x"][start, 1]).max() <= 1e-9
        assert np.abs(logits[1000] - case["famo_logits"][start, 1]).max() <= 1e-9


def test_the_next_batch_is_compared_before_it_is_weighed() -> None:
    balancer, reference = famo(reevaluate="next_batch"), ByHand(3)
    losses = rows(8)
    for t, row in enumerate(losses):
        if t:
            reference.follow(losses[t - 1], row)
        torch.testing.assert_close(update(balancer, row), reference.coefficients(row), rtol=1e-12, atol=0)
    assert not balancer.needs_reevaluation and famo().needs_reevaluation


def test_the_same_batch_in_several_parts_and_with_counts() -> None:
    # Two micro-batches of a window: what counts is the losses of both together, before and after.
    balancer, reference = famo(num_tasks=2), ByHand(2)
    for before, after in zip(rows(10, 2).split(2), rows(10, 2, seed=1).split(2), strict=True):
        items = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        parts, again = ([TaskLosses(*pair) for pair in zip(losses, items, strict=True)] for losses in (before, after))
        decision = balancer.decide(parts)
        balancer.step(reevaluate=[lambda part=part: part for part in again])
        means = [(losses * items).sum(0) / items.sum(0) for losses in (before, after)]
        torch.testing.assert_close(decision.coefficients, reference.coefficients(means[0]), rtol=1e-12, atol=0)
        reference.follow(*means)
    torch.testing.assert_close(balancer.state_dict()["objective.logits"], reference.logits.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reevaluate", ["same_batch", "next_batch"])
def test_a_task_that_is_absent_has_made_no_progress(reevaluate: str) -> None:
    # Task 1 comes in every second step; with `skip` the others go on as without it, until it can be compared again.
    balancer = famo(reevaluate=reevaluate, absent_tasks="skip", optimizer="sgd", learning_rate=0.1)
    alone = famo(2, reevaluate=reevaluate, optimizer="sgd", learning_rate=0.1)
    items, others = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([True, False, True])
    losses, after = rows(4), rows(4, seed=1)
    for row, later in zip(losses, after, strict=True):
        again = TaskLosses(later.where(others, torch.nan), items)
        balancer.backward(row.where(others, torch.nan).requires_grad_(), num_items=items)
        balancer.step(reevaluate=lambda again=again: again)
        torch.testing.assert_close(balancer.coefficients[others], update(alone, row[others], later[others]))
        assert balancer.coefficients[1] == 0
    found = balancer.state_dict()["objective.logits"]
    torch.testing.assert_close(found[others], alone.state_dict()["objective.logits"], rtol=1e-12, atol=0)
    assert found[1] == 0
    # Back again, it has nothing to be compared with.
    balancer.backward(losses[0].clone().requires_grad_())
    if reevaluate == "next_batch":
        alone.backward(losses[0][others].clone().requires_grad_())
        found = balancer.state_dict()["objective.logits"]
        torch.testing.assert_close(found[others], alone.state_dict()["objective.logits"], rtol=1e-12, atol=0)
        assert found[1] == 0


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_resume_between_two_updates_compares_with_the_last_one(cut: int) -> None:
    losses = rows(8)
    whole = famo(reevaluate="next_batch")
    for row in losses[:cut]:
        update(whole, row)
    resumed = famo(reevaluate="next_batch")
    resumed.load_state_dict(whole.state_dict())
    for row in losses[cut:]:
        assert torch.equal(update(whole, row), update(resumed, row))


def test_another_run_s_last_losses_are_no_start_of_this_one() -> None:
    source, target = famo(reevaluate="next_batch"), famo(reevaluate="next_batch")
    losses = rows(6)
    for row in losses[:4]:
        update(source, row)
    target.start_from(source.state_dict())
    learned = source.state_dict()["objective.logits"]
    update(target, losses[4])
    assert torch.equal(target.state_dict()["objective.logits"], learned)
    update(target, losses[5])
    assert not torch.equal(target.state_dict()["objective.logits"], learned)


@pytest.mark.parametrize("phase", ["warmup", "frozen"])
@pytest.mark.parametrize("reevaluate", ["same_batch", "next_batch"])
def test_outside_of_balancing_nothing_moves_and_nothing_is_asked_for(phase: str, reevaluate: str) -> None:
    balancer = famo(reevaluate=reevaluate)
    for row in rows(3):
        update(balancer, row, row * 0.9)
    moved = balancer.state_dict()
    balancer.phase = phase  # type: ignore[assignment]
    for row in rows(3, seed=2):
        coefficients = update(balancer, row)
    state = balancer.state_dict()
    kept = [key for key in moved if key.startswith(("objective.", "optimizer.", "progress."))]
    assert all(torch.equal(moved[key], state[key]) for key in kept)
    assert torch.equal(coefficients, torch.ones(3, dtype=torch.float64)) == (phase == "warmup")


@pytest.mark.parametrize("bad", [float("nan"), 0.0])
def test_a_refused_batch_leaves_no_trace(bad: float) -> None:
    balancer = famo(reevaluate="next_batch")
    losses = rows(4)
    for row in losses[:3]:
        update(balancer, row)
    before = balancer.state_dict()
    wrong = losses[3].clone()
    wrong[1] = bad
    with pytest.raises(NonFiniteLossError):
        balancer.backward(wrong.requires_grad_())
    after = balancer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_loss_at_its_bound_is_named_with_what_to_set() -> None:
    balancer = build_balancer(
        "famo", task_names=["seg", "depth"], min_losses=[0.1, 0.25], dtype=torch.float64, reevaluate="next_batch"
    )
    update(balancer, torch.tensor([0.2, 0.3], dtype=torch.float64))
    with pytest.raises(NonFiniteLossError) as raised:
        balancer.backward(torch.tensor([0.11, 0.25], dtype=torch.float64, requires_grad=True))
    assert str(raised.value) == (
        "the loss of task 'depth' is 0.25, but balancer 'famo' takes the logarithm of its distance to min_losses "
        "(0.25); set balancer.min_losses to a bound below every loss of the task"
    )


def test_a_loss_that_the_step_brings_to_its_bound_is_named_too() -> None:
    balancer = build_balancer("famo", task_names=["seg", "depth"], min_losses=[0.1, 0.25], dtype=torch.float64)
    balancer.backward(torch.tensor([0.2, 0.3], dtype=torch.float64, requires_grad=True))
    with pytest.raises(NonFiniteLossError) as raised:
        balancer.step(reevaluate=lambda: torch.tensor([0.2, 0.2], dtype=torch.float64))
    assert str(raised.value) == (
        "the loss of task 'depth' is 0.2 after the model's step, but balancer 'famo' takes the logarithm of its "
        "distance to min_losses (0.25); set balancer.min_losses to a bound below every loss of the task"
    )


def test_losses_that_are_not_finite_after_the_step_teach_nothing() -> None:
    # The next update's own losses will say so, as `nonfinite_loss` has it.
    balancer = famo()
    update(balancer, rows(1)[0], rows(1, seed=1)[0])
    before = balancer.state_dict()
    balancer.backward(rows(1)[0].clone().requires_grad_())
    balancer.step(reevaluate=lambda: torch.tensor([1.0, torch.nan, 2.0], dtype=torch.float64))
    after = balancer.state_dict()
    kept = [key for key in before if key.startswith(("objective.", "optimizer."))]
    assert all(torch.equal(before[key], after[key]) for key in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -1.0}, r"balancer\.weight_decay: -1\.0 is not valid, expected a number >= 0"),
        ({"min_losses": [0.1]}, r"balancer\.min_losses: got 1 values, expected one for each of the 3 tasks"),
        ({"normalization": "log"}, r"balancer\.normalization: 'log' is not valid, .* famo takes the logarithm itself"),
        (
            {"normalization": "initial", "min_losses": 0.1},
            r"balancer\.min_losses: 0\.1 is not valid with normalization",
        ),
        (
            {"reevaluate": "next"},
            r"balancer\.reevaluate: 'next' is not valid, expected one of \"same_batch\", \"next_b",
        ),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build_balancer("famo", 3, **options)


def test_the_same_batch_must_be_run_again() -> None:
    balancer = famo()
    balancer.backward(rows(1)[0].requires_grad_())
    with pytest.raises(OptionError, match=r"^reevaluate: 'same_batch' needs balancer\.step\(reevaluate=lambda"):
        balancer.step()


def test_the_second_run_leaves_a_bound_model_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).double()
    inputs = rows(4, 2)
    balancer = famo().bind(model)
    balancer.backward(model(inputs).square().mean(0))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    balancer.step(reevaluate=lambda: model(inputs * 2).square().mean(0))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_the_second_run_has_no_gradients() -> None:
    balancer, seen = famo(), []
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    balancer.backward(rows(1)[0] * weight)

    def again() -> Tensor:
        losses = rows(1, seed=1)[0] * weight
        seen.append(losses.requires_grad)
        return losses

    balancer.step(reevaluate=again)
    assert seen == [False]

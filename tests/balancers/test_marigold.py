"""MARIGOLD: the estimator against finite differences, trial steps that leave no trace, the general upper level."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.errors import NonFiniteLossError, OptionError
from hf_bilb.losses.contract import TaskLosses
from tests.balancers.reference import ProblemR, load

FLOAT = torch.float64
R = 0.2


# --- the estimator --------------------------------------------------------------------------------------------------


def problem(num_tasks: int) -> ProblemR:
    return ProblemR(load({2: "marigold_exact_K2_adam_a", 3: "marigold_exact_K3_adam_b"}[num_tasks]))


def optimizer_for(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """Adam in mid-run: its state counts in what a step does."""
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for t in range(3):
        optimizer.zero_grad()
        model(t).sum().backward()
        optimizer.step()
    return optimizer


def after_a_step(model: ProblemR, optimizer: torch.optim.Optimizer, weights: Tensor) -> Tensor:
    """f(A(weights, theta)) on batch 4, by copies of model and optimizer: nothing of ours."""
    twin = copy.deepcopy(model)
    own = type(optimizer)(twin.parameters(), lr=optimizer.param_groups[0]["lr"])
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    own.zero_grad()
    (weights * twin(4)).sum().backward()
    own.step()
    return twin(4).detach()


def circle(points: int) -> Tensor:
    """Equally spaced directions `[n, 2]`."""
    angles = torch.arange(points, dtype=FLOAT) * 2 * math.pi / points
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def smoothed_gradient(value: Callable[[Tensor], float], center: Tensor, radius: float) -> Tensor:
    """Central differences of the mean of `value` over a disk: Gauss-Legendre in radius, trapezoidal in angle."""
    nodes, node_weights = np.polynomial.legendre.leggauss(6)
    radii, radial = (nodes + 1) / 2, node_weights / 2
    directions = circle(24)

    def smoothed(at: Tensor) -> float:
        total = 0.0
        for r, w in zip(radii, radial, strict=True):
            mean = sum(value(at + radius * float(r) * direction) for direction in directions) / len(directions)
            total += 2 * float(r) * float(w) * mean  # the density of the radius in a disk
        return total

    width = 1e-5
    return torch.tensor(
        [(smoothed(center + width * e) - smoothed(center - width * e)) / (2 * width) for e in torch.eye(2, dtype=FLOAT)]
    )


def estimates(model: ProblemR, optimizer: torch.optim.Optimizer, directions: Tensor, **options: Any) -> Tensor:
    """g_lambda `[n, m]` of a balancer for each direction: where u is lambda, plain descent at rate 1 moves it by -g."""
    num_tasks = directions.shape[1]
    balancer = build_balancer(
        "marigold",
        num_tasks,
        dtype=FLOAT,
        mode="exact",
        parametrization="identity",
        perturbation=R,
        optimizer="sgd",
        learning_rate=1.0,
        initial=[0.6, 0.4] if num_tasks == 2 else [0.5, 0.3, 0.2],
        **options,
    ).bind(model, optimizer)
    start = balancer.state_dict()
    found = []
    for direction in directions:
        with mock.patch.object(balancer.objective.draws, "forward", lambda like, direction=direction: direction):
            balancer.look_ahead(lambda: model(4))
        found.append(start["objective.logits"] - balancer.state_dict()["objective.logits"])
        balancer.discard()
        assert torch.equal(balancer.state_dict()["objective.logits"], start["objective.logits"])
    return torch.stack(found)


@pytest.mark.parametrize("estimator", ["one_point", "one_point_baseline", "two_point"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.slow
def test_the_mean_of_the_estimator_is_the_gradient_of_the_smoothed_objective(kind: str, estimator: str) -> None:
    model = problem(2)
    optimizer = optimizer_for(model, kind)
    mean = estimates(model, optimizer, circle(48), estimator=estimator).mean(dim=0)

    def upper(weights: Tensor) -> float:
        return float(after_a_step(model, optimizer, weights).mean())  # rho is 1/2 each at v = 0

    expected = smoothed_gradient(upper, torch.tensor([0.6, 0.4], dtype=FLOAT), R)
    assert (mean - expected).norm() <= 1e-5 * expected.norm(), (mean, expected)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.slow
def test_the_mean_over_random_directions_comes_near_it(kind: str) -> None:
    # Three tasks, the method's own draws; the two-point form has the least spread.
    model = problem(3)
    optimizer = optimizer_for(model, kind)
    drawn = torch.randn(300, 3, dtype=FLOAT, generator=torch.Generator().manual_seed(0))
    directions = drawn / drawn.norm(dim=1, keepdim=True)
    center = torch.tensor([0.5, 0.3, 0.2], dtype=FLOAT)
    found = {kind: estimates(model, optimizer, directions, estimator=kind) for kind in ("one_point", "two_point")}

    def upper(weights: Tensor) -> float:
        return float(after_a_step(model, optimizer, weights).mean())

    width = 1e-4
    exact = torch.tensor(
        [(upper(center + width * e) - upper(center - width * e)) / (2 * width) for e in torch.eye(3, dtype=FLOAT)]
    )
    for values in found.values():
        error = values.mean(dim=0) - exact
        spread = values.std(dim=0) / math.sqrt(len(values))
        # The smoothing itself moves the gradient a little.
        assert (error.abs() <= 4.5 * spread + 0.05 * exact.norm()).all(), (error, spread)
    assert found["two_point"].var() < 0.2 * found["one_point"].var()


def test_a_baseline_takes_spread_away_and_nothing_else() -> None:
    model = problem(2)
    optimizer = optimizer_for(model, "adam")
    directions = circle(16)
    plain, baseline = (
        estimates(model, optimizer, directions, estimator=name) for name in ("one_point", "one_point_baseline")
    )
    at_theta = model(4).mean().detach()
    torch.testing.assert_close(plain - baseline, 2 / R * at_theta * directions, rtol=1e-9, atol=1e-9)
    assert baseline.square().sum() < 0.05 * plain.square().sum()


@pytest.mark.parametrize("estimator", ["one_point", "two_point"])
def test_the_worst_decrement_ascends_what_the_trials_did(estimator: str) -> None:
    # By hand on copies: rho is 1/3 each at v = 0; of two opposite trials the mean counts.
    model, r = problem(3), 0.3
    optimizer = optimizer_for(model, "adam")
    balancer = build_balancer("marigold", 3, dtype=FLOAT, mode="exact", estimator=estimator, perturbation=r, beta=0.5)
    balancer.bind(model, optimizer).look_ahead(lambda: model(4))
    state, at_theta = balancer.state_dict(), model(4).detach()
    weights = torch.softmax(0.5 / at_theta, dim=0)
    signs = (1, -1) if estimator == "two_point" else (1,)
    after = [after_a_step(model, optimizer, weights + sign * r * state["objective.direction"]) for sign in signs]
    decrements = torch.stack(after).mean(dim=0) - at_theta
    slope = 0.5 / at_theta / 3 * (decrements - decrements.mean())
    torch.testing.assert_close(state["optimizer.worst_logits.exp_avg"], -0.1 * slope, rtol=1e-9, atol=1e-14)


# --- trial steps leave no trace -----------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout, batch normalisation with its buffers, and a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3)).double()
        self.heads = nn.Linear(8, 2).double()
        self.unused = nn.Parameter(torch.ones(3, dtype=FLOAT))
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=FLOAT) * 0.3)

    def forward(self, batch: int) -> Tensor:
        inputs = torch.randn(12, 4, dtype=FLOAT, generator=torch.Generator().manual_seed(batch))
        return (self.heads(self.trunk(inputs)) - 1).square().mean(dim=0)


class CountsInItsGroup(torch.optim.SGD):
    """Descends ever more slowly, and remembers how far it has come in its group, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.1 / group["count"]
        super().step(closure)


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw one by one": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "counts in its group": lambda p: CountsInItsGroup(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: Adafactor(p, lr=None, relative_step=True, warmup_init=True),
}


def look_ahead_balancer(**options: Any) -> LossBalancer:
    return build_balancer("marigold", 2, dtype=FLOAT, mode="exact", **options)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
        "training": [module.training for module in model.modules()],
    }


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    else:
        assert one == other, where


@pytest.mark.parametrize("estimator", ["one_point", "two_point"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_look_ahead_leaves_everything_as_it_was(kind: str, estimator: str) -> None:
    torch.manual_seed(0)
    model = Noisy()
    optimizer = OPTIMIZERS[kind](model.parameters())
    balancer = look_ahead_balancer(estimator=estimator, learning_rate=0.1).bind(model, optimizer)
    for t in range(4):
        before, learned = everything(model, optimizer), balancer.state_dict()["objective.worst_logits"]
        balancer.look_ahead(lambda t=t: model(t), before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        assert_equal(before, everything(model, optimizer), kind)
        assert not torch.equal(balancer.state_dict()["objective.worst_logits"], learned)
        optimizer.zero_grad()
        balancer.backward(model(t))
        optimizer.step()
        balancer.step()
    # A step later: what the trial has allocated, and taken away again, is not missed.
    assert model.trunk[1].num_batches_tracked == 4


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_looked_at_is_the_step_itself(kind: str) -> None:
    """The losses after the trial are those of copies that really take the clipped step, with the same dropout masks."""
    torch.manual_seed(0)
    model = Noisy()
    optimizer = OPTIMIZERS[kind](model.parameters())
    balancer = look_ahead_balancer(perturbation=0.3, learning_rate=0.1).bind(model, optimizer)
    for t in range(3):
        twin, own = copy.deepcopy((model, optimizer))
        seen = []
        random = torch.get_rng_state()

        def run(t: int = t, seen: list[Tensor] = seen) -> Tensor:
            losses = model(t)
            seen.append(losses.detach().clone())
            return losses

        weights = balancer.objective._weights(twin(t).detach(), torch.ones(2, dtype=torch.bool)).detach()
        torch.set_rng_state(random)
        twin, own = copy.deepcopy((model, optimizer))
        balancer.look_ahead(run, before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        direction = balancer.state_dict()["objective.direction"]
        assert torch.equal(torch.get_rng_state(), random)
        own.zero_grad()
        losses = twin(t)
        assert torch.equal(losses, seen[0])
        ((weights + 0.3 * direction) * losses).sum().backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        own.step()
        torch.set_rng_state(random)
        torch.testing.assert_close(twin(t), seen[1], rtol=1e-12, atol=0)
        assert not torch.allclose(seen[0], seen[1], rtol=1e-9)
        torch.set_rng_state(random)
        optimizer.zero_grad()
        balancer.backward(model(t))
        optimizer.step()
        balancer.step()


def test_several_micro_batches_are_one_batch() -> None:
    model = ProblemR(load("marigold_exact_K3_adam_b"))
    optimizer = optimizer_for(model, "adam")

    def part(rows: slice) -> TaskLosses:
        inputs, labels = (torch.from_numpy(model.case[key][4][rows]) for key in ("X", "Y"))
        w1, b1, v, c = model.weights
        errors = (torch.tanh(inputs @ w1 + b1) @ v + c - labels).square()
        losses = torch.from_numpy(model.case["s"]) * errors.mean(0) + 0.05
        penalty = 3 * sum(weight.square().sum() for weight in model.weights)
        return TaskLosses(losses, torch.full((3,), float(len(inputs)), dtype=FLOAT), auxiliary_loss=penalty)

    found = []
    for parts in ([slice(0, 16)], [slice(0, 5), slice(5, 16)]):
        balancer = build_balancer("marigold", 3, dtype=FLOAT, mode="exact", perturbation=0.1, learning_rate=0.1)
        balancer.bind(model, optimizer).look_ahead([lambda rows=rows: part(rows) for rows in parts])
        found.append(
            torch.cat([balancer.state_dict()[f"optimizer.{name}.exp_avg"] for name in ("logits", "worst_logits")])
        )
    assert found[0].abs().max() > 0.01
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=0)


def test_a_scaled_backward_pass_changes_nothing() -> None:
    found = []
    for scale in (1.0, 65536.0):
        model = problem(2)
        balancer = look_ahead_balancer(learning_rate=0.1).bind(model, optimizer_for(model, "adam"))
        balancer.look_ahead(lambda model=model: model(4), loss_scale=scale)
        found.append(balancer.state_dict()["optimizer.logits.exp_avg"])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_auxiliary_losses_take_part_in_the_trial_step() -> None:
    moments = []
    for share in (0.0, 3.0):
        model = problem(2)
        balancer = look_ahead_balancer(learning_rate=0.1).bind(model, optimizer_for(model, "sgd"))

        def run(model: ProblemR = model, share: float = share) -> TaskLosses:
            penalty = share * sum(p.square().sum() for p in model.parameters())
            return TaskLosses(model(4), torch.ones(2, dtype=FLOAT), auxiliary_loss=penalty)

        balancer.look_ahead(run)
        moments.append(balancer.state_dict()["optimizer.logits.exp_avg"])
    assert not torch.allclose(*moments, rtol=1e-3)


def test_a_reference_over_several_updates_counts_each_once() -> None:
    model = problem(2)
    optimizer = optimizer_for(model, "sgd")
    balancer = look_ahead_balancer(normalization="initial", reference={"mean_of": 3}, learning_rate=0.1)
    balancer.bind(model, optimizer)
    seen = []
    for t in range(4):
        balancer.look_ahead(lambda t=t: model(t))
        optimizer.zero_grad()
        losses = model(t)
        seen.append(losses.detach())
        balancer.backward(losses)
        optimizer.step()
        balancer.step()
    torch.testing.assert_close(balancer.reference_losses, torch.stack(seen[:3]).mean(dim=0), rtol=1e-12, atol=0)


def test_a_dropped_update_takes_back_what_its_look_ahead_taught() -> None:
    model = problem(2)
    optimizer = optimizer_for(model, "adam")
    balancer = look_ahead_balancer(learning_rate=0.1).bind(model, optimizer)
    before = balancer.state_dict()
    balancer.look_ahead(lambda: model(4))
    balancer.backward(model(4))
    assert not torch.equal(balancer.state_dict()["objective.logits"], before["objective.logits"])
    balancer.discard()
    after = balancer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(("objective.", "optimizer.")))


@pytest.mark.parametrize("phase", ["warmup", "frozen"])
@pytest.mark.parametrize("mode", ["exact", "commit", "lagged"])
def test_outside_of_balancing_nothing_is_tried_or_perturbed(mode: str, phase: str) -> None:
    model = problem(2)
    optimizer = optimizer_for(model, "adam")
    balancer = build_balancer("marigold", 2, dtype=FLOAT, mode=mode, perturbation=0.5, beta=0.3, learning_rate=0.1)
    balancer.bind(model, optimizer)

    def update(t: int) -> None:
        balancer.look_ahead(lambda: model(t))
        optimizer.zero_grad()
        balancer.backward(model(t))
        optimizer.step()
        balancer.step(reevaluate=lambda: model(t))

    for t in range(3):
        update(t)
    moved = balancer.state_dict()
    balancer.phase = phase  # type: ignore[assignment]
    update(3)
    state = balancer.state_dict()
    for key in ("objective.logits", "objective.worst_logits"):
        assert torch.equal(moved[key], state[key])
    if phase == "warmup":
        assert torch.equal(balancer.coefficients, torch.ones(2, dtype=FLOAT))
    else:
        assert torch.equal(balancer.coefficients, balancer.weights)


def test_two_seeds_draw_other_directions_and_one_draws_the_same() -> None:
    drawn = []
    for seed in (0, 0, 1):
        balancer = build_balancer("marigold", 4, dtype=FLOAT, seed=seed)
        rows = []
        for _ in range(3):
            balancer.backward(torch.ones(4, dtype=FLOAT, requires_grad=True))
            balancer.step(reevaluate=lambda: torch.ones(4, dtype=FLOAT))
            rows.append(balancer.state_dict()["objective.direction"])
        drawn.append(torch.stack(rows))
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2])
    torch.testing.assert_close(drawn[0].norm(dim=1), torch.ones(3, dtype=FLOAT))
    assert not torch.allclose(drawn[0][0], drawn[0][1])


@pytest.mark.slow
def test_directions_are_uniform_on_the_sphere_of_the_trained_tasks() -> None:
    balancer = build_balancer("marigold", task_names=["a", "b", "c", "d"], dtype=FLOAT, trainable_tasks=["a", "c"])
    drawn = []
    for _ in range(600):
        balancer.backward(torch.ones(4, dtype=FLOAT, requires_grad=True))
        drawn.append(balancer.state_dict()["objective.direction"])
        balancer.step(reevaluate=lambda: torch.ones(4, dtype=FLOAT))
    directions = torch.stack(drawn)
    assert not directions[:, [1, 3]].any()
    angles = torch.atan2(directions[:, 0], directions[:, 2])
    # Kolmogorov-Smirnov at the level of one in a thousand.
    ranks = (angles.sort().values / (2 * math.pi) + 0.5 - torch.arange(600, dtype=FLOAT) / 600).abs().max()
    assert ranks < 1.95 / math.sqrt(600)


# --- the general upper level --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "commit"])
def test_auxiliary_learning_of_one_weight(mode: str) -> None:
    """Equations 13-14: f_a + omega f_b below, f_a above; with one weight the direction is +1 or -1."""
    model, r = problem(2), 0.05
    optimizer = optimizer_for(model, "sgd")
    balancer = build_balancer(
        "marigold",
        task_names=["click", "distill"],
        dtype=FLOAT,
        mode=mode,
        parametrization="identity",
        trainable_tasks=["distill"],
        upper_level={"tasks": ["click"]},
        initial=0.4,
        perturbation=r,
        optimizer="sgd",
        learning_rate=0.01,
    ).bind(model, optimizer)
    omega, signs = 0.4, []
    for t in range(5):
        twin, own = copy.deepcopy((model, optimizer))
        balancer.look_ahead(lambda t=t: model(t))
        optimizer.zero_grad()
        balancer.backward(model(t))
        sign = float(balancer.state_dict()["objective.direction"][1])
        signs.append(sign)
        assert abs(sign) == 1.0
        # By hand, on copies.
        own.zero_grad()
        clicks, distill = twin(t)
        (clicks + (omega + r * sign) * distill).backward()
        own.step()
        omega_now, omega = omega, omega - 0.01 * float(twin(t)[0].detach()) / r * sign
        applied = omega if mode == "exact" else omega_now + r * sign
        torch.testing.assert_close(balancer.coefficients, torch.tensor([1.0, applied], dtype=FLOAT), rtol=1e-10, atol=0)
        optimizer.step()
        balancer.step(reevaluate=lambda t=t: model(t))
        assert float(balancer.state_dict()["objective.logits"][1]) == pytest.approx(omega, rel=1e-10)
        assert "objective.worst_logits" not in balancer.state_dict()
    assert set(signs) == {1.0, -1.0}


def test_a_function_of_ones_own_need_not_be_differentiable(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\n\ndef worst(losses, known):\n    return (losses.where(known, 0.0) > 0.5).sum().float()\n",
        "utf-8",
    )

    def worst(losses: Tensor, known: Tensor) -> Tensor:
        return (losses.where(known, torch.zeros(())) > 0.5).sum().float()

    found = []
    for upper_level in (worst, f"{file}:worst"):
        model = problem(3)
        optimizer = optimizer_for(model, "sgd")
        options: dict[str, Any] = {"mode": "commit", "parametrization": "softmax", "beta": 1.0, "learning_rate": 0.1}
        balancer = build_balancer("marigold", 3, dtype=FLOAT, upper_level=upper_level, **options)
        balancer.bind(model, optimizer)
        balancer.backward(model(4))
        optimizer.step()
        after = model(4).detach()
        balancer.step(reevaluate=lambda model=model: model(4))
        state = balancer.state_dict()
        weights = torch.full((3,), 1 / 3, dtype=FLOAT)
        slope = 3 / 1e-3 * float((after > 0.5).sum()) * state["objective.direction"]
        expected = 0.1 * weights * (slope - (weights * slope).sum())  # Adam's first moment is a tenth
        torch.testing.assert_close(state["optimizer.logits.exp_avg"], expected, rtol=1e-10, atol=1e-12)
        found.append(state["objective.logits"])
    assert torch.equal(*found)


@pytest.mark.parametrize("tasks", [["a"], ["a", "b"]])
def test_an_upper_task_that_is_absent_teaches_nothing(tasks: list[str]) -> None:
    balancer = build_balancer(
        "marigold", task_names=["a", "b", "c"], dtype=FLOAT, upper_level={"tasks": tasks}, absent_tasks="skip"
    )
    items = torch.tensor([0.0, 1.0, 1.0])
    losses = torch.tensor([torch.nan, 2.0, 3.0], dtype=FLOAT)
    balancer.backward(losses.clone().requires_grad_(), num_items=items)
    balancer.step(reevaluate=lambda: TaskLosses(losses, items))
    assert not balancer.state_dict()["optimizer.logits.exp_avg"].any()


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "lag"}, r"balancer\.mode: 'lag' is not valid, expected one of \"exact\", \"commit\", \"lagged\""),
        ({"estimator": "two_point"}, r"balancer\.estimator: 'two_point' is not valid with mode: 'commit'.*mode: exact"),
        ({"perturbation": 0.0}, r"balancer\.perturbation: 0\.0 is not valid, expected a number > 0"),
        ({"beta": -1.0}, r"balancer\.beta: -1\.0 is not valid, expected a number > 0"),
        ({"trainable_tasks": ["clik"]}, r"balancer\.trainable_tasks: 'clik' is no task \(did you mean \"click\"\?\)"),
        ({"trainable_tasks": []}, r"balancer\.trainable_tasks: is empty"),
        ({"upper_level": {"tasks": ["buy"]}}, r"balancer\.upper_level\.tasks: 'buy' is no task.*click, conv, view"),
        ({"upper_level": {"tasks": []}}, r"balancer\.upper_level\.tasks: is empty"),
        ({"upper_level": "worst"}, r"balancer\.upper_level: 'worst' is not valid, expected path/to/file\.py:function"),
        ({"upper_level": "nowhere.py:f"}, r"balancer\.upper_level: there is no file 'nowhere\.py'"),
        ({"parametrization": "positive", "initial": 0.0}, r"balancer\.initial: 0\.0 is not valid with parametrization"),
        ({"normalization": "log"}, r"balancer\.normalization: 'log' is not valid, .* marigold divides by the losses"),
        ({"initial": [1.0, 2.0]}, r"balancer\.initial: got 2 values, expected one for each of the 3 tasks"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        build_balancer("marigold", task_names=["click", "conv", "view"], **options)


def test_what_a_mode_needs_is_said() -> None:
    losses = torch.ones(2, requires_grad=True)
    exact = build_balancer("marigold", 2, mode="exact")
    with pytest.raises(OptionError, match=r"^mode: 'exact' needs balancer\.bind\(model, optimizer\)"):
        exact.look_ahead(lambda: losses)
    with pytest.raises(
        OptionError, match=r"^mode: 'exact' needs balancer\.look_ahead\(lambda: model\(batch\)\) before"
    ):
        exact.backward(losses)
    commit = build_balancer("marigold", 2)
    commit.backward(losses)
    with pytest.raises(
        OptionError, match=r"^mode: 'commit' needs balancer\.step\(reevaluate=.*mode: 'lagged' does not"
    ):
        commit.step()
    wrong = build_balancer("marigold", 2, upper_level=lambda losses, known: losses)
    wrong.backward(losses)
    with pytest.raises(
        OptionError, match=r"^upper_level: the function returned tensor\(.*expected a tensor with one n"
    ):
        wrong.step(reevaluate=lambda: losses)


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0])
def test_losses_that_cannot_be_taken_are_refused_and_leave_no_trace(bad: float) -> None:
    model = problem(2)
    optimizer = optimizer_for(model, "adam")
    balancer = look_ahead_balancer().bind(model, optimizer)
    before = balancer.state_dict()
    factor = torch.tensor([1.0, bad], dtype=FLOAT)
    balancer.look_ahead(lambda: model(4) * factor)
    with pytest.raises(
        NonFiniteLossError, match="task_1" if math.isnan(bad) else "divides by the losses: losses must be"
    ):
        balancer.backward(model(4) * factor)
    after = balancer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_error_in_a_look_ahead_leaves_no_trace() -> None:
    model = problem(2)
    optimizer = optimizer_for(model, "adam")
    balancer = look_ahead_balancer(normalization="initial", learning_rate=0.1).bind(model, optimizer)
    before, everything_before = balancer.state_dict(), everything(model, optimizer)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        balancer.look_ahead(lambda: model(4), before_step=stop)
    after = balancer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert_equal(everything_before, everything(model, optimizer))


def test_a_trial_that_ends_in_infinity_teaches_nothing() -> None:
    model = problem(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e200)
    balancer = look_ahead_balancer(learning_rate=0.1).bind(model, optimizer)
    before, parameters = balancer.state_dict(), [p.clone() for p in model.parameters()]
    balancer.look_ahead(lambda: model(4))
    after = balancer.state_dict()
    assert torch.equal(before["objective.logits"], after["objective.logits"])
    assert not after["optimizer.logits.exp_avg"].any()
    assert all(torch.equal(one, other) for one, other in zip(parameters, model.parameters(), strict=True))

"""What the methods remember, draw and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb.balancers.registry import GRADIENT_METHODS, get_balancer_spec, resolve_options
from hf_bilb.engine.gradient_method import GramianMethod, JacobianMethod
from hf_bilb.errors import OptionError
from tests.balancers.gradient.reference import GRAMIAN, JACOBIAN, build, error, gradients

STATEFUL = {
    "gradvac": {}, "moco": {}, "modo": {"gamma": 0.05}, "sdmgrad": {"step_size": 0.1}, "gradnorm": {}, "pcgrad": {},
    "graddrop": {},
}  # fmt: skip
DRAWING = ["pcgrad", "graddrop", "gradvac"]


def run(method: Any, jacobian: Tensor, tasks: list[int] | None = None, losses: Tensor | None = None) -> Tensor:
    """The direction; with samples, the same for all three."""
    index = torch.arange(len(jacobian)) if tasks is None else torch.tensor(tasks)
    losses = torch.linspace(0.5, 2, len(jacobian), dtype=torch.float64) if losses is None else losses
    if isinstance(method, JacobianMethod):
        return method.direction(jacobian, losses, index).gradient
    return method.weights(jacobian @ jacobian.T, losses, index) @ jacobian


def made(name: str, num_tasks: int, size: int, **options: Any) -> Any:
    method = build(name, num_tasks, **options)
    if isinstance(method, JacobianMethod):
        method.allocate(size)
    return method


def state_of(method: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in method.state_dict().items()}


def test_every_method_of_the_list_is_there_and_of_its_kind() -> None:
    assert sorted([*GRAMIAN, *JACOBIAN]) == sorted(GRADIENT_METHODS)
    for name in GRADIENT_METHODS:
        spec = get_balancer_spec(name)
        assert issubclass(spec.objective, GramianMethod if name in GRAMIAN else JacobianMethod)
        assert [(cost.forwards, cost.backwards) for cost in spec.costs] == [(1, "K")]
        assert spec.objective.samples == (3 if name in ("modo", "sdmgrad") else 1)
        own = resolve_options(name, {})
        assert own.heads == ("weights" if name in ("mgda", "imtl_g", "nash_mtl", "gradnorm") else "sum")


@pytest.mark.parametrize("name", STATEFUL)
def test_frozen_it_remembers_nothing_and_gives_the_same_again(name: str) -> None:
    method = made(name, 3, 9, **STATEFUL[name])
    before = state_of(method.eval())
    run(method, gradients(3, 9))
    assert all(torch.equal(value, before[key]) for key, value in state_of(method).items())
    run(method.train(), gradients(3, 9))
    method.eval()
    before = state_of(method)
    first = run(method, gradients(3, 9, 1))
    assert torch.equal(run(method, gradients(3, 9, 1)), first)
    for key, value in state_of(method).items():
        assert torch.equal(value, before[key]), key
    method.train()
    # A frozen step gives what the same step would give balancing.
    torch.testing.assert_close(run(method, gradients(3, 9, 1)), first, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", STATEFUL)
def test_restored_it_goes_on_as_before(name: str) -> None:
    def steps(method: Any, numbers: range) -> list[Tensor]:
        found = []
        for number in numbers:
            found.append(run(method, gradients(3, 9, number)))
            if hasattr(method, "end_step"):
                method.end_step()
        return found

    method = made(name, 3, 9, **STATEFUL[name])
    steps(method, range(3))
    other = made(name, 3, 9, **STATEFUL[name])
    other.load_state_dict(state_of(method))
    for first, second in zip(steps(method, range(3, 6)), steps(other, range(3, 6)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", STATEFUL)
def test_its_state_may_be_of_single_precision(name: str) -> None:
    double, single = made(name, 3, 9, **STATEFUL[name]), build(name, 3, **STATEFUL[name]).float()
    if isinstance(single, JacobianMethod):
        single.allocate(9)
    for number in range(3):
        found, expected = run(single, gradients(3, 9, number)), run(double, gradients(3, 9, number))
        assert error(found, expected) < 1e-4
    kinds = {value.dtype for key, value in single.state_dict().items() if not key.endswith("_extra_state")}
    assert kinds <= {torch.float32, torch.bool}


@pytest.mark.parametrize("name", [*GRAMIAN, "graddrop", "moco"])
def test_absent_tasks_are_as_if_they_were_not(name: str) -> None:
    # In the first step, before anything is remembered; the draws of pcgrad's order belong to the tasks.
    options = {"order": "identity"} if name == "pcgrad" else {}
    jacobian = gradients(4, 9)[[0, 2, 3]]
    found = run(made(name, 4, 9, **options), jacobian, [0, 2, 3])
    expected = run(made(name, 3, 9, **options), jacobian)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_state_of_absent_tasks_stays() -> None:
    rows = [0, 2]
    for name in ("gradvac", "moco", "modo", "sdmgrad", "gradnorm"):
        method = made(name, 4, 9, **STATEFUL[name])
        run(method, gradients(4, 9))
        before = state_of(method)
        run(method, gradients(4, 9, 1)[rows], rows, torch.tensor([5.0, 7.0], dtype=torch.float64))
        for key, value in state_of(method).items():
            if value.shape[:1] != (4,):
                continue
            outside = [1, 3]
            assert torch.equal(value[outside], before[key][outside]), (name, key)
            if key == "targets":
                assert torch.equal(value[:, outside], before[key][:, outside])
        changed = {"gradnorm": "initial_losses", "gradvac": "targets", "moco": "averages"}.get(name, "shares")
        same = torch.equal(method.state_dict()[changed], before[changed])
        assert same == (name == "gradnorm")  # the first losses are the first
        if hasattr(method, "shares"):
            torch.testing.assert_close(method.shares.sum(), torch.ones((), dtype=torch.float64))


def test_shares_that_are_all_with_absent_tasks_are_equal_for_the_others() -> None:
    method = build("modo", 3, gamma=0.0)
    method.shares.copy_(torch.tensor([0.0, 0.0, 1.0]))
    weights = method.weights(torch.eye(2, dtype=torch.float64), torch.ones(2), torch.tensor([0, 1]))
    assert weights.tolist() == [0.5, 0.5] and method.shares.tolist() == [0, 0, 1]


# ---------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("name", DRAWING)
def test_draws_are_a_function_of_seed_and_update(name: str) -> None:
    options = {"order": "random"} if name != "graddrop" else {}
    jacobian = gradients(6, 40, spread=0.0) - 2 * gradients(6, 40, spread=0.0).mean(dim=0)

    def directions(seed: int) -> list[Tensor]:
        method = build(name, 6, seed=seed, **options)
        found = []
        for _ in range(4):
            method.eval()
            found.append(run(method, jacobian))
            assert torch.equal(run(method, jacobian), found[-1])  # until the update has ended
            method.end_step()
        return found

    torch.manual_seed(1)
    first = directions(0)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(2)
    assert all(torch.equal(one, two) for one, two in zip(first, directions(0), strict=True))
    for others in (first[1:], directions(1)):
        assert not any(torch.equal(one, two) for one, two in zip(first, others, strict=False))


def test_an_absent_task_leaves_the_order_of_the_others() -> None:
    orders = build("pcgrad", 5).orders
    whole = orders(torch.eye(5, dtype=torch.float64), torch.arange(5))
    assert (whole.sort(dim=1).values == torch.arange(5)).all()
    assert len({tuple(row) for row in whole.tolist()}) > 1
    part = orders(torch.eye(3, dtype=torch.float64), torch.tensor([0, 2, 4]))
    for row, task in zip(part, [0, 2, 4], strict=True):
        assert [[0, 2, 4][k] for k in row.tolist()] == [k for k in whole[task].tolist() if k in (0, 2, 4)]


def test_graddrop_keeps_a_sign_with_its_share() -> None:
    jacobian = torch.tensor([[3.0], [-1.0], [1.0]], dtype=torch.float64).expand(3, 4000)
    method = build("graddrop", 3)
    found = run(method, jacobian)
    assert set(found.tolist()) == {4.0, -1.0}
    assert abs((found == 4).double().mean() - 0.8) < 0.025  # four standard errors
    torch.testing.assert_close(run(build("graddrop", 3, leak=1.0), jacobian), jacobian.sum(dim=0))
    other = run(build("graddrop", 3, seed=1), jacobian)
    agree = ((found == 4) == (other == 4)).double().mean()
    assert abs(agree - 0.68) < 0.03


# ---------------------------------------------------------------------------------------------- single methods


def test_gradnorm_raises_the_weight_of_the_task_that_has_fallen_behind() -> None:
    for parametrization in ("softmax", "direct"):
        method = build("gradnorm", 3, parametrization=parametrization)
        gramian, tasks = torch.eye(3, dtype=torch.float64), torch.arange(3)
        method.weights(gramian, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), tasks)
        losses = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)  # the first has not fallen
        optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
        method.parameter_loss(gramian, losses, tasks).backward()
        optimizer.step()
        method.end_step()
        weights = method.weights(gramian, losses, tasks)
        assert weights[0] > 1 > weights[1] and abs(weights[1] - weights[2]) < 1e-12
        torch.testing.assert_close(weights.sum(), torch.tensor(3.0, dtype=torch.float64))


def test_gradnorm_s_own_weights_stay_above_zero() -> None:
    method = build("gradnorm", 2, parametrization="direct")
    with torch.no_grad():
        method.scores.copy_(torch.tensor([-1.0, 1.0]))
    method.eval()
    method.end_step()
    assert method.scores.tolist() == [-1, 1]
    method.train()
    method.end_step()
    assert (method.scores > 0).all() and abs(method.scores.sum().item() - 2) < 1e-12


def test_cagrad_s_rescaling_is_a_factor() -> None:
    jacobian = gradients(3, 9)
    plain = run(build("cagrad", 3, c=0.5, rescale=0), jacobian)
    assert error(run(build("cagrad", 3, c=0.5), jacobian), plain / 1.25) < 1e-14
    assert error(run(build("cagrad", 3, c=0.5, rescale=2), jacobian), plain / 1.5) < 1e-14


def test_moco_s_averages_are_a_part_of_the_state() -> None:
    method = build("moco", 2)
    with pytest.raises(RuntimeError, match="allocate"):
        run(method, gradients(2, 5))
    method.allocate(5)
    assert method.state_dict()["averages"].shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("graddrop", {"heads": "weights"}, "balancer.heads: 'weights' is not valid, expected 'sum'"),
        ("graddrop", {"every_n_steps": 2}, "balancer.every_n_steps: 2 is not valid, expected 1"),
        ("graddrop", {"leak": 1.5}, "balancer.leak: 1.5 is not valid"),
        ("moco", {"heads": "weights"}, "balancer.heads: 'weights' is not valid, expected 'sum'"),
        ("moco", {"every_n_steps": 5}, "balancer.every_n_steps: 5 is not valid, expected 1"),
        ("moco", {"gradients": "features"}, "balancer.gradients: 'features' is not valid, expected 'parameters'"),
        ("mgda", {"normalize": "loss", "normalization": "log"}, "balancer.normalization: 'log' is not valid"),
        ("gradnorm", {"normalization": "log"}, "balancer.normalization: 'log' is not valid"),
        ("mgda", {"normalize": "l1"}, 'balancer.normalize: \'l1\' is not valid, expected one of "none", "l2"'),
        ("cagrad", {"rescale": 3}, "balancer.rescale: 3 is not valid"),
        ("cagrad", {"c": -1.0}, "balancer.c: -1.0 is not valid"),
        ("fairgrad", {"alpha": 0.0}, "balancer.alpha: 0.0 is not valid"),
        ("sdmgrad", {"momentum": 1.0}, "balancer.momentum: 1.0 is not valid"),
        ("gradvac", {"beta": 2.0}, "balancer.beta: 2.0 is not valid"),
        ("upgrad", {"regularization": 0.0}, "balancer.regularization: 0.0 is not valid"),
    ],
)
def test_options_out_of_range_are_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        build(name, 3, **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)

"""Gradients that a method's formula has no answer for: what it gives is finite, and what its docstring says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb.engine.gradient_method import GramianMethod, JacobianMethod
from tests.balancers.gradient.reference import GRAMIAN, JACOBIAN, build, direction_of, error, gradients, weights_of

#: Every method, those with a choice that changes the formula more than once.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in (*GRAMIAN, *JACOBIAN)}
METHODS |= {
    "mgda l2": ("mgda", {"normalize": "l2"}),
    "mgda loss+": ("mgda", {"normalize": "loss+", "apply_to": "normalized"}),
    "fairgrad 0.1": ("fairgrad", {"alpha": 0.1}),
    "fairgrad 10": ("fairgrad", {"alpha": 10.0}),
    "cagrad 0": ("cagrad", {"c": 0.0}),
    "cagrad 2": ("cagrad", {"c": 2.0}),
    "aligned_mtl median": ("aligned_mtl", {"scale_mode": "median"}),
    "gradnorm direct": ("gradnorm", {"parametrization": "direct"}),
    "pcgrad identity": ("pcgrad", {"order": "identity"}),
    "gradvac random": ("gradvac", {"order": "random"}),
    "modo large step": ("modo", {"gamma": 1e3}),
}
methods = pytest.mark.parametrize("method", METHODS)
OF_GRAMIAN = [name for name, (method, _) in METHODS.items() if method in GRAMIAN]
#: w(s G) = s^x w(G); those that are not here have steps of their own and depend on the scale.
POWER_OF_SCALE = {
    **dict.fromkeys(
        ["mgda", "mgda l2", "imtl_g", "aligned_mtl", "aligned_mtl median", "upgrad", "cagrad", "cagrad 2"], 0.0
    ),
    **dict.fromkeys(["pcgrad", "gradvac", "sdmgrad"], 0.0),
    "nash_mtl": -1 / 2,
    "fairgrad": -1 / 2,
    "fairgrad 0.1": -1 / 11,
    "fairgrad 10": -10 / 11,
}


def made(method: str, num_tasks: int) -> Any:
    name, options = METHODS[method]
    return build(name, num_tasks, **options)


def jacobian_of(kind: str) -> Tensor:
    rows = gradients(3, 8)
    if kind == "one task":
        return rows[:1]
    if kind == "equal":
        rows[1] = rows[0]
    elif kind == "parallel":
        rows[1] = 3 * rows[0]
    elif kind == "zero row":
        rows[1] = 0
    elif kind == "opposite":
        return torch.stack([rows[0], -rows[0]])
    elif kind == "opposite and another":
        rows[1] = -rows[0]
    elif kind == "opposite, unequal":
        rows[1] = -0.3 * rows[0]
    elif kind == "all zero":
        rows[:] = 0
    elif kind == "more tasks than parameters":
        return gradients(40, 7)
    elif kind == "one parameter":
        return gradients(40, 1)
    elif kind == "far apart":
        rows = rows * torch.tensor([[1e-9], [1.0], [1e9]], dtype=torch.float64)
    elif kind == "nearly zero row":
        rows[1] *= 1e-30
    elif kind == "tiny":
        rows = rows * 1e-10
    elif kind == "huge":
        rows = rows * 1e10
    return rows


CASES = (
    "ordinary", "one task", "equal", "parallel", "zero row", "opposite", "opposite and another", "opposite, unequal",
    "all zero", "more tasks than parameters", "one parameter", "far apart", "nearly zero row", "tiny", "huge",
)  # fmt: skip


@methods
@pytest.mark.parametrize("kind", CASES)
def test_finite_for_several_steps(method: str, kind: str) -> None:
    jacobian = jacobian_of(kind)
    num_tasks = len(jacobian)
    objective, losses = made(method, num_tasks), torch.linspace(0.5, 2, num_tasks, dtype=torch.float64)
    tasks = torch.arange(num_tasks)
    if isinstance(objective, JacobianMethod):
        objective.allocate(jacobian.shape[1])
    for _ in range(3):
        if isinstance(objective, GramianMethod):
            weights = objective.weights(jacobian @ jacobian.T, losses, tasks)
            assert weights.shape == (num_tasks,) and weights.dtype == torch.float64 and not weights.requires_grad
            assert weights.isfinite().all()
            loss = objective.parameter_loss(jacobian @ jacobian.T, losses, tasks)
            if loss is not None:
                (slope,) = torch.autograd.grad(loss, list(objective.parameters()))
                assert slope.isfinite().all()
        else:
            assert objective.direction(jacobian, losses, tasks).gradient.isfinite().all()
        if hasattr(objective, "end_step"):
            objective.end_step()
    assert all(value.isfinite().all() for value in objective.state_dict().values())


@pytest.mark.parametrize("method", ["modo", "modo large step", "sdmgrad"])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_gramian_of_two_samples_may_be_anything(method: str, scale: float) -> None:
    for size in (1, 4, 40):
        generator = torch.Generator().manual_seed(size)
        first, second = torch.randn(2, size, 9, generator=generator, dtype=torch.float64)
        for cross in (first @ second.T, -(first @ first.T), torch.zeros(size, size, dtype=torch.float64)):
            objective = made(method, size)
            for _ in range(3):
                weights = objective.weights(scale * cross, torch.ones(size), torch.arange(size))
                assert weights.isfinite().all()
                torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
            assert (objective.shares >= 0).all()


def test_sdmgrad_does_not_see_the_scale_of_samples_that_disagree_either() -> None:
    for cross in (gradients(4, 9) @ gradients(4, 9, 1).T, -gradients(4, 9) @ gradients(4, 9).T):
        found = []
        for scale in (1e-20, 1.0, 1e20):
            objective = build("sdmgrad", 4, step_size=0.1)
            found.append(objective.weights(scale * cross, torch.ones(4), torch.arange(4)))
        assert max(error(one, found[1]) for one in found) < 1e-12
        assert (found[1] - found[1][0]).abs().max() > 1e-3


@pytest.mark.parametrize("method", POWER_OF_SCALE)
@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("num_tasks", [3, 40])
def test_the_scale_of_the_gradients_is_no_obstacle(method: str, scale: float, num_tasks: int) -> None:
    jacobian = gradients(num_tasks, 60, spread=0.5)
    gramian, tasks, losses = jacobian @ jacobian.T, torch.arange(num_tasks), torch.ones(num_tasks).double()
    expected = made(method, num_tasks).weights(gramian, losses, tasks) * scale ** POWER_OF_SCALE[method]
    found = made(method, num_tasks).weights(scale * gramian, losses, tasks)
    assert error(found, expected) < 1e-8


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_the_scale_of_the_gradients_is_none_to_graddrop(scale: float) -> None:
    jacobian = gradients(3, 60)
    found = direction_of(build("graddrop", 3), scale * jacobian)
    assert error(found, scale * direction_of(build("graddrop", 3), jacobian)) < 1e-12


@methods
def test_one_task_descends_its_own_gradient(method: str) -> None:
    # GradDrop keeps all of it; MoCo's first average is its normalised gradient, times beta.
    jacobian = gradients(1, 9)
    found = direction_of(made(method, 1), jacobian)
    cosine = found @ jacobian[0] / found.norm() / jacobian[0].norm()
    assert abs(cosine - 1) < 1e-12
    norm = float(jacobian.norm())
    length = {"nash_mtl": 1.0, "moco": 0.5, "cagrad": 1.4 / 1.16 * norm, "cagrad 2": 3 / 5 * norm}.get(method, norm)
    if not method.startswith(("fairgrad", "mgda loss+")):
        assert abs(float(found.norm()) / length - 1) < 1e-6


def test_a_zero_gradient_takes_no_part_and_its_head_learns_on() -> None:
    jacobian = jacobian_of("zero row")
    for method in ("nash_mtl", "fairgrad", "fairgrad 0.1", "imtl_g"):
        weights = weights_of(made(method, 3), jacobian)
        alone = weights_of(made(method, 2), jacobian[[0, 2]])
        factor = 3 / 2 if method.startswith("fairgrad") else 1  # the number of tasks in the step
        torch.testing.assert_close(weights[[0, 2]], factor * alone, rtol=1e-12, atol=0)
        torch.testing.assert_close(weights[1], weights[[0, 2]].mean(), rtol=1e-12, atol=0)


def test_a_zero_gradient_is_mgda_s_answer() -> None:
    weights = weights_of(build("mgda", 3), jacobian_of("zero row"))
    torch.testing.assert_close(weights, torch.tensor([0.0, 3, 0], dtype=torch.float64))


def test_mgda_does_not_see_the_unit_of_the_losses() -> None:
    jacobian, losses = gradients(4, 9), torch.linspace(0.5, 2, 4, dtype=torch.float64)
    for normalize in ("loss", "loss+"):
        method = build("mgda", 4, normalize=normalize)
        expected = weights_of(method, jacobian, losses)
        for unit in (1e-12, 1e12):
            assert error(weights_of(method, jacobian, unit * losses), expected) < 1e-9


def test_imtl_g_of_gradients_that_depend_on_each_other_is_the_pseudoinverse_of_their_cosines() -> None:
    for kind in ("opposite and another", "opposite, unequal", "parallel", "more tasks than parameters"):
        jacobian = jacobian_of(kind)
        units = jacobian / jacobian.norm(dim=1, keepdim=True)
        expected = torch.linalg.pinv(units @ units.T, hermitian=True).sum(dim=1) / jacobian.norm(dim=1)
        assert error(weights_of(build("imtl_g", len(jacobian)), jacobian), expected / expected.sum()) < 1e-9


def test_gradvac_after_many_steps_of_equal_gradients() -> None:
    method, jacobian = build("gradvac", 2), gradients(2, 9)
    for _ in range(80):
        weights_of(method, jacobian[[0, 0]])
    assert method.targets[0, 1] > 1 - 1e-9
    weights = weights_of(method, jacobian)
    assert weights.isfinite().all() and weights.abs().max() < 1e5


def test_all_gradients_zero() -> None:
    jacobian = jacobian_of("all zero")
    expected = {
        "imtl_g": 1 / 3, "upgrad": 1 / 3, "modo": 1 / 3, "sdmgrad": 1 / 3, "fairgrad": 3.0, "cagrad": 1 / 1.16,
    }  # fmt: skip
    for method in GRAMIAN:
        weights = weights_of(build(method, 3), jacobian)
        value = torch.full((3,), expected.get(method, 1.0), dtype=torch.float64)
        torch.testing.assert_close(weights, value, rtol=1e-12, atol=0)


def test_opposite_gradients_cancel_where_nothing_lowers_both_losses() -> None:
    jacobian = jacobian_of("opposite")
    for method in ("mgda", "nash_mtl", "fairgrad", "imtl_g", "cagrad", "upgrad", "pcgrad identity"):
        weights = weights_of(made(method, 2), jacobian)
        size = (weights * jacobian.norm(dim=1)).abs().max()
        assert (weights @ jacobian).norm() <= 1e-9 * size
    # Equal and bounded where the equation has no solution.
    for method in ("nash_mtl", "fairgrad", "imtl_g"):
        weights = weights_of(made(method, 2), jacobian)
        assert abs(weights[0] / weights[1] - 1) < 1e-6
        assert (weights * jacobian.norm(dim=1)).max() < 1e5


def test_equal_tasks_count_as_one_for_the_direction() -> None:
    jacobian = jacobian_of("equal")
    for method in ("mgda", "imtl_g"):
        three = direction_of(build(method, 3), jacobian)
        two = direction_of(build(method, 2), jacobian[[0, 2]])
        factor = 3 / 2 if method == "mgda" else 1
        assert error(three, factor * two) < 1e-9


def test_cagrad_of_no_distance_is_the_mean_and_mgda_does_not_conflict() -> None:
    jacobian = gradients(11, 50)
    assert error(direction_of(build("cagrad", 11, c=0.0), jacobian), jacobian.sum(dim=0)) < 1e-15
    step = direction_of(build("mgda", 11), jacobian)
    assert (jacobian @ step >= step @ step / 11 * (1 - 1e-9)).all()


def test_upgrad_does_not_conflict() -> None:
    jacobian = gradients(11, 50)
    step = direction_of(build("upgrad", 11, regularization=1e-10), jacobian)
    assert (jacobian @ step >= -1e-8 * jacobian.norm(dim=1) * step.norm()).all()

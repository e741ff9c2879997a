"""The solvers keep the conditions of an optimum, agree with scipy, and with a search over all cases for few tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, nnls
from torch import Tensor

from hf_bilb.balancers.gradient import cagrad, solvers
from tests.balancers.gradient.reference import gradients

#: (K, d), the last ones with more gradients than numbers in them.
SHAPES = [(1, 4), (2, 8), (3, 20), (5, 6), (11, 50), (40, 100), (40, 45), (11, 5), (40, 20), (40, 2)]
shapes = pytest.mark.parametrize(("num_tasks", "size"), SHAPES)
INDEPENDENT = [(k, d) for k, d in SHAPES if k <= d]


def of_tensors(solver: Callable[..., Any]) -> Callable[..., Tensor]:
    """The solver, given tensors and returning one, which does not write into what it is given."""

    def solve(*given: Any) -> Tensor:
        arrays = [one.numpy() if isinstance(one, Tensor) else one for one in given]
        for one in arrays:
            if isinstance(one, np.ndarray):
                one.flags.writeable = False
        found = solver(*arrays)
        return torch.from_numpy(found[0] if isinstance(found, tuple) else found)

    return solve


normalised = of_tensors(solvers.normalised)
simplex_minimum = of_tensors(solvers.simplex_minimum)
smallest_above = of_tensors(solvers.smallest_above)
fair_weights = of_tensors(solvers.fair_weights)
project_to_simplex = of_tensors(solvers.project_to_simplex)
conflict_averse = of_tensors(cagrad.conflict_averse)


def gramian_of(num_tasks: int, size: int, seed: int = 0, spread: float = 0.5) -> Tensor:
    jacobian = gradients(num_tasks, size, seed, spread)
    return normalised(jacobian @ jacobian.T)


@shapes
@pytest.mark.parametrize("seed", range(3))
def test_the_min_norm_point_keeps_the_conditions_of_an_optimum(num_tasks: int, size: int, seed: int) -> None:
    gramian = gramian_of(num_tasks, size, seed)
    point = simplex_minimum(gramian)
    assert (point >= 0).all() and abs(point.sum() - 1) < 1e-12
    slope = gramian @ point
    # Nowhere smaller than where the weight is: the point lies in front of all gradients.
    assert (slope >= point @ slope - 1e-11).all()


@shapes
def test_the_min_norm_point_is_that_of_nonnegative_least_squares(num_tasks: int, size: int) -> None:
    jacobian = gradients(num_tasks, size, spread=0.0)
    found, _ = nnls(
        torch.cat([jacobian.T, torch.ones(1, num_tasks, dtype=torch.float64)]).numpy(), np.eye(size + 1)[-1]
    )
    expected = torch.from_numpy(found / found.sum()) @ jacobian
    gramian = normalised(jacobian @ jacobian.T)
    torch.testing.assert_close(simplex_minimum(gramian) @ jacobian, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_the_minimum_with_a_linear_part_is_the_best_of_all_supports(num_tasks: int, seed: int) -> None:
    gramian = gramian_of(num_tasks, 5, seed)
    linear = torch.randn(num_tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2
    best = float("inf")
    for count in range(1, num_tasks + 1):
        for support in itertools.combinations(range(num_tasks), count):
            index = torch.tensor(support)
            equations = torch.zeros(count + 1, count + 1, dtype=torch.float64)
            equations[:count, :count] = gramian[index[:, None], index]
            equations[:count, count] = equations[count, :count] = 1
            right = torch.cat([-linear[index], torch.ones(1, dtype=torch.float64)])
            w = torch.linalg.solve(equations, right)[:count]
            if (w >= 0).all():
                best = min(best, float(w @ equations[:count, :count] @ w / 2 + linear[index] @ w))
    found = simplex_minimum(gramian, linear)
    assert abs(float(found @ gramian @ found / 2 + linear @ found) - best) < 1e-13
    # From a wrong start it ends at the same.
    start = torch.full_like(linear, 1 / num_tasks)
    torch.testing.assert_close(simplex_minimum(gramian, linear, start), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_nearly_equal_gradients_end_the_search_near_the_optimum(seed: int) -> None:
    # The Gramian tells gradients apart to 1e-8 of their size.
    num_tasks, size = 4 + seed % 13, 3 + seed % 7
    jacobian = gradients(num_tasks, size, seed, spread=(seed % 3) / 2)
    half = num_tasks // 2
    jacobian[half : 2 * half] = jacobian[:half] * (1 + 10.0 ** -(4 + seed % 13) * gradients(half, size, seed + 1))
    gramian = normalised(jacobian @ jacobian.T)
    linear = gradients(1, num_tasks, seed)[0] / 10
    for point, slope in (
        (w := simplex_minimum(gramian), gramian @ w),
        (w := simplex_minimum(gramian, linear), gramian @ w + linear),
    ):
        assert (point >= 0).all() and abs(point.sum() - 1) < 1e-12
        assert float(point @ slope - slope.min()) < 1e-8
    assert conflict_averse(gramian, 0.4).isfinite().all()


@shapes
@pytest.mark.parametrize("seed", range(2))
def test_projections_on_the_dual_cone_are_scipy_s(num_tasks: int, size: int, seed: int) -> None:
    gramian = gramian_of(num_tasks, size, seed)
    gramian = gramian / gramian.trace() + 1e-4 * torch.eye(num_tasks, dtype=torch.float64)
    bounds = torch.eye(num_tasks, dtype=torch.float64) / num_tasks
    found = smallest_above(gramian, bounds)
    root = torch.linalg.cholesky(gramian).T.numpy()
    for row, bound in zip(found, bounds, strict=True):
        moves, _ = nnls(root, -root @ bound.numpy())
        torch.testing.assert_close(row, bound + torch.from_numpy(moves), rtol=0, atol=1e-9)


def test_rows_that_do_not_come_to_rest_are_solved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gramian = gramian_of(11, 50) + 1e-4 * torch.eye(11, dtype=torch.float64)
    bounds = torch.eye(11, dtype=torch.float64)
    expected = smallest_above(gramian, bounds)
    monkeypatch.setattr(solvers, "_EXCHANGES", 1)
    torch.testing.assert_close(smallest_above(gramian, bounds), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_tasks", "size"), INDEPENDENT)
@pytest.mark.parametrize("power", [0.2, 0.5, 1.0, 2.0, 4.0])
def test_fair_weights_solve_their_equation(num_tasks: int, size: int, power: float) -> None:
    jacobian = gradients(num_tasks, size)
    gramian = jacobian @ jacobian.T
    weights = fair_weights(gramian, power)
    assert (weights > 0).all()
    # To 1e-12 of the terms that are added up, which cancel where gradients conflict.
    terms = gramian.abs() @ weights
    assert ((gramian @ weights - weights**-power).abs() < 1e-12 * terms).all()


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 50.0])
def test_fair_weights_of_two_tasks_by_bisection(power: float, factor: float) -> None:
    # With t = w_2 / w_1 the ratio of the equations is one in t alone.
    a, b, c = 1.0, 0.3 * factor, factor**2  # a cosine of 0.3
    t = np.exp(brentq(lambda s: np.log((b + c * np.exp(s)) / (a + b * np.exp(s))) + power * s, -80, 80, xtol=1e-14))
    first = (a + b * t) ** (-1 / (1 + power))
    expected = torch.tensor([first, t * first], dtype=torch.float64)
    gramian = torch.tensor([[a, b], [b, c]], dtype=torch.float64)
    torch.testing.assert_close(fair_weights(gramian, power), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize(("num_tasks", "size"), [(2, 1), (11, 5), (40, 20), (40, 2)])
def test_fair_weights_are_bounded_where_there_is_no_solution(power: float, num_tasks: int, size: int) -> None:
    jacobian = gradients(num_tasks, size, spread=0.0)
    jacobian[1] = -jacobian[0]
    weights = fair_weights(jacobian @ jacobian.T, power)
    alone = jacobian.norm(dim=1) ** (-2 / (1 + power))
    assert (weights > 0).all()
    assert (weights <= 1.01 * solvers._MOST * num_tasks * alone).all()
    if power <= 1:  # what is added to the diagonal is exact
        gramian = jacobian @ jacobian.T
        gramian.diagonal().mul_(1 + solvers._MOST ** -(1 + power))
        terms = gramian.abs() @ weights
        assert ((gramian @ weights - weights**-power).abs() < 1e-9 * terms).all()


@shapes
@pytest.mark.parametrize("c", [0.05, 0.4, 0.9, 1.5])
def test_cagrad_keeps_the_conditions_of_an_optimum(num_tasks: int, size: int, c: float) -> None:
    for seed in range(3):
        jacobian = gradients(num_tasks, size, seed, spread=0.5)
        jacobian = jacobian / jacobian.norm(dim=1).max()
        moves = conflict_averse(jacobian @ jacobian.T, c)
        mean = jacobian.mean(dim=0)
        radius = c * mean.norm()
        change = moves @ jacobian
        products = jacobian @ (mean + change)
        assert (moves >= 0).all()
        assert change.norm() <= radius * (1 + 1e-9)
        # d maximises the smallest product in the ball: all tasks with a weight have it, and the ball is used up.
        assert (products[moves > 1e-9 * moves.max()] - products.min()).abs().max() < 1e-6
        if change.norm() < radius * (1 - 1e-6):  # only where no direction lowers all losses
            assert abs(products.min()) < 1e-6


@pytest.mark.parametrize(("num_tasks", "size"), INDEPENDENT)
def test_cagrad_s_value_is_the_least(num_tasks: int, size: int) -> None:
    jacobian = gradients(num_tasks, size, 5, spread=0.5)
    mean = jacobian.mean(dim=0)

    def value(w: Tensor) -> Tensor:
        return (w @ jacobian) @ mean + 0.4 * mean.norm() * (w @ jacobian).norm(dim=-1)

    moves = conflict_averse(jacobian @ jacobian.T, 0.4)
    best = moves / moves.sum()
    # The gap to the best vertex of the slope bounds how far a convex function is from its minimum.
    step = best @ jacobian
    slope = jacobian @ (mean + 0.4 * mean.norm() * step / step.norm())
    assert float(best @ slope - slope.min()) < 1e-12 * float(slope.abs().max())
    others = torch.rand(200, num_tasks, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = 0.9 * best + 0.1 * others / others.sum(dim=1, keepdim=True)
    assert (value(others) >= value(best)).all()


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 40])
def test_the_projection_on_the_simplex_is_the_nearest_point(num_tasks: int) -> None:
    generator = torch.Generator().manual_seed(num_tasks)
    for scale in (1e-3, 1.0, 1e20):
        point = scale * torch.randn(num_tasks, generator=generator, dtype=torch.float64)
        found = project_to_simplex(point)
        assert (found >= 0).all() and abs(found.sum() - 1) < 1e-12
        # (point - found) . (v - found) <= 0 for every vertex v
        gap = point - found
        assert (gap.max() - gap @ found) <= 1e-12 * max(1.0, scale)

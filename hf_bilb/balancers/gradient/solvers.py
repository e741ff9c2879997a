"""Small problems of K numbers that several gradient methods share, solved to rounding error in bounded time.

All take and return float64 tensors on the CPU. No solver needs a package besides torch, a starting point or a step
size. Where a matrix is singular they return one of the solutions, finite in any case.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: A multiplier counts as negative below this share of the problem's largest number.
_TOLERANCE = 1e-13
#: A gradient counts as zero where its squared norm is below this share of the largest.
_ZERO = 1e-24
#: What is added to the diagonal of the cosines in `fair_weights`, so that there always is a solution.
_RIDGE = 1e-12
_NEWTON_STEPS = 100
_EXCHANGES = 40


def normalised(gramian: Tensor) -> tuple[Tensor, float]:
    """`gramian` with a largest diagonal entry of 1, and that entry; as it is where all gradients are zero."""
    scale = float(gramian.diagonal().max())
    return (gramian / scale, scale) if scale > 0 else (torch.zeros_like(gramian), 0.0)


def without_zero_gradients(gramian: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """The weights `[A]` that `solve` finds for the tasks whose gradient is not zero.

    A task with a zero gradient takes no part. It gets the mean of the other weights, which only its head sees: a head
    that starts at zero sends no gradient to the shared parameters, and must still be able to learn. 1 if all are zero.
    """
    squares = gramian.diagonal()
    there = squares > _ZERO * squares.max()
    if there.all():
        return solve(gramian)
    if not there.any():
        return torch.ones_like(squares)
    found = solve(gramian[there][:, there])
    return found.mean().expand_as(squares).clone().masked_scatter_(there, found)


def project_to_simplex(point: Tensor) -> Tensor:
    """The nearest w to `point [A]` with w >= 0 and sum 1."""
    ranked = point.sort(descending=True).values
    excess = (ranked.cumsum(0) - 1) / torch.arange(1, len(point) + 1, dtype=point.dtype)
    count = int((ranked > excess).sum())
    return (point - excess[max(count, 1) - 1]).clamp_min(0)


# ------------------------------------------------------------------------------------------- quadratic programs


def simplex_minimum(gramian: Tensor, linear: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """argmin of 1/2 w^T G w + p^T w over w >= 0 with sum 1, by an active set method. Without p the min-norm point.

    Args:
        gramian: G `[A, A]`, positive semidefinite, its entries about 1 (`normalised`).
        linear: p `[A]`.
        start: the solution of a problem nearby, to begin with its support; default: the best single task.
    """
    linear = torch.zeros_like(gramian[0]) if linear is None else linear
    if start is None:
        start = torch.zeros_like(linear)
        start[(gramian.diagonal() / 2 + linear).argmin()] = 1
    # On the simplex, 1 1^T only adds a constant; it keeps the equations on the support regular.
    return _active_set(gramian + 1, linear, start, on_simplex=True)


def nonnegative_minimum(gramian: Tensor, linear: Tensor) -> Tensor:
    """argmin of 1/2 x^T G x + p^T x over x >= 0, for p in the range of G (else there need not be a minimum)."""
    return _active_set(gramian, linear, torch.zeros_like(linear), on_simplex=False)


def _active_set(hessian: Tensor, linear: Tensor, point: Tensor, on_simplex: bool) -> Tensor:
    """The primal method of Lawson and Hanson: one more coordinate at a time, those that turn negative fall out."""
    limit = -_TOLERANCE * max(1.0, float(linear.abs().max()))
    support = point.nonzero().flatten().tolist()
    blocked: list[int] = []
    if len(support) > 1:
        point, support = _descend(hessian, linear, point, support, on_simplex)
    for _ in range(10 * len(linear) + 20):
        slope = hessian @ point + linear
        if on_simplex:
            slope = slope - point @ slope
        if support or blocked:
            slope[support + blocked] = torch.inf
        lowest, best = slope.min(dim=0)
        if lowest >= limit:
            break
        entered = int(best)
        moved, kept = _descend(hessian, linear, point, [*support, entered], on_simplex)
        if entered not in kept and kept == support:
            blocked.append(entered)  # its slope is rounding error
        else:
            blocked, point, support = [], moved, kept
    return point


def _descend(
    hessian: Tensor, linear: Tensor, point: Tensor, support: list[int], on_simplex: bool
) -> tuple[Tensor, list[int]]:
    """The minimum over the coordinates in `support`, or over those that are left once none of them is negative."""
    while support:
        index = torch.tensor(support)
        found = _solve_on(hessian[index[:, None], index], linear[index], on_simplex)
        if found is None:
            return point, support[:-1]
        if (found > 0).all():
            return torch.zeros_like(point).index_copy_(0, index, found), support
        before = point[index]
        share = torch.where(found > 0, torch.inf, before / (before - found).clamp_min(1e-300))
        step, first = share.min(dim=0)
        moved = before + step.clamp(0, 1) * (found - before)
        moved[first] = 0
        point = torch.zeros_like(point).index_copy_(0, index, moved.clamp_min(0))
        support = [number for number, value in zip(support, moved.tolist(), strict=True) if value > 0]
    return point, support


def _solve_on(hessian: Tensor, linear: Tensor, on_simplex: bool) -> Tensor | None:
    """The stationary point of the support, of sum 1 if asked for; None where the equations are singular."""
    right = torch.stack([-linear, torch.ones_like(linear)], dim=1)
    solved, info = torch.linalg.solve_ex(hessian, right)
    if int(info):
        return None
    free, ones = solved.unbind(dim=1)
    found = free + ones * ((1 - free.sum()) / ones.sum()) if on_simplex else free
    return found if found.isfinite().all() else None


def smallest_above(gramian: Tensor, bounds: Tensor) -> Tensor:
    """argmin of v^T G v over v >= u for each row u of `bounds [M, A]`; G must be positive definite.

    All rows at once by exchanging blocks of the active set (Judice and Pires); a row that has not come to rest after
    some rounds is solved by itself.
    """
    slopes = bounds @ gramian
    limit = -_TOLERANCE * max(1.0, float(slopes.abs().max()))
    free = slopes < limit
    moves, identity = torch.zeros_like(bounds), torch.eye(len(gramian), dtype=gramian.dtype)
    open_rows = torch.arange(len(bounds))
    for _ in range(_EXCHANGES):
        inside = free[open_rows]
        equations = torch.where(inside[:, :, None] & inside[:, None, :], gramian, identity)
        solved, _ = torch.linalg.solve_ex(equations, torch.where(inside, -slopes[open_rows], 0.0))
        moves[open_rows] = solved
        wrong = torch.where(inside, solved < 0, solved @ gramian + slopes[open_rows] < limit)
        left = wrong.any(dim=1)
        open_rows = open_rows[left]
        if not len(open_rows):
            return bounds + moves
        free[open_rows] ^= wrong[left]
    for row in open_rows.tolist():
        moves[row] = nonnegative_minimum(gramian, slopes[row])
    return bounds + moves


# ------------------------------------------------------------------------------------------- fairness


def fair_weights(gramian: Tensor, power: float) -> Tensor:
    """w > 0 with G w = w^-power: the minimum of 1/2 w^T G w - sum_k (the integral of w_k^-power), which is convex.

    By Newton's method with a line search, in units in which every gradient alone has the weight 1. There is no
    solution where some weights >= 0 bring the gradients to zero, as with opposite ones: the weights would grow without
    end. 1e-12 on the diagonal of the cosines ends that, at |w_k g_k| = sqrt(K) 1e6 for `power` = 1.
    """
    return without_zero_gradients(gramian, lambda there: _newton(there, power))


def _newton(gramian: Tensor, power: float) -> Tensor:
    scaled, scale = normalised(gramian)
    squares = scaled.diagonal()
    alone = squares ** (-1 / (1 + power))
    norms = squares.sqrt()
    cosines = scaled / (norms[:, None] * norms)
    cosines.diagonal().add_(_RIDGE)
    size = alone * norms  # |w_k g_k| where w is what the task alone would have
    one = torch.ones_like(size)

    def value(at: Tensor) -> Tensor:
        integral = at.log() if power == 1 else at ** (1 - power) / (1 - power)
        return (size * at) @ (cosines @ (size * at)) / 2 - size.square() @ integral

    # The best point on the ray of equal shares: the curvature is that of the quadratic form there.
    share = one * (size.square().sum() / (size @ cosines @ size)).clamp(1e-30, 1e12) ** (1 / (1 + power))
    current = value(share)
    for _ in range(_NEWTON_STEPS):
        inverse = share**-power
        slope = cosines @ (size * share) - size * inverse
        if (slope.abs() <= 1e-15 * size * inverse).all():
            break
        curved = cosines + torch.diag(power * inverse / share)
        change = -torch.linalg.solve_ex(curved, slope).result / size
        gain = float(slope @ (size * change))
        if not gain < 0:
            break
        step = min(1.0, 0.95 / max(float((-change / share).max()), 1e-300))
        share, current, moved = _line_search(value, share, current, change, gain, step)
        if not moved or (step * change.abs() <= 1e-16 * share).all():
            break
    return share * alone * scale ** (-1 / (1 + power))


def _line_search(
    value: Callable[[Tensor], Tensor], point: Tensor, current: Tensor, change: Tensor, gain: float, step: float
) -> tuple[Tensor, Tensor, bool]:
    """Halve the step until the value falls by a fair share of what its slope promises, rounding errors aside."""
    for _ in range(40):
        trial = point + step * change
        reached = value(trial)
        if reached <= current + 1e-4 * step * gain + 4e-16 * abs(current):
            return trial, reached, True
        step /= 2
    return point, current, False

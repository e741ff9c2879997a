"""Small problems of K numbers that several gradient methods share, solved to rounding error in bounded time.

All take and return float64 arrays: for a few numbers numpy calls its operations in a third of the time that torch
takes. No solver needs a starting point or a step size. Where a matrix is singular they return one of the solutions,
finite in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

#: A multiplier counts as negative below this share of the problem's largest number.
_TOLERANCE = 1e-13
#: A gradient counts as zero where its squared norm is below this share of the largest.
_ZERO = 1e-24
#: About how many times the weight that a task would have alone `fair_weights` gives it at most.
_MOST = 1e4
#: So few equations are solved here: calling LAPACK, whose code is in no cache by then, takes 100 us.
_FEW = 4
_NEWTON_STEPS = 100
_EXCHANGES = 15

#: Divisions by zero, overflows and the like end in infinities and NaN, which are looked for where they matter.
quietly = np.errstate(all="ignore")


def array(tensor: Tensor) -> Array:
    """The numbers of a float64 tensor on the CPU, which both share."""
    numbers: Array = tensor.numpy()
    return numbers


def normalised(gramian: Array) -> tuple[Array, float]:
    """`gramian` with a largest diagonal entry of 1, and that entry; as it is where all gradients are zero."""
    scale = float(gramian.diagonal().max())
    return (gramian / scale, scale) if scale > 0 else (np.zeros_like(gramian), 0.0)


def without_zero_gradients(gramian: Array, solve: Callable[[Array], Array]) -> Array:
    """The weights `[A]` that `solve` finds for the tasks whose gradient is not zero.

    A task with a zero gradient takes no part. It gets the mean of the other weights, which only its head sees: a head
    that starts at zero sends no gradient to the shared parameters, and must still be able to learn. 1 if all are zero.
    """
    squares = gramian.diagonal()
    there = squares > _ZERO * squares.max()
    if there.all():
        return solve(gramian)
    if not there.any():
        return np.ones_like(squares)
    found = solve(gramian[there][:, there])
    weights = np.full_like(squares, found.mean())
    weights[there] = found
    return weights


def project_to_simplex(point: Array) -> Array:
    """The nearest w to `point [A]` with w >= 0 and sum 1."""
    point = point - point.max()  # of large numbers only the differences count
    ranked = np.sort(point)[::-1]
    excess = (ranked.cumsum() - 1) / np.arange(1, len(point) + 1)
    last = max(int(np.count_nonzero(ranked > excess)) - 1, 0)
    return np.maximum(point - excess[last], 0.0)


# ------------------------------------------------------------------------------------------- quadratic programs


@quietly
def simplex_minimum(gramian: Array, linear: Array | None = None, start: Array | None = None) -> Array:
    """argmin of 1/2 w^T G w + p^T w over w >= 0 with sum 1, by an active set method. Without p the min-norm point.

    Args:
        gramian: G `[A, A]`, positive semidefinite, its entries about 1 (`normalised`).
        linear: p `[A]`.
        start: the solution of a problem nearby, to begin with its support; default: the best single task.
    """
    if linear is None:
        # The min-norm point is the minimum of 1/2 x^T G x + 1/2 (sum x - 1)^2 over x >= 0, scaled to sum 1.
        ones = np.ones(len(gramian))
        inside = solved_equations(gramian + 1, ones)
        if inside is not None and inside.min() >= 0:
            return inside / inside.sum()
        found, left = _exchange(gramian + 1, -ones[None])
        if not len(left):
            return np.maximum(found[0], 0.0) / np.maximum(found[0], 0.0).sum()
        linear = np.zeros_like(ones)
    if start is None:
        start = np.zeros_like(linear)
        start[(gramian.diagonal() / 2 + linear).argmin()] = 1
    # On the simplex, 1 1^T only adds a constant; it keeps the equations on the support regular.
    return _active_set(gramian + 1, linear, start, on_simplex=True)


@quietly
def nonnegative_minimum(gramian: Array, linear: Array) -> Array:
    """argmin of 1/2 x^T G x + p^T x over x >= 0, for p in the range of G (else there need not be a minimum)."""
    return _active_set(gramian, linear, np.zeros_like(linear), on_simplex=False)


def _active_set(hessian: Array, linear: Array, point: Array, on_simplex: bool) -> Array:
    """The primal method of Lawson and Hanson: one more coordinate at a time, those that turn negative fall out."""
    limit = -_TOLERANCE * max(1.0, float(np.abs(linear).max()))
    support = point.nonzero()[0].tolist()
    blocked: list[int] = []
    if len(support) > 1:
        point, support = _descend(hessian, linear, point, support, on_simplex)
    for _ in range(10 * len(linear) + 20):
        slope = hessian @ point + linear
        if on_simplex:
            slope -= point @ slope
        if support or blocked:
            slope[support + blocked] = np.inf
        entered = int(slope.argmin())
        if slope[entered] >= limit:
            break
        moved, kept = _descend(hessian, linear, point, [*support, entered], on_simplex)
        if entered not in kept and kept == support:
            blocked.append(entered)  # its slope is rounding error
        else:
            blocked, point, support = [], moved, kept
    return point


def _descend(
    hessian: Array, linear: Array, point: Array, support: list[int], on_simplex: bool
) -> tuple[Array, list[int]]:
    """The minimum over the coordinates in `support`, or over those that are left once none of them is negative."""
    while support:
        index = np.array(support)
        found = _solve_on(hessian[index[:, None], index], linear[index], on_simplex)
        if found is None:
            return point, support[:-1]
        if (found > 0).all():
            point = np.zeros_like(point)
            point[index] = found
            return point, support
        before = point[index]
        share = np.where(found > 0, np.inf, before / np.maximum(before - found, 1e-300))
        first = int(share.argmin())
        moved = before + min(max(float(share[first]), 0.0), 1.0) * (found - before)
        moved[first] = 0
        point = np.zeros_like(point)
        point[index] = np.maximum(moved, 0.0)
        support = [number for number, value in zip(support, moved.tolist(), strict=True) if value > 0]
    return point, support


def _solve_on(hessian: Array, linear: Array, on_simplex: bool) -> Array | None:
    """The stationary point of the support, of sum 1 if asked for; None where the equations are singular."""
    solved = solved_equations(hessian, np.stack([-linear, np.ones_like(linear)], axis=1))
    if solved is None:
        return None
    free, ones = solved.T
    found: Array = free + ones * ((1 - free.sum()) / ones.sum()) if on_simplex else free
    return found if np.isfinite(found).all() else None


def solved_equations(matrix: Array, right: Array) -> Array | None:
    """matrix^-1 right, with one column on the right or several; None where the matrix is singular."""
    if len(matrix) <= _FEW:
        columns = right.reshape(len(right), -1).tolist()
        found = _eliminated([row + on_right for row, on_right in zip(matrix.tolist(), columns, strict=True)])
        return None if found is None else np.array(found).reshape(right.shape)
    try:
        return np.linalg.solve(matrix, right).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None


def _eliminated(rows: list[list[float]]) -> list[list[float]] | None:
    """What is left on the right of the n equations `rows`, n numbers and those on the right each; by Gauss and Jordan
    with the largest pivot of each column; None where they are singular."""
    size = len(rows)
    for i in range(size):
        best = max(range(i, size), key=lambda j: abs(rows[j][i]))
        rows[i], rows[best] = rows[best], rows[i]
        pivot = rows[i][i]
        if pivot == 0:
            return None
        rows[i] = [number / pivot for number in rows[i]]
        for j in range(size):
            if j != i:
                factor = rows[j][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[size:] for row in rows]


@quietly
def smallest_above(gramian: Array, bounds: Array) -> Array:
    """argmin of v^T G v over v >= u for each row u of `bounds [M, A]`; G must be positive definite."""
    slopes = bounds @ gramian
    moves, left = _exchange(gramian, slopes)
    for row in left.tolist():
        moves[row] = nonnegative_minimum(gramian, slopes[row])
    return bounds + moves


def _exchange(hessian: Array, linear: Array) -> tuple[Array, NDArray[Any]]:
    """argmin of 1/2 x^T H x + p^T x over x >= 0 for each row p of `linear [M, A]`, and the rows without result.

    All rows at once by exchanging blocks of the active set (Judice and Pires), which takes few rounds where it comes to
    rest; that is not certain.
    """
    limit = -_TOLERANCE * max(1.0, float(np.abs(linear).max()))
    free = linear < limit
    moves, identity = np.zeros_like(linear), np.eye(len(hessian))
    left = np.arange(len(linear))
    for _ in range(_EXCHANGES):
        inside = free[left]
        equations = np.where(inside[:, :, None] & inside[:, None, :], hessian, identity)
        # By torch: the equations of one row that are singular do not stop those of the others.
        right = torch.from_numpy(np.where(inside, -linear[left], 0.0))
        solved: Array = torch.linalg.solve_ex(torch.from_numpy(equations), right).result.numpy()
        moves[left] = solved
        # Written so that NaN, of singular equations, is wrong.
        wrong = ~np.where(inside, solved >= 0, solved @ hessian + linear[left] >= limit)
        kept = wrong.any(axis=1)
        left = left[kept]
        if not len(left):
            break
        free[left] ^= wrong[kept]
    return moves, left


# ------------------------------------------------------------------------------------------- fairness


@quietly
def fair_weights(gramian: Array, power: float) -> Array:
    """w > 0 with G w = w^-power: the minimum of 1/2 w^T G w - sum_k (the integral of w_k^-power), which is convex.

    There is no solution where some weights >= 0 bring the gradients to zero, as with opposite ones: the weights would
    grow without end, and cancel each other to rounding errors. Where a weight exceeds 1e4 times what its task would
    have alone, 1e4^-(1 + power) times |g_k|^2 is added to the diagonal of G, which bounds them about there.
    """

    def bounded(there: Array) -> Array:
        scaled, scale = normalised(there)
        squares = scaled.diagonal()
        norms = np.sqrt(squares)
        cosines = scaled / norms[:, None] / norms
        alone = squares ** (-1 / (1 + power))
        share = _fair_shares(cosines, alone * norms, power)
        if share is None:
            cosines += np.diag(np.full_like(squares, _MOST ** -(1 + power)))
            share = _fair_shares(cosines, alone * norms, power, most=np.inf)
        share = np.ones_like(squares) if share is None else share
        return share * alone * scale ** (-1 / (1 + power))

    return without_zero_gradients(gramian, bounded)


def _fair_shares(cosines: Array, size: Array, power: float, most: float = _MOST) -> Array | None:
    """u, by Newton's method with a line search; None where one exceeds `most`.

    Args:
        cosines: C `[A, A]`, of the gradients.
        size: v `[A]`, |w_k g_k| where w_k is what the task would have alone; in these units G w = w^-power reads
            C (v u) = v u^-power.
    """
    squares = size * size

    def value(at: Array) -> float:
        integral = np.log(at) if power == 1 else at ** (1 - power) / (1 - power)
        long = size * at
        return float(long @ cosines @ long / 2 - squares @ integral)

    # The best of the equal shares.
    curvature = float(squares.sum() / max(float(size @ cosines @ size), 1e-300))
    share = np.full_like(size, min(curvature, 1e3 ** (1 + power)) ** (1 / (1 + power)))
    current, stalled = value(share), 0
    for _ in range(_NEWTON_STEPS):
        inverse = share**-power
        slope = cosines @ (size * share) - size * inverse
        solved = solved_equations(cosines + np.diag(power * inverse / share), slope)
        if solved is None:
            break
        change = -solved / size
        gain = float(slope @ (size * change))
        if not gain < 0 or (np.abs(change) <= 1e-15 * share).all():
            break
        step = min(1.0, 0.95 / max(float((-change / share).max()), 1e-300))
        found = _line_search(value, share, current, change, gain, step)
        if found is None:
            break
        # The value ends in rounding errors two steps before the point does.
        stalled += int(found[1] >= current)
        share, current = found
        if share.max() > 10 * most:
            return None
        if stalled > 2:
            break
    return share if np.isfinite(share).all() and share.max() <= most else None


def _line_search(
    value: Callable[[Array], float], point: Array, current: float, change: Array, gain: float, step: float
) -> tuple[Array, float] | None:
    """Halve the step until the value falls by a fair share of what its slope promises, rounding errors aside."""
    for _ in range(40):
        trial = point + step * change
        reached = value(trial)
        if reached <= current + 1e-4 * step * gain + 4e-16 * abs(current):
            return trial, reached
        step /= 2
    return None

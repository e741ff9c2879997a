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
#: About how many times the weight that a task would have alone `fair_weights` gives it at most.
_MOST = 1e4
_NEWTON_STEPS = 100
_EXCHANGES = 15


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
    point = point - point.max()  # of large numbers only the differences count
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
    if linear is None:
        linear = torch.zeros_like(gramian[0])
        if len(linear) > 4:  # a good guess pays
            # The min-norm point is the minimum of 1/2 x^T G x + 1/2 (sum x - 1)^2 over x >= 0, scaled to sum 1.
            guess, left = _exchange(gramian + 1, torch.full_like(gramian[:1], -1.0))
            start = start if len(left) else guess[0].clamp_min(0) / guess[0].clamp_min(0).sum()
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
    """argmin of v^T G v over v >= u for each row u of `bounds [M, A]`; G must be positive definite."""
    slopes = bounds @ gramian
    moves, left = _exchange(gramian, slopes)
    for row in left.tolist():
        moves[row] = nonnegative_minimum(gramian, slopes[row])
    return bounds + moves


def _exchange(hessian: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    """argmin of 1/2 x^T H x + p^T x over x >= 0 for each row p of `linear [M, A]`, and the rows without result.

    All rows at once by exchanging blocks of the active set (Judice and Pires), which takes few rounds where it comes to
    rest; that is not certain.
    """
    limit = -_TOLERANCE * max(1.0, float(linear.abs().max()))
    free = linear < limit
    moves, identity = torch.zeros_like(linear), torch.eye(len(hessian), dtype=hessian.dtype)
    left = torch.arange(len(linear))
    for _ in range(_EXCHANGES):
        inside = free[left]
        equations = torch.where(inside[:, :, None] & inside[:, None, :], hessian, identity)
        solved = torch.linalg.solve_ex(equations, torch.where(inside, -linear[left], 0.0)).result
        moves[left] = solved
        # Written so that NaN, of singular equations, is wrong.
        wrong = ~torch.where(inside, solved >= 0, solved @ hessian + linear[left] >= limit)
        kept = wrong.any(dim=1)
        left = left[kept]
        if not len(left):
            break
        free[left] ^= wrong[kept]
    return moves, left


# ------------------------------------------------------------------------------------------- fairness


def fair_weights(gramian: Tensor, power: float) -> Tensor:
    """w > 0 with G w = w^-power: the minimum of 1/2 w^T G w - sum_k (the integral of w_k^-power), which is convex.

    There is no solution where some weights >= 0 bring the gradients to zero, as with opposite ones: the weights would
    grow without end, and cancel each other to rounding errors. Where a weight exceeds 1e4 times what its task would
    have alone, 1e4^-(1 + power) times |g_k|^2 is added to the diagonal of G, which bounds them about there.
    """

    def bounded(there: Tensor) -> Tensor:
        scaled, scale = normalised(there)
        squares = scaled.diagonal()
        norms = squares.sqrt()
        cosines = scaled / norms[:, None] / norms
        alone = squares ** (-1 / (1 + power))
        share = _fair_shares(cosines, alone * norms, power)
        if share is None:
            cosines.diagonal().add_(_MOST ** -(1 + power))
            share = _fair_shares(cosines, alone * norms, power, most=torch.inf)
        share = torch.ones_like(squares) if share is None else share
        return share * alone * scale ** (-1 / (1 + power))

    return without_zero_gradients(gramian, bounded)


def _fair_shares(cosines: Tensor, size: Tensor, power: float, most: float = _MOST) -> Tensor | None:
    """u, by Newton's method with a line search; None where one exceeds `most`.

    Args:
        cosines: C `[A, A]`, of the gradients.
        size: v `[A]`, |w_k g_k| where w_k is what the task would have alone; in these units G w = w^-power reads
            C (v u) = v u^-power.
    """

    def value(at: Tensor) -> Tensor:
        integral = at.log() if power == 1 else at ** (1 - power) / (1 - power)
        return (size * at) @ cosines @ (size * at) / 2 - size.square() @ integral

    # The best of the equal shares.
    curvature = size.square().sum() / (size @ cosines @ size).clamp_min(1e-300)
    share = torch.ones_like(size) * curvature.clamp_max(1e3 ** (1 + power)) ** (1 / (1 + power))
    current, stalled = value(share), 0
    for _ in range(_NEWTON_STEPS):
        inverse = share**-power
        slope = cosines @ (size * share) - size * inverse
        curved = cosines + torch.diag(power * inverse / share)
        change = -torch.linalg.solve_ex(curved, slope).result / size
        gain = float(slope @ (size * change))
        if not gain < 0 or (change.abs() <= 1e-15 * share).all():
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
    return share if share.isfinite().all() and share.max() <= most else None


def _line_search(
    value: Callable[[Tensor], Tensor], point: Tensor, current: Tensor, change: Tensor, gain: float, step: float
) -> tuple[Tensor, Tensor] | None:
    """Halve the step until the value falls by a fair share of what its slope promises, rounding errors aside."""
    for _ in range(40):
        trial = point + step * change
        reached = value(trial)
        if reached <= current + 1e-4 * step * gain + 4e-16 * abs(current):
            return trial, reached
        step /= 2
    return None

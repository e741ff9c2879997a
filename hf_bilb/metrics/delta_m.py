"""Figures over all tasks: Delta_m against single-task results, and the mean rank among methods.

Functions of numbers that were measured before; numpy alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_bilb.errors import MetricError

Floats: TypeAlias = NDArray[np.float64]

#: Keys among the metrics of a run: Delta_m, and Delta_m with the mean inside each task first.
DELTA_M, DELTA_M_BY_TASK = "delta_m", "delta_m_by_task"
#: Those that are themselves a relation to other models, so that a ratio of two of them says nothing.
RELATIONS = (DELTA_M, DELTA_M_BY_TASK)


@overload
def delta_m(values: Sequence[float], base: ArrayLike, higher_is_better: ArrayLike) -> float: ...
@overload
def delta_m(values: ArrayLike, base: ArrayLike, higher_is_better: ArrayLike) -> float | Floats: ...
def delta_m(values: ArrayLike, base: ArrayLike, higher_is_better: ArrayLike) -> float | Floats:
    """Mean relative change against single-task models, in percent; lower is better, 0 is as good as they are.

    Delta_m = 100 / M * sum_j s_j (values_j - base_j) / base_j, with s_j = -1 where higher is better and 1 elsewhere:
    a flat mean over all M metrics, so that a task with five of them counts five times.

    Args:
        values: `[M]` or `[..., M]`, one number for each metric; a NaN (a model that diverged) gives NaN.
        base: `[M]`, the same of models trained on one task each, in the same units and above 0.
        higher_is_better: `[M]` of bools.

    Returns:
        a float, or `[...]` for `values [..., M]`.

    Raises:
        MetricError: other shapes; a base that is not finite and above 0 (a change has no share of it), named by its
            position.

    Source: the average per-task drop of Maninis, Radosavovic and Kokkinos, Attentive single-tasking of multiple tasks
    (CVPR 2019), in percent as Liu et al. (FAMO, NeurIPS 2023) and their followers print it.
    """
    return _float_or_array(_changes(values, base, higher_is_better).mean(axis=-1))


@overload
def grouped_delta_m(
    values: Sequence[float], base: ArrayLike, higher_is_better: ArrayLike, groups: Sequence[Hashable]
) -> float: ...
@overload
def grouped_delta_m(
    values: ArrayLike, base: ArrayLike, higher_is_better: ArrayLike, groups: Sequence[Hashable]
) -> float | Floats: ...
def grouped_delta_m(
    values: ArrayLike, base: ArrayLike, higher_is_better: ArrayLike, groups: Sequence[Hashable]
) -> float | Floats:
    """`delta_m` with nearly equivalent metrics counted once: the mean inside each group first, then over the groups.

    Args:
        values, base, higher_is_better: as in `delta_m`.
        groups: M labels; metrics with equal ones form a group (QM9's U0, U, H and G; the five of surface normals).

    Returns and errors as in `delta_m`; also a `MetricError` when there are not M labels.
    """
    changes = _changes(values, base, higher_is_better)
    if len(groups) != changes.shape[-1]:
        raise MetricError(f"groups: got {len(groups)} labels, expected one for each of {changes.shape[-1]} metrics")
    members: dict[Hashable, list[int]] = {}
    for position, label in enumerate(groups):
        members.setdefault(label, []).append(position)
    means = [changes[..., positions].mean(axis=-1) for positions in members.values()]
    return _float_or_array(np.stack(means, axis=-1).mean(axis=-1))


def mean_rank(values: ArrayLike, higher_is_better: ArrayLike) -> Floats:
    """Each method's rank in each metric, averaged over the metrics; 1 is the best that can be.

    Competition ranking: 1 + the number of methods that are strictly better, so that equal ones share the smaller rank.
    The rank depends on which methods are compared. The papers leave single-task models out.

    Args:
        values: `[R, M]`, R methods and M metrics.
        higher_is_better: `[M]` of bools.

    Returns:
        `[R]`, numbers from 1 to R.

    Raises:
        MetricError: other shapes, none of either, or a value that is NaN, which is neither better nor worse.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise MetricError(f"values {table.shape}, expected [R, M]: a row for each method, a column for each metric")
    signs = _signs(higher_is_better, table.shape[1])
    if np.isnan(table).any():
        row, column = np.argwhere(np.isnan(table))[0]
        raise MetricError(f"values[{row}, {column}]: nan has no rank")
    lower = table * signs
    ranks = 1 + (lower[None, :, :] < lower[:, None, :]).sum(axis=1)
    return np.asarray(ranks.mean(axis=1), dtype=np.float64)


def _changes(values: ArrayLike, base: ArrayLike, higher_is_better: ArrayLike) -> Floats:
    """Relative changes `[..., M]` in percent, positive where worse."""
    measured, single = np.asarray(values, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if single.ndim != 1 or not single.size or measured.ndim == 0 or measured.shape[-1] != len(single):
        raise MetricError(f"values {measured.shape} and base {single.shape}, expected [..., M] and [M]")
    signs = _signs(higher_is_better, len(single))
    wrong = np.flatnonzero(~(np.isfinite(single) & (single > 0)))
    if wrong.size:
        raise MetricError(f"base[{wrong[0]}]: {single[wrong[0]]:g} is not valid, expected a finite number above 0")
    return np.asarray(100 * signs * (measured - single) / single)


def _signs(higher_is_better: ArrayLike, num_metrics: int) -> NDArray[np.int64]:
    upward = np.asarray(higher_is_better)
    if upward.shape != (num_metrics,):
        raise MetricError(f"higher_is_better {upward.shape}, expected [{num_metrics}]: one for each metric")
    return np.where(upward.astype(bool), -1, 1)


def _float_or_array(values: Floats) -> float | Floats:
    return float(values) if values.ndim == 0 else values

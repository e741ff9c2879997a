"""Scenarios: `absent_tasks: auto` where labels are sparse, so that many a batch of a rank holds a single task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.distributed.models import build_feature_model
from tests.distributed.training import GLOBAL_BATCH, STEPS_PER_EPOCH, optimizer_settings, train, world_size
from tests.distributed.windows import MICRO_BATCHES, WINDOW, over_windows
from tests.synthetic import SyntheticData, build_data

#: stch has the steepest answer to a loss that is held.
BALANCERS: dict[str, dict[str, Any]] = {
    "bilb": {"name": "bilb", "learning_rate": 0.02},
    "stch": {"name": "stch"},
    "uw": {"name": "uw"},
}
ADAM = optimizer_settings(torch.float64)


def sparse_data(rows: int, whole: int, part: int) -> SyntheticData:
    """One label in twenty, so that of the global batches of `whole` rows some hold a single task; of those that hold
    several some have parts of `part` rows, a rank's micro-batches, none of which holds more than one."""
    data = build_data(rows, dtype=torch.float64, missing=0.95)
    batches = data.labels.isfinite().view(-1, whole // part, part, data.labels.shape[1]).any(dim=2)
    tasks = batches.any(dim=1).sum(dim=1)
    scattered = (tasks > 1) & (batches.sum(dim=2) <= 1).all(dim=1)
    assert (tasks == 1).sum() >= 2 and (tasks > 1).sum() >= 2 and scattered.any()
    return data


def sparse(balancer: str, absent: str) -> dict[str, Any]:
    data = sparse_data(STEPS_PER_EPOCH * GLOBAL_BATCH, GLOBAL_BATCH, GLOBAL_BATCH // 2)
    model = build_feature_model(torch.float64)
    return train(model, data, balancer=BALANCERS[balancer], num_train_epochs=2, absent_tasks=absent, **ADAM)


def sparse_windows(balancer: str, whole: bool = True) -> dict[str, Any]:
    data = sparse_data(12 * WINDOW, WINDOW, WINDOW // 2 // MICRO_BATCHES)
    return over_windows(build_feature_model(torch.float64), data, whole=whole, balancer=BALANCERS[balancer], **ADAM)


def absent_task_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for balancer in BALANCERS:
        found[f"sparse/{balancer}/auto"] = partial(sparse, balancer, "auto")
        found[f"sparse_windows/{balancer}"] = partial(sparse_windows, balancer)
    for absent in ("hold", "skip"):
        found[f"sparse/stch/{absent}"] = partial(sparse, "stch", absent)
    if world_size() == 1:
        # The same micro-batches as on two ranks, but twice as many in a window: no window but micro-batches of two.
        found["sparse_micro_batches/stch"] = partial(sparse_windows, "stch", whole=False)
    return found

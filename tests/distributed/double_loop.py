"""Scenarios: the double loop, its diagnostics, and phases of balancing, with resumed runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.feature_routers import ROUTERS
from tests.distributed.models import HIDDEN, build_feature_model
from tests.distributed.training import (
    SmallestGap,
    optimizer_settings,
    rank,
    shared_folder,
    train,
    train_standalone,
    uneven_data,
    world_size,
)
from tests.distributed.windows import over_windows, window_data
from tests.synthetic import SyntheticData, build_data

LOWER_LEVEL = {"inner_steps": 3, "inner_learning_rate": 0.05, "penalty_weight": 1.5}
DOUBLE: dict[str, dict[str, Any]] = {
    "parameter": {"name": "bilb", "learning_rate": 0.02, "router": "parameter", "lower_level": LOWER_LEVEL},
    "features": {**ROUTERS["nyuv2"], "lower_level": LOWER_LEVEL},
}
DIAGNOSTICS = {"every_n_steps": 5, "inner_steps": 2, "inner_learning_rate": 0.05}
ADAM = optimizer_settings(torch.float64)
#: Of the runs with phases: warm-up, balancing, frozen; each phase has a checkpoint in it.
WARMUP, FREEZE_AFTER, STEPS = 7, 13, 20
CHECKPOINTS = (5, 10, 15)
STEPS_BY_HAND = 25


def by_trainer(router: str) -> dict[str, Any]:
    with SmallestGap() as gap:
        found = train(
            build_feature_model(torch.float64),
            uneven_data(torch.float64),
            balancer=DOUBLE[router],
            num_train_epochs=1,
            absent_tasks="skip",
            **ADAM,
        )
    return {**found, "smallest_gap": gap.value}


def by_hand(router: str) -> dict[str, Any]:
    options = DOUBLE[router] if router == "parameter" else {**DOUBLE[router], "num_features": HIDDEN}
    model, data = build_feature_model(torch.float64), uneven_data(torch.float64)
    return train_standalone(options, model, data, steps=STEPS_BY_HAND, first_rank_rows=5, absent_tasks="skip")


def alone(place: int) -> dict[str, Any]:
    """On the data of rank `place`, which is here nobody else's; one process runs each in turn."""
    data = build_data(2 * STEPS * 8, dtype=torch.float64)
    rows = slice(place * STEPS * 8, (place + 1) * STEPS * 8)
    part = SyntheticData(data.features[rows], data.labels[rows])
    with reductions() as groups:
        found = in_groups(part, [[0], [1]] if world_size() > 1 else [])
    return {**found, "groups": len(groups)}


def in_a_group(explicit: bool) -> dict[str, Any]:
    with reductions() as groups:
        found = in_groups(build_data(STEPS * 8, dtype=torch.float64), [[0, 1]] if explicit else [])
    return {**found, "in_the_default_group": sum(group is None for group in groups), "groups": len(groups)}


def in_groups(data: SyntheticData, groups: list[list[int]]) -> dict[str, Any]:
    options = {**DOUBLE["features"], "num_features": HIDDEN}
    return train_standalone(options, build_feature_model(torch.float64), data, steps=STEPS, groups=groups)


@contextmanager
def reductions() -> Iterator[list[Any]]:
    """The group of every reduction inside (but for those that DistributedDataParallel makes itself)."""
    seen: list[Any] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        seen.append(group)
        return original(tensor, *args, group=group, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield seen
    finally:
        dist.all_reduce = original


def poisoned() -> dict[str, Any]:
    """A loss that is not finite in one micro-batch of rank 1, in the update that diagnostics look at."""
    data = window_data()
    data.features[2 * 16 + 6], data.labels[2 * 16 + 6] = torch.inf, 1.0
    return over_windows(
        build_feature_model(torch.float64),
        data,
        whole=True,
        balancer=DOUBLE["features"],
        diagnostics={**DIAGNOSTICS, "every_n_steps": 3},
        nonfinite_loss="skip",
        num_train_epochs=1,
        logging_steps=1,
        **ADAM,
    )


def reevaluated(wrapped: bool) -> dict[str, Any]:
    model, data = build_feature_model(torch.float64, batch_norm=True), build_data(STEPS * 8, dtype=torch.float64)
    return train_standalone(DOUBLE["parameter"], model, data, steps=STEPS, reevaluate_wrapped=wrapped)


def in_windows(router: str) -> dict[str, Any]:
    model = build_feature_model(torch.float64, auxiliary_weight=0.1)
    return over_windows(model, window_data(), whole=True, balancer=DOUBLE[router], **ADAM)


def beside_training(lower_level: Any) -> dict[str, Any]:
    """A router that stays: the double loop then changes nothing but z."""
    model = build_feature_model(torch.float64, dropout=0.4, batch_norm=True)
    balancer = {**ROUTERS["default"], "learning_rate": 0.0, "lower_level": lower_level}
    return over_windows(model, window_data(), whole=False, balancer=balancer, **ADAM)


def diagnosed(looks: bool, stochastic: bool) -> dict[str, Any]:
    """With dropout and BatchNorm, over windows; or with neither, on the data of the equalities."""
    options = {"balancer": ROUTERS["default"], "diagnostics": DIAGNOSTICS if looks else None, **ADAM}
    if stochastic:
        model = build_feature_model(torch.float64, dropout=0.4, batch_norm=True)
        return over_windows(model, window_data(), whole=False, **options)
    data = uneven_data(torch.float64)
    return train(build_feature_model(torch.float64), data, num_train_epochs=1, absent_tasks="skip", **options)


def phases() -> dict[str, Any]:
    with SmallestGap() as gap:
        found = train(
            build_feature_model(torch.float64),
            uneven_data(torch.float64),
            balancer=ROUTERS["default"],
            max_steps=STEPS,
            balancer_warmup_steps=WARMUP,
            balancer_freeze_after=FREEZE_AFTER,
            absent_tasks="skip",
            logging_steps=1,
            **ADAM,
        )
    return {**found, "smallest_gap": gap.value}


def resumed() -> dict[str, Any]:
    """A double loop over windows with phases, dropout and BatchNorm; and the same from each of its checkpoints."""
    settings = {
        "balancer": DOUBLE["features"],
        "max_steps": STEPS,
        "balancer_warmup_steps": WARMUP,
        "balancer_freeze_after": FREEZE_AFTER,
        "diagnostics": DIAGNOSTICS,
        "save_strategy": "steps",
        "save_steps": 5,
        "logging_steps": 3,
        "output_dir": str(folder := shared_folder()),
        **ADAM,
    }

    def run(**more: Any) -> dict[str, Any]:
        model = build_feature_model(torch.float64, dropout=0.4, batch_norm=True)
        return over_windows(model, window_data(), whole=False, **settings, **more)

    return {"whole": run(), **{str(n): run(resume_from=folder / f"checkpoint-{n}") for n in CHECKPOINTS}}


def double_loop_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {"phases": phases, "resumed": resumed}
    for router in DOUBLE:
        found[f"double_trainer/{router}"] = partial(by_trainer, router)
        found[f"double_by_hand/{router}"] = partial(by_hand, router)
        found[f"double_windows/{router}"] = partial(in_windows, router)
    found["poisoned_window"] = poisoned
    for place in (0, 1) if world_size() == 1 else (rank(),):
        found[f"alone/{place}"] = partial(alone, place)
    if world_size() > 1:
        for explicit in (False, True):
            found[f"group/{explicit}"] = partial(in_a_group, explicit)
    for wrapped in (False, True):
        found[f"reevaluated/{wrapped}"] = partial(reevaluated, wrapped)
    found["beside/single"] = partial(beside_training, "single_loop")
    found["beside/double"] = partial(beside_training, {**LOWER_LEVEL, "penalty_weight": 1.0})
    for stochastic in (False, True):
        for looks in (False, True):
            found[f"diagnosed/{stochastic}/{looks}"] = partial(diagnosed, looks, stochastic)
    return found

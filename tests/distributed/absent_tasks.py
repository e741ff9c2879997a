"""Scenarios: `absent_tasks: auto` on batches of one task each, another one on each rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_bilb.balancers.base import LossBalancer
from tests.distributed.models import build_feature_model
from tests.distributed.training import (
    GLOBAL_BATCH,
    STEPS_PER_EPOCH,
    optimizer_settings,
    train,
    train_standalone,
    world_size,
)
from tests.distributed.windows import ROWS, over_windows
from tests.synthetic import TASK_NAMES, SyntheticData, build_data

BILB = {"name": "bilb", "learning_rate": 0.02}
ADAM = optimizer_settings(torch.float64)
#: Every third step a rank has two tasks, in turn the first and the second.
EVERY = 3


def single_task_data(rows: int, block: int) -> SyntheticData:
    """Each `block` of rows holds the labels of one task, drawn at random, the next one those of another."""
    data = build_data(rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    steps = torch.randint(1, len(TASK_NAMES), (rows // block,), generator=generator)
    tasks = (steps.cumsum(dim=0) % len(TASK_NAMES)).repeat_interleave(block)
    own = nn.functional.one_hot(tasks, len(TASK_NAMES)).bool()
    return SyntheticData(data.features, data.labels.masked_fill(~own, torch.nan))


def several_here(step: int) -> bool:
    return step % EVERY == 0


def switching_data() -> SyntheticData:
    per_rank = GLOBAL_BATCH // 2
    data = single_task_data(STEPS_PER_EPOCH * GLOBAL_BATCH, per_rank)
    everything = build_data(STEPS_PER_EPOCH * GLOBAL_BATCH, dtype=torch.float64).labels
    for step in filter(several_here, range(STEPS_PER_EPOCH)):
        row = step * GLOBAL_BATCH + step // EVERY % 2 * per_rank
        missing = data.labels[row].isnan()
        data.labels[row, missing.nonzero()[0]] = everything[row, missing.nonzero()[0]]
    return data


def as_two_ranks_decide(balancer: LossBalancer, step: int) -> None:
    """One process sees the batches of both ranks as one batch of two tasks: it is told what two ranks find out."""
    balancer.absent_tasks = "skip" if several_here(step % STEPS_PER_EPOCH) else "hold"


def switching(absent: str) -> dict[str, Any]:
    told = world_size() == 1 and absent == "auto"
    return train_standalone(
        BILB,
        build_feature_model(torch.float64),
        switching_data(),
        steps=STEPS_PER_EPOCH,
        before_step=as_two_ranks_decide if told else None,
        absent_tasks=absent,
    )


def one_task_each(absent: str, in_windows: bool) -> dict[str, Any]:
    model = build_feature_model(torch.float64)
    if in_windows:
        data = single_task_data(ROWS, block=2)
        return over_windows(model, data, whole=True, balancer=BILB, absent_tasks=absent, **ADAM)
    data = single_task_data(STEPS_PER_EPOCH * GLOBAL_BATCH, GLOBAL_BATCH // 2)
    return train(model, data, balancer=BILB, num_train_epochs=1, absent_tasks=absent, **ADAM)


def absent_task_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for absent in ("auto", "hold", "skip"):
        found[f"switching/{absent}"] = partial(switching, absent)
        # What two ranks do on `auto`, one process is to be told.
        for in_windows in (False, True) if absent == "auto" or world_size() == 1 else ():
            found[f"one_task_each/{absent}/{in_windows}"] = partial(one_task_each, absent, in_windows)
    return found

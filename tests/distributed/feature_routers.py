"""Scenarios: routers that look at the mean features of the global batch, which the model's shared trunk gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_bilb.engine import balancer as balancer_module
from hf_bilb.engine import reduction
from hf_bilb.engine.weighting import Weighting
from hf_bilb.losses.contract import TaskLosses
from tests.distributed.models import HIDDEN, build_feature_model
from tests.distributed.training import SmallestGap, optimizer_settings, train, train_standalone, uneven_data
from tests.synthetic import TASK_NAMES, SyntheticData, build_data

_SHARED = {"name": "bilb", "learning_rate": 0.02}
ROUTERS: dict[str, dict[str, Any]] = {
    "cityscapes": {**_SHARED, "preset": "cityscapes"},
    "nyuv2": {"name": "bilb", "learning_rate": 0.035, "preset": "nyuv2"},
    "default": {**_SHARED, "router": "features"},
    "detached": {**_SHARED, "router": "features", "detach_features": True},
}
NUM_TASKS = {"cityscapes": 2, "nyuv2": 4, "default": 4, "detached": 4}
#: What stands where there are two ranks; none of it changes one process.
ROUTER_SABOTAGE = ["no_feature_gradient", "local_features", "mean_of_means", "local_rows", "no_factor_ranks"]


def router_data(num_tasks: int, dtype: torch.dtype) -> SyntheticData:
    data = uneven_data(dtype)
    return SyntheticData(data.features, data.labels[:, :num_tasks])


def router_equality(router: str, absent: str, dtype: torch.dtype) -> dict[str, Any]:
    num_tasks = NUM_TASKS[router]
    with SmallestGap() as gap:
        result = train(
            build_feature_model(dtype, task_names=TASK_NAMES[:num_tasks]),
            router_data(num_tasks, dtype),
            balancer=ROUTERS[router],
            absent_tasks=absent,
            num_train_epochs=2,
            **optimizer_settings(dtype),
        )
    return {**result, "smallest_gap": gap.value}


def router_standalone(router: str) -> dict[str, Any]:
    num_tasks = NUM_TASKS[router]
    return train_standalone(
        {**ROUTERS[router], "num_features": HIDDEN},
        build_feature_model(torch.float64, task_names=TASK_NAMES[:num_tasks]),
        router_data(num_tasks, torch.float64),
        steps=50,
        first_rank_rows=5,
        absent_tasks="skip",
    )


def router_accumulated() -> dict[str, Any]:
    """A decision for each of two micro-batches, which two ranks have in halves."""
    return train(
        build_feature_model(torch.float64, auxiliary_weight=0.1),
        build_data(44, dtype=torch.float64, missing=0.4),
        balancer=ROUTERS["default"],
        accumulation=2,
        num_train_epochs=3,
        logging_steps=6,
        **optimizer_settings(torch.float64),
    )


def router_repeated(times: int) -> dict[str, Any]:
    """Each micro-batch of four rows `times` times in a window: that changes nothing, whatever the number."""
    data = build_data(80, dtype=torch.float64, missing=0.4)
    blocks = torch.arange(80).view(20, 4).repeat(1, times).flatten()
    return train(
        build_feature_model(torch.float64, auxiliary_weight=0.1),
        SyntheticData(data.features[blocks], data.labels[blocks]),
        balancer=ROUTERS["default"],
        accumulation=times,
        global_batch=4 * times,
        num_train_epochs=1,
        **optimizer_settings(torch.float64),
    )


@contextmanager
def router_sabotaged(kind: str) -> Iterator[None]:
    apply, reduce = balancer_module.LossBalancer.apply, reduction.reduce_losses
    ranks = reduction.data_parallel_size()

    def broken_apply(batch: TaskLosses, weighting: Weighting, share: Any = None) -> Tensor:
        rows = weighting.num_rows.new_tensor(ranks * len(batch.router_features))
        replaced = {
            "no_feature_gradient": {"feature_gradient": None},
            "no_factor_ranks": {"feature_gradient": weighting.feature_gradient / ranks},
            "local_rows": {"num_rows": rows},
        }
        return apply(batch, weighting._replace(**replaced.get(kind, {})), share)

    def broken_reduce(
        micro_batches: Any, with_features: bool = False, group: Any = None, alone: bool = False
    ) -> reduction.GlobalBatch:
        whole = reduce(micro_batches, with_features, group, alone)
        local = micro_batches[0].router_features.detach()
        local = local.sum(dim=0) / max(len(local), 1)
        mean = reduction.all_reduce_sum(local, group) / ranks
        features = {"local_features": local, "mean_of_means": mean}
        return whole._replace(features=features.get(kind, whole.features))

    balancer_module.LossBalancer.apply, reduction.reduce_losses = staticmethod(broken_apply), broken_reduce
    try:
        yield
    finally:
        balancer_module.LossBalancer.apply, reduction.reduce_losses = staticmethod(apply), reduce


def router_sabotage(kind: str) -> dict[str, Any]:
    """To be compared with the scenario `router_standalone` of one process, in which nothing is broken."""
    with router_sabotaged(kind):
        return router_standalone("default")


def feature_router_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {"router_accumulated": router_accumulated}
    for times in (1, 3):
        found[f"router_repeated/{times}"] = partial(router_repeated, times)
    for router in ROUTERS:
        found[f"router_standalone/{router}"] = partial(router_standalone, router)
        for absent, precision in (("skip", "float64"), ("hold", "float32")):
            name = f"router/{router}/{absent}/{precision}"
            found[name] = partial(router_equality, router, absent, getattr(torch, precision))
    if reduction.data_parallel_size() > 1:
        for kind in ROUTER_SABOTAGE:
            found[f"router_sabotage/{kind}"] = partial(router_sabotage, kind)
    return found

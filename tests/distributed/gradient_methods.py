"""Gradient methods on ranks with other heads, and where gradients are aggregated before they are reduced."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from hf_bilb.engine import gradient_balancer
from tests.distributed import scenarios
from tests.distributed.training import optimizer_settings, train, uneven_data, world_size
from tests.synthetic import build_model

PCGRAD = {"name": "pcgrad", "order": "identity"}
#: Kind of model (see `scenarios.HEADS`) and whether DistributedDataParallel looks for unused parameters.
HEADS = [("unused", True), ("unused", False), ("constant", True), ("dropped", False)]
METHODS = ("mgda", "pcgrad", "gradvac")


def heads(kind: str, find_unused: bool) -> dict[str, Any]:
    """Heads whose tasks have labels on one of the ranks only."""
    return train(
        scenarios.build_separate_heads(scenarios.HEADS[kind]),
        scenarios.data_for_dicts(),
        balancer=PCGRAD,
        num_train_epochs=1,
        ddp_find_unused_parameters=find_unused,
        task_loss_func=scenarios.dict_losses if kind == "dropped" else None,
        **optimizer_settings(torch.float64),
    )


def looked_at() -> dict[str, Any]:
    """Rank 0 looks at a loss that rank 1 does not."""
    return train(
        build_model(torch.float64),
        uneven_data(torch.float64),
        trainer_class=scenarios.LookOnOneRank,
        balancer="mgda",
        num_train_epochs=1,
        **optimizer_settings(torch.float64),
    )


def whole(name: str) -> dict[str, Any]:
    return train(
        build_model(torch.float64),
        uneven_data(torch.float64),
        balancer=name,
        num_train_epochs=2,
        **optimizer_settings(torch.float64),
    )


def aggregated_by_rank(name: str) -> dict[str, Any]:
    """Each rank aggregates the gradients of its own rows; DistributedDataParallel averages the results."""
    reduce = gradient_balancer.reduce_gradients
    with patch.object(
        gradient_balancer, "reduce_gradients", lambda running, group, alone: reduce(running, group, True)
    ):
        return whole(name)


def gradient_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {"gradient/looked_at": looked_at}
    for kind, find_unused in HEADS:
        found[f"gradient/heads/{kind}/{find_unused}"] = partial(heads, kind, find_unused)
    for name in METHODS:
        found[f"gradient/whole/{name}"] = partial(whole, name)
        if world_size() > 1:
            found[f"gradient/by_rank/{name}"] = partial(aggregated_by_rank, name)
    return found

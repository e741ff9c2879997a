"""Scenarios: parameters that FSDP2 shards (`backends.py` says how, on CPUs)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from hf_bilb import build_balancer
from hf_bilb.errors import OptionError
from tests.distributed.backends import on_backend
from tests.distributed.double_loop import DIAGNOSTICS, DOUBLE
from tests.distributed.models import build_feature_model
from tests.distributed.training import optimizer_settings, world_size
from tests.distributed.windows import BALANCERS, over_windows, window_data

REFUSED: dict[str, dict[str, Any]] = {
    "lower_level": {"balancer": DOUBLE["parameter"]},
    "diagnostics": {"balancer": BALANCERS["bilb"], "diagnostics": DIAGNOSTICS},
    "gradients": {"balancer": BALANCERS["bilb"], "diagnostics": {"gradients": {}}},
}


def sharded(**settings: Any) -> dict[str, Any]:
    """Two ranks shard the model, one process has it whole."""
    model = build_feature_model(torch.float64, auxiliary_weight=0.1)
    options = {**settings, **optimizer_settings(torch.float64)}
    if world_size() == 1:
        return over_windows(model, window_data(), whole=True, **options)
    with on_backend("fsdp2") as fsdp:
        return over_windows(model, window_data(), whole=True, **fsdp, **options)


def refused(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        return sharded(**settings)
    except OptionError as error:
        return {"error": str(error)}


def refused_by_hand() -> dict[str, Any]:
    balancer = build_balancer(DOUBLE["parameter"], num_tasks=4)
    try:
        balancer.bind(fully_shard(build_feature_model(torch.float32)))
    except OptionError as error:
        return {"error": str(error)}
    return {}


def sharded_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"sharded/{balancer}": partial(sharded, balancer=BALANCERS[balancer]) for balancer in ("features", "nyuv2")
    }
    if world_size() > 1:
        found["sharded_refused/by_hand"] = refused_by_hand
        for key, settings in REFUSED.items():
            found[f"sharded_refused/{key}"] = partial(refused, settings)
    return found

"""Scenarios: parameters that FSDP2 shards. On CPUs accelerate silently takes DistributedDataParallel instead, so its
state is told otherwise here; sharding, gathering and reducing are real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, fully_shard

from hf_bilb import build_balancer
from hf_bilb.errors import OptionError
from tests.distributed.double_loop import DIAGNOSTICS, DOUBLE
from tests.distributed.models import build_feature_model
from tests.distributed.training import optimizer_settings, world_size
from tests.distributed.windows import BALANCERS, over_windows, window_data

CONFIG = {"version": 2, "auto_wrap_policy": "NO_WRAP", "cpu_ram_efficient_loading": False}
REFUSED: dict[str, dict[str, Any]] = {
    "lower_level": {"balancer": DOUBLE["parameter"]},
    "diagnostics": {"balancer": BALANCERS["bilb"], "diagnostics": DIAGNOSTICS},
    "gradients": {"balancer": BALANCERS["bilb"], "diagnostics": {"gradients": {}}},
}


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        AcceleratorState._reset_state()


def sharded(**settings: Any) -> dict[str, Any]:
    """Two ranks shard the model, one process has it whole."""
    model = build_feature_model(torch.float64, auxiliary_weight=0.1)
    options = {**settings, **optimizer_settings(torch.float64)}
    if world_size() == 1:
        return over_windows(model, window_data(), whole=True, **options)
    with fsdp_on_cpu():
        fsdp = {"fsdp": True, "fsdp_config": dict(CONFIG), "wrapper": FSDPModule}
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

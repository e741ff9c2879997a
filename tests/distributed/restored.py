"""Scenarios: models whose names change when they are saved, or that share layers, come back on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from tests.checkpoints.weight_runs import CASES, SAVED, train
from tests.distributed.training import shared_folder, world_size


def restored(name: str) -> dict[str, Any]:
    """States at each evaluation, and of the best model, of a run and of one that goes on from its first checkpoint."""
    whole, seen = train(CASES[name], shared_folder())
    assert isinstance(whole.model_wrapped, DistributedDataParallel) == (world_size() > 1)
    best = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    checkpoint = f"{whole.args.output_dir}/checkpoint-{SAVED}"
    resumed, again = train(CASES[name], shared_folder(), checkpoint)
    return {"states": seen.states, "best": best, "again": again.states, "best_again": resumed.model.state_dict()}


def restored_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    return {f"restored/{name}": partial(restored, name) for name in ("renamed", "branches", "adapters")}

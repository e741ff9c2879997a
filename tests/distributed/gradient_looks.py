"""Scenarios: `diagnostics.gradients` on two ranks and on one process with the whole batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.distributed.models import build_feature_model
from tests.distributed.training import optimizer_settings, rank, shared_folder, train, uneven_data
from tests.distributed.windows import over_windows, window_data

LOOK: dict[str, Any] = {"gradients": {"every_n_steps": 2}}
BALANCERS: dict[str, Any] = {"ls": "ls", "bilb": {"name": "bilb", "learning_rate": 0.02}, "mgda": "mgda"}
ADAM = optimizer_settings(torch.float64)


def compared(balancer: str, over: str, patterns: list[str] | None = None) -> dict[str, Any]:
    """No dropout, no BatchNorm: two ranks are one process with the whole batch, or window."""
    folder = shared_folder()
    settings = {
        "balancer": BALANCERS[balancer],
        "diagnostics": {"gradients": {**LOOK["gradients"], "parameters": patterns}},
        "output_dir": str(folder),
        **ADAM,
    }
    model = build_feature_model(torch.float64)
    if over == "window":
        found = over_windows(model, window_data(), whole=True, **settings)
    else:
        found = train(model, uneven_data(torch.float64), num_train_epochs=1, absent_tasks="skip", **settings)
    lines = (folder / "gradients.jsonl").read_text(encoding="utf-8").splitlines() if rank() == 0 else []
    return {**found, "lines": [json.loads(line) for line in lines]}


def beside_training(balancer: str, looks: bool) -> dict[str, Any]:
    """With dropout and BatchNorm, over windows."""
    model = build_feature_model(torch.float64, dropout=0.4, batch_norm=True)
    diagnostics = LOOK if looks else None
    found = over_windows(
        model, window_data(), whole=False, balancer=BALANCERS[balancer], diagnostics=diagnostics, **ADAM
    )
    return {**found, "drawn": torch.rand(4)}


def gradient_look_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "gradient_looks/ls/batch": partial(compared, "ls", "batch"),
        "gradient_looks/bilb/window": partial(compared, "bilb", "window"),
        "gradient_looks/mgda/batch": partial(compared, "mgda", "batch"),
        "gradient_looks/chosen": partial(compared, "ls", "batch", ["trunk.3.*"]),
    }
    for balancer in BALANCERS:
        for looks in (False, True):
            found[f"gradients_beside/{balancer}/{looks}"] = partial(beside_training, balancer, looks)
    return found

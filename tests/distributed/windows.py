"""Scenarios: `balance_over: window`, F once per update. Two ranks take each window in four micro-batches of two rows,
one process in one batch of sixteen; the last window of an epoch is half as large."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_bilb.engine import balancer as balancer_module
from tests.distributed.models import build_feature_model
from tests.distributed.training import SmallestGap, optimizer_settings, train, world_size
from tests.synthetic import SyntheticData, build_data

WINDOW = 16
ROWS = 6 * WINDOW + WINDOW // 2
MICRO_BATCHES = 4
EPOCHS = 3
UPDATES = 7 * EPOCHS
BALANCERS: dict[str, dict[str, Any]] = {
    "si": {"name": "si"},
    "bilb": {"name": "bilb", "learning_rate": 0.02},
    "features": {"name": "bilb", "learning_rate": 0.02, "router": "features"},
    "nyuv2": {"name": "bilb", "learning_rate": 0.02, "preset": "nyuv2"},
}


def window_data(dtype: torch.dtype = torch.float64) -> SyntheticData:
    data = build_data(ROWS, dtype=dtype, missing=0.4)
    windows = data.labels[: 6 * WINDOW].view(6, WINDOW, -1)
    windows[1, 4:6] = torch.nan  # a rank's micro-batch
    windows[2:5, :, 1] = torch.nan  # a task
    # Micro-batches of one task, the first and the last of a window whose others hold several.
    windows[3, :4, 1:] = torch.nan
    windows[4, -4:, 1:] = torch.nan
    return data


def over_windows(model: nn.Module, data: SyntheticData, *, whole: bool, **settings: Any) -> dict[str, Any]:
    """Train over windows; `whole`: one process takes each in one batch, else in as many micro-batches as two ranks."""
    accumulation = 1 if whole and world_size() == 1 else MICRO_BATCHES
    defaults = {"balance_over": "window", "num_train_epochs": EPOCHS, "logging_steps": 5}
    found = train(model, data, accumulation=accumulation, global_batch=WINDOW, **{**defaults, **settings})
    for entry in found["logs"]:
        # Trainer counts it in micro-batches, which a short window has fewer of.
        entry.pop("epoch")
    return found


@contextmanager
def objective_calls() -> Iterator[list[int]]:
    """How often an objective is evaluated inside, by its closed form or by autograd."""
    calls = [0]
    original = balancer_module.differentiate

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return original(*args)

    balancer_module.differentiate = counted
    try:
        yield calls
    finally:
        balancer_module.differentiate = original


def window_equality(balancer: str, dtype: torch.dtype) -> dict[str, Any]:
    model = build_feature_model(dtype, auxiliary_weight=0.1)
    with SmallestGap() as gap, objective_calls() as calls:
        found = over_windows(
            model,
            window_data(dtype),
            whole=True,
            balancer=BALANCERS[balancer],
            **optimizer_settings(dtype, steep=balancer == "si"),
        )
    has_gap = {} if balancer == "si" else {"smallest_gap": gap.value}
    return {**found, **has_gap, "objective_calls": calls[0], "passes": noted(model.passes)}


def noted(passes: list[tuple[bool, Tensor]]) -> dict[str, Tensor]:
    return {"grad": torch.tensor([grad for grad, _ in passes]), "losses": torch.stack([loss for _, loss in passes])}


def with_dropout() -> dict[str, Any]:
    model = build_feature_model(torch.float64, dropout=0.4, batch_norm=True)
    found = over_windows(
        model, build_data(ROWS, dtype=torch.float64), whole=False, balancer=BALANCERS["features"],
        **optimizer_settings(torch.float64),
    )  # fmt: skip
    return {**found, "passes": noted(model.passes)}


def buffers(balance_over: str) -> dict[str, Any]:
    """Under `ls` both ways to balance are the same, but for the passes that `window` takes."""
    return over_windows(
        build_feature_model(torch.float64, batch_norm=True, dropout=0.4),
        window_data(),
        whole=False,
        balancer="ls",
        balance_over=balance_over,
        **optimizer_settings(torch.float64),
    )


def window_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for balancer in BALANCERS:
        found[f"window/{balancer}/float64"] = partial(window_equality, balancer, torch.float64)
    found["window/features/float32"] = partial(window_equality, "features", torch.float32)
    found["window_dropout"] = with_dropout
    for over in ("micro_batch", "window"):
        found[f"window_buffers/{over}"] = partial(buffers, over)
    return found

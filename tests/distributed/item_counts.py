"""Scenarios: two ranks count the labels of losses that come without counts, or with others than the columns tell. One
process is told the counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_bilb import BilevelMTLTrainer
from hf_bilb.losses.masked import masked_mse
from tests.distributed.training import GLOBAL_BATCH, arguments, optimizer_settings, train, uneven_data, world_size
from tests.synthetic import TASK_NAMES, SyntheticData, build_data, build_model

SETTINGS: dict[str, Any] = {"task_names": TASK_NAMES, "label_names": ["labels"], "absent_tasks": "skip"}
BALANCERS: dict[str, Any] = {"ls": "ls", "bilb": {"name": "bilb", "learning_rate": 0.05}}
EVALUATED = (13, 21)


class Logits(nn.Module):
    """The synthetic model without losses; counts its forward passes without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_model(torch.float64)
        self.looks = 0

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        self.looks += not torch.is_grad_enabled()
        return {"logits": self.inner(features).logits}


def told(outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return masked_mse(outputs["logits"], batch["labels"])


def untold(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Means over the labelled rows, NaN where there is none."""
    there = ~batch["labels"].isnan()
    errors = (outputs["logits"] - batch["labels"].nan_to_num()).square()
    return torch.stack([errors[there[:, k], k].mean() for k in range(there.shape[1])])


def of_coded(outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Missing labels are -1, which no column tells, or NaN."""
    labels = batch["labels"].masked_fill(batch["labels"] == -1, torch.nan)
    return masked_mse(outputs["logits"], labels)


def uncounted(balancer: str, accumulation: int) -> dict[str, Any]:
    return train(
        Logits(),
        uneven_data(torch.float64),
        accumulation=accumulation,
        balancer=BALANCERS[balancer],
        num_train_epochs=1,
        task_loss_func=told if world_size() == 1 else untold,
        **SETTINGS,
        **optimizer_settings(torch.float64),
    )


def coded() -> dict[str, Any]:
    """Labels coded -1 on the second rank alone: both have to look at every window."""
    data = uneven_data(torch.float64)
    if world_size() > 1:
        blocks = data.labels.view(-1, GLOBAL_BATCH // 4, data.labels.shape[1])  # a rank's micro-batches, in turn
        blocks[1::2] = blocks[1::2].nan_to_num(-1.0)
    model = Logits()
    found = train(
        model,
        data,
        accumulation=2,
        balancer="ls",
        num_train_epochs=1,
        task_loss_func=told if world_size() == 1 else of_coded,
        **SETTINGS,
        **optimizer_settings(torch.float64),
    )
    return {**found, "looks": model.looks}


def evaluated(rows: int) -> dict[str, Any]:
    data = build_data(rows, dtype=torch.float64, missing=0.5)
    trainer = BilevelMTLTrainer(
        model=Logits(),
        args=arguments(per_device_eval_batch_size=8 // world_size(), balancer="ls", **SETTINGS),
        eval_dataset=SyntheticData(data.features, data.labels),
        task_loss_func=untold,
    )
    return {"metrics": {k: v for k, v in trainer.evaluate().items() if "loss" in k}}


def item_count_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {"coded": coded}
    for balancer, accumulation in (("bilb", 1), ("ls", 2)):
        found[f"uncounted/{balancer}/{accumulation}"] = partial(uncounted, balancer, accumulation)
    for rows in EVALUATED:
        found[f"evaluated_uncounted/{rows}"] = partial(evaluated, rows)
    return found

"""What is run on every backend: two ranks of it, and one process with the whole batch, which knows no backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.distributed.backends import BACKENDS, gathered, on_backend
from tests.distributed.models import FeatureModel, FeatureOutput, build_feature_model
from tests.distributed.training import SmallestGap, optimizer_settings, train, world_size
from tests.synthetic import SyntheticData, build_data

GLOBAL_BATCH = 16
STEPS_PER_EPOCH = 25
EPOCHS = 2
MICRO_BATCHES = 4


class CastingModel(FeatureModel):
    """Under DeepSpeed the Trainer casts all floating inputs to the precision of its config; this one casts them back."""

    def forward(self, features: Tensor, labels: Tensor) -> FeatureOutput:
        return super().forward(features.to(self.heads.weight.dtype), labels.to(self.heads.weight.dtype))


def labels_of(kind: str) -> SyntheticData:
    """`complete`; `missing`, 40 % of them at random; `sparse`: a row has at most one label, and ranks, micro-batches
    and whole batches go without a task."""
    rows = STEPS_PER_EPOCH * GLOBAL_BATCH
    data = build_data(rows, dtype=torch.float32, missing=0.4 if kind == "missing" else 0.0)
    if kind == "sparse":
        generator = torch.Generator().manual_seed(7)
        only = torch.randint(0, 5, (rows,), generator=generator)  # 4: none at all
        data.labels[torch.arange(4).unsqueeze(0) != only.unsqueeze(1)] = torch.nan
        steps = data.labels.view(STEPS_PER_EPOCH, GLOBAL_BATCH, 4)
        steps[3, ::2, 0] = torch.nan
        steps[5, :, 1] = torch.nan
        steps[:4, :, 3] = torch.nan  # first seen later
        steps[9, :4] = torch.nan
    return data


class Setting(NamedTuple):
    """One cell of the matrix but for the backend."""

    balancer: str
    labels: str
    accumulation: int
    over: str
    precision: str

    def __str__(self) -> str:
        return "/".join(map(str, self))


def precision_of(backend: str) -> str:
    """DeepSpeed holds its own copy of the parameters in float32."""
    return "float32" if backend.startswith("zero") else "float64"


def run(balancer: Mapping[str, Any], setting: Setting, backend: str | None, **settings: Any) -> dict[str, Any]:
    """Train on `backend`, or in one process: over a window that takes the whole batch, else the same micro-batches."""
    dtype = getattr(torch, setting.precision)
    model = build_feature_model(torch.float64, auxiliary_weight=0.1, model_class=CastingModel).to(dtype)
    whole = world_size() == 1 and setting.over == "window"
    options: dict[str, Any] = {
        "balancer": dict(balancer),
        "balance_over": setting.over,
        "accumulation": 1 if whole else setting.accumulation,
        "global_batch": GLOBAL_BATCH,
        "num_train_epochs": EPOCHS,
        "nonfinite_loss": "raise",
        **optimizer_settings(dtype),
        **settings,
    }
    with SmallestGap() as gap:
        if backend is None:
            found = train(model, labels_of(setting.labels), **options)
        else:
            with on_backend(backend) as of_backend:
                found = train(model, labels_of(setting.labels), **options, **of_backend)
    return {**found, "parameters": gathered(model), "smallest_gap": gap.value}

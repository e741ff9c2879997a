"""Training without the library's driver, descent and reduction: F and g differentiated through losses and features by
one backward pass, on whole batches in one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.engine.balancer import LossBalancer
from tests.distributed.models import HIDDEN, FeatureModel
from tests.distributed.training import GLOBAL_BATCH, STEPS_PER_EPOCH
from tests.synthetic import SyntheticData, flat_parameters

Arguments = tuple[Tensor, Tensor, Tensor]


def train_by_autograd(
    options: dict[str, Any], model: FeatureModel, data: SyntheticData, steps: int
) -> tuple[Tensor, Tensor]:
    """Parameters, and z of a double loop, after `steps` of Adam; `options` of `bilb`, absent tasks skipped."""
    num_features = {} if options.get("router") == "parameter" else {"num_features": HIDDEN}
    parts = build_balancer({**options, **num_features}, data.labels.shape[1], dtype=torch.float64)
    own = list(parts.objective.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    of_router = torch.optim.Adam(own, lr=options["learning_rate"])
    at_z = copy.deepcopy(model)
    for step in range(steps):
        start = step % STEPS_PER_EPOCH * GLOBAL_BATCH
        batch = (data.features[start : start + GLOBAL_BATCH], data.labels[start : start + GLOBAL_BATCH])
        optimizer.zero_grad()
        of_router.zero_grad()
        parts.objective(*arguments(parts, model, batch, observe=True)).value.backward()
        optimizer.step()
        if "lower_level" in options:
            correct(parts, at_z, batch, options["lower_level"])
        of_router.step()
    return flat_parameters(model), flat_parameters(at_z)


def correct(parts: LossBalancer, at_z: FeatureModel, batch: tuple[Tensor, Tensor], lower_level: dict[str, Any]) -> None:
    """Descend g in z, and take its gradient there off the router's."""
    own = list(parts.objective.parameters())
    parameters = list(at_z.parameters())
    for _ in range(lower_level["inner_steps"]):
        g = parts.objective.levels(*arguments(parts, at_z, batch)).lower
        with torch.no_grad():
            for z, slope in zip(parameters, torch.autograd.grad(g, parameters), strict=True):
                z -= lower_level["inner_learning_rate"] * slope
    g = parts.objective.levels(*arguments(parts, at_z, batch)).lower
    for parameter, slope in zip(own, torch.autograd.grad(g, own), strict=True):
        parameter.grad -= lower_level["penalty_weight"] * slope


def arguments(
    parts: LossBalancer, model: FeatureModel, batch: tuple[Tensor, Tensor], observe: bool = False
) -> Arguments:
    """What F and g are evaluated at: normalised losses, present tasks, mean features."""
    outputs = model(*batch)
    present = outputs.num_items > 0
    if observe:
        parts.normalization.observe(outputs.losses.detach(), present, parts.normalization.forming())
    losses = parts.normalization(torch.where(present, outputs.losses, 1.0))
    return losses, present, outputs.router_features.mean(dim=0)

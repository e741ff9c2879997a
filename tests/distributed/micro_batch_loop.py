"""What `balance_over: micro_batch` is said to do, in a plain loop without the library's driver: only a method's own
functions (F, its record, P) and the normalization are taken from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.engine.objective import HistoryObjective, ProgressObjective, StepProgress
from tests.distributed.models import HIDDEN, FeatureModel
from tests.synthetic import SyntheticData, flat_parameters

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class MicroBatchLoop:
    """F at each micro-batch; its slopes applied to each task's share of the update's items and, for features and the
    method's own parameters, to the micro-batch's share of all items; one step of either per update, by Adam.

    A record takes in each micro-batch. A method that compares one update with the next takes the last micro-batch of
    the one and the first of the other, and steps its parameters then.
    """

    def __init__(self, options: dict[str, Any], model: FeatureModel, num_tasks: int) -> None:
        looks_at_features = options.get("preset") in ("cityscapes", "nyuv2") or options.get("router") == "features"
        more = {"num_features": HIDDEN} if looks_at_features else {}
        built = build_balancer({**options, **more}, task_names=model.config.task_names, dtype=torch.float64)
        self.model, self.objective, self.normalization = model, built.objective, built.normalization
        self.own = list(self.objective.parameters())
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        self.own_optimizer = None
        if self.own:
            self.own_optimizer = OPTIMIZERS[built.options.optimizer](
                self.own, lr=built.options.learning_rate, weight_decay=self.objective.weight_decay
            )
        self.last_losses = torch.ones(num_tasks, dtype=torch.float64)
        self.last_present: Tensor | None = None

    def update(self, micro_batches: list[tuple[Tensor, Tensor]], epoch: int) -> None:
        items = torch.stack([labels.isfinite().sum(dim=0) for _, labels in micro_batches]).sum(dim=0)
        progress = isinstance(self.objective, ProgressObjective)
        self.optimizer.zero_grad()
        slopes = [torch.zeros_like(parameter) for parameter in self.own]
        for number, batch in enumerate(micro_batches):
            outputs = self.model(*batch)
            present = outputs.num_items > 0
            losses = torch.where(present, outputs.losses.detach(), 1.0)
            self.normalization.observe(losses, present, self.normalization.forming())
            if number == 0 and progress and self.last_present is not None:
                self.follow(losses, present)
            if isinstance(self.objective, HistoryObjective):
                self.objective.observe(self.normalization(losses), outputs.num_items, present, epoch)
            fraction = outputs.num_items.sum() / items.sum()
            for total, slope in zip(slopes, self.micro_batch(outputs, present, losses, items, fraction), strict=True):
                total += fraction * slope
            self.last_losses = torch.where(present, losses, self.last_losses)
        self.optimizer.step()
        if progress:
            self.last_present = present
        else:
            self.step_own(slopes)
        if isinstance(self.objective, HistoryObjective):
            self.objective.end_step()

    def micro_batch(
        self, outputs: Any, present: Tensor, losses: Tensor, items: Tensor, fraction: Tensor
    ) -> list[Tensor]:
        """Add the model's gradient; return dF/dtheta. `items [K]`: of the update."""
        at, features = losses.requires_grad_(), outputs.router_features.mean(dim=0)
        of_features = features.detach().requires_grad_()
        value = self.objective(self.normalization(at), present, of_features).value
        inputs = [at, of_features, *self.own]
        found = torch.autograd.grad(value, inputs, allow_unused=True)
        c, v, *own = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
        at.requires_grad_(False)
        shares = torch.where(present, c, 0.0) * outputs.num_items / items.clamp(min=1)
        connected = torch.where(present, outputs.losses, 0.0)
        ((shares * connected).sum() + fraction * (v * features).sum()).backward()
        return own

    def follow(self, losses: Tensor, present: Tensor) -> None:
        """Step by what has become of the losses since the last update."""
        before = torch.where(self.last_present, self.last_losses, 1.0)
        step = StepProgress(
            self.normalization(before), self.normalization(losses), self.last_present, present & self.last_present
        )
        found = torch.autograd.grad(self.objective.progress(step), self.own, allow_unused=True)
        self.step_own([torch.zeros_like(x) if g is None else g for x, g in zip(self.own, found, strict=True)])

    def step_own(self, slopes: list[Tensor]) -> None:
        if self.own_optimizer is not None:
            for parameter, slope in zip(self.own, slopes, strict=True):
                parameter.grad = slope
            self.own_optimizer.step()


def train_in_parts(
    options: dict[str, Any], model: FeatureModel, data: SyntheticData, *, update: int, parts: int, epochs: int
) -> dict[str, Any]:
    """Parameters of the model and state of the objective after `epochs`, by updates of `update` rows."""
    loop = MicroBatchLoop(options, model, data.labels.shape[1])
    updates = list(zip(data.features.split(update), data.labels.split(update), strict=True))
    for epoch in range(epochs):
        loop.normalization.begin_epoch()
        for features, labels in updates:
            size = update // parts
            loop.update(list(zip(features.split(size), labels.split(size), strict=True)), epoch)
    return {"parameters": flat_parameters(model), "objective": dict(loop.objective.state_dict())}

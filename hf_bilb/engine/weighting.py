"""What is decided for one batch, and what is remembered of the losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_bilb.losses.contract import TaskLosses


class WindowShare(NamedTuple):
    """One micro-batch's part in an accumulation window, in items.

    Attributes:
        local: `[K]`, this rank's items of this micro-batch over the window's items on all ranks.
        everywhere: `[K]`, all ranks' items of this micro-batch over the window's.
        fraction: scalar, the micro-batch's items of all tasks and ranks over the window's.
        rows: scalar, what its rows count where a feature router's features are averaged: `fraction` when the decision
            is the micro-batch's own, one when it is the whole window's.
        num_micro_batches: how many micro-batches the window has.
    """

    local: Tensor
    everywhere: Tensor
    fraction: Tensor
    rows: Tensor
    num_micro_batches: int


class Decision(NamedTuple):
    """What was decided for one (micro-)batch, all detached, identical on every rank.

    Attributes:
        value: F at the global losses (with `task_priors`, the first-order F in which task k counts a_k times).
        losses: `[K]` global losses; zero where absent.
        num_items: `[K]` global counts.
        present: bool `[K]`.
        coefficients: `[K]` what each loss is multiplied with, zero where absent.
        weights: `[K]` or None; discrepancy: scalar or None.
        auxiliary_loss: scalar, mean over ranks.
        feature_gradient: `[D]` dF/dfeatures, or None; num_rows: scalar, rows behind the features.
        valid: bool scalar, False when a loss or a coefficient is not finite, or a loss outside a logarithm's domain.
    """

    value: Tensor
    losses: Tensor
    num_items: Tensor
    present: Tensor
    coefficients: Tensor
    weights: Tensor | None
    discrepancy: Tensor | None
    auxiliary_loss: Tensor
    feature_gradient: Tensor | None
    num_rows: Tensor
    valid: Tensor


def share_of_window(batch: TaskLosses, decision: Decision, num_micro_batches: int) -> WindowShare:
    """A micro-batch's share where the decision is the whole window's, on which F is reported in equal parts."""
    part = torch.ones_like(decision.value) / num_micro_batches
    local = batch.num_items / decision.num_items.clamp(min=1)
    return WindowShare(local, part.expand_as(local), part, torch.ones_like(part), num_micro_batches)


def surrogate_loss(batch: TaskLosses, decision: Decision, ranks: int, share: WindowShare | None = None) -> Tensor:
    """The scalar whose backward pass gives this rank's exact share of the gradient, and whose value is F.

    Args:
        batch: this rank's losses, attached to the graph, and counts.
        decision: on the global batch, or on the whole accumulation window.
        ranks: that share the batch; their gradients are averaged.
        share: the micro-batch's part in an accumulation window; None when the batch is the whole update.
    """
    local = batch.num_items / decision.num_items.clamp(min=1) if share is None else share.local
    coefficients = decision.coefficients if ranks == 1 else ranks * decision.coefficients
    per_feature = decision.feature_gradient
    if per_feature is not None:
        rows = ranks if share is None else ranks * share.rows
        per_feature = per_feature * rows / decision.num_rows.clamp(min=1)
    total = local_share(batch, coefficients * local, per_feature)
    reported = decision.value if share is None else _part_of_window(decision, share)
    if batch.auxiliary_loss is not None:
        parts = 1 if share is None else share.num_micro_batches
        total = total + batch.auxiliary_loss.reshape(()).to(total.dtype) / parts
        reported = reported + decision.auxiliary_loss / parts
    return total + (reported - total.detach())


def _part_of_window(decision: Decision, share: WindowShare) -> Tensor:
    """A micro-batch's part of the window's F; the parts of a method that is linear in the losses add up exactly."""
    of_tasks = (share.everywhere - share.fraction).to(decision.value.dtype)
    return decision.value * share.fraction + torch.dot(decision.coefficients * decision.losses, of_tasks)


def local_share(batch: TaskLosses, per_task: Tensor, per_feature: Tensor | None) -> Tensor:
    """Scalar sum_k w_k l_k + v . sum_b z_b of one batch on one rank, whose gradient is its part of the global one.

    Args:
        batch: losses and router features, attached to the graph.
        per_task: w `[K]`.
        per_feature: v `[D]`, or None when nothing looks at the features.
    """
    # A task without items here may have any value, NaN included: it takes no part, with a zero gradient.
    connected = torch.where(batch.num_items > 0, batch.losses, 0.0)
    share = torch.dot(per_task.to(connected.dtype), connected)
    if per_feature is None or batch.router_features is None:
        return share
    summed = batch.router_features.sum(dim=0, dtype=per_feature.dtype)
    return share + torch.dot(per_feature, summed).to(share.dtype)


class LossMemory(nn.Module):
    """The last known global loss of each task, for `absent_tasks: hold`. State: `last_losses [K]`, `seen [K]`."""

    last_losses: Tensor
    seen: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("last_losses", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_tasks, dtype=torch.bool))

    @torch.no_grad()
    def observe(self, losses: Tensor, present: Tensor) -> None:
        torch.where(present, losses, self.last_losses, out=self.last_losses)
        self.seen.logical_or_(present)

"""What is decided for one batch, the weighting of its tasks, and how it is applied to their losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_bilb.engine.constants import zero
from hf_bilb.engine.objective import Derivatives
from hf_bilb.engine.reduction import GlobalBatch
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import TaskLosses


class WindowShare(NamedTuple):
    """One micro-batch's part in an accumulation window, in items.

    Attributes:
        local: `[K]`, this rank's items of this micro-batch over the window's items on all ranks.
        everywhere: `[K]`, all ranks' items of this micro-batch over the window's.
        fraction: scalar, the micro-batch's items of all tasks and ranks over the window's.
        rows: scalar, what its rows count where a feature router's features are averaged: `fraction` when the weighting
            is the micro-batch's own, one when it is the whole window's.
        num_micro_batches: how many micro-batches the window has.
        number: of this one, from 0.
    """

    local: Tensor
    everywhere: Tensor
    fraction: Tensor
    rows: Tensor
    num_micro_batches: int
    number: int = 0


class Weighting(NamedTuple):
    """What was decided for one (micro-)batch, all detached, identical on every rank.

    Attributes:
        value: F at the global losses (with `task_priors`, the first-order F in which task k counts a_k times).
        losses: `[K]` global losses; zero where absent.
        num_items: `[K]` global counts.
        present: bool `[K]`.
        coefficients: `[K]` what each loss is multiplied with, zero where absent.
        weights: `[K]` or None; discrepancy: scalar or None.
        auxiliary_loss: scalar, mean over ranks; has_auxiliary: whether there is one.
        features: `[D]`, or None; feature_gradient: `[D]` dF/dfeatures; num_rows: scalar, rows behind the features.
        ranks: that share the batch, over which gradients are averaged.
        single: whether it was decided on one micro-batch of one rank.
        forming: bool `[K]`, whose references the losses may have gone into; None where none were formed.
        evidence: scalars that tell whether losses and coefficients can be taken (`LossBalancer.refused` reads them).
    """

    value: Tensor
    losses: Tensor
    num_items: Tensor
    present: Tensor
    coefficients: Tensor
    weights: Tensor | None
    discrepancy: Tensor | None
    auxiliary_loss: Tensor
    has_auxiliary: bool
    features: Tensor | None
    feature_gradient: Tensor | None
    num_rows: Tensor
    ranks: int
    single: bool
    forming: Tensor | None
    evidence: tuple[Tensor, ...]


def evidence_of(total: Tensor, whole: GlobalBatch, positive: Tensor | None) -> tuple[Tensor, ...]:
    """Scalars that prove, in one read and few operations, that all is well with the losses; for `is_proof`.

    Args:
        total: finite only where all losses are.
        positive: `[K]`, what has to be above zero; None: nothing.
    """
    if whole.has_auxiliary or whole.ranks > 1:  # the same on all ranks
        total = total + whole.auxiliary_loss
    if whole.features is not None:
        total = total + whole.features.sum()
    return (total,) if positive is None else (total, positive.amin())


def is_proof(evidence: Sequence[float]) -> bool:
    """Whether the numbers of `evidence_of` prove it. Where they do not, `LossChecks` tells."""
    return math.isfinite(evidence[0]) and all(lowest > 0 for lowest in evidence[1:])


def share_of_window(batch: TaskLosses, weighting: Weighting, num_micro_batches: int, number: int = 0) -> WindowShare:
    """A micro-batch's share where the weighting is the whole window's: F is reported in equal parts."""
    part = torch.ones_like(weighting.value) / num_micro_batches
    local = batch.num_items / weighting.num_items.clamp(min=1)
    return WindowShare(local, part.expand_as(local), part, torch.ones_like(part), num_micro_batches, number)


def surrogate_loss(batch: TaskLosses, weighting: Weighting, share: WindowShare | None = None) -> Tensor:
    """The scalar whose backward pass gives this rank's exact share of the gradient, and whose value is F.

    Args:
        batch: this rank's losses, attached to the graph, and counts.
        weighting: of the global batch, or on the whole accumulation window.
        share: the micro-batch's part in an accumulation window; None when the batch is the whole update.
    """
    found: list[tuple[Tensor, Tensor | None]] = [
        (batch.losses, of_this_rank(weighting.coefficients, batch, weighting, share))
    ]
    per_feature, features = weighting.feature_gradient, batch.router_features
    if per_feature is not None and features is not None:
        rows = weighting.ranks if share is None else weighting.ranks * share.rows
        found.append((features, (per_feature * rows / weighting.num_rows.clamp(min=1)).expand_as(features)))
    return with_gradients(found, batch, weighting, share)


def of_this_rank(coefficients: Tensor, batch: TaskLosses, weighting: Weighting, share: WindowShare | None) -> Tensor:
    """`[K]`: what this rank's losses are multiplied with, whose gradients are averaged over ranks: the coefficients
    times its items of the batch over those of the whole that was decided on."""
    if share is None and weighting.single:  # all of it: a task without items has no coefficient
        return coefficients
    of_all_ranks = coefficients if weighting.ranks == 1 else weighting.ranks * coefficients
    return of_all_ranks * own_share(batch, weighting, share)


def own_share(batch: TaskLosses, weighting: Weighting, share: WindowShare | None) -> Tensor:
    """`[K]`: this rank's items of the batch over those of the whole that was decided on."""
    return batch.num_items / weighting.num_items.clamp(min=1) if share is None else share.local


class _Given(torch.autograd.Function):
    """A value whose backward pass gives each tensor the gradient that was found for it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if any(gradient.is_sparse for gradient in gradients):
            return (None, None, *(gradient * incoming[0].to(gradient.dtype) for gradient in gradients))
        return (None, None, *torch._foreach_mul(gradients, incoming[0])) if gradients else (None, None)


def with_gradients(
    found: Iterable[tuple[Tensor, Tensor | None]], batch: TaskLosses, weighting: Weighting, share: WindowShare | None
) -> Tensor:
    """The scalar F, or the batch's part of it, whose backward pass gives each tensor the gradient of its shape that was
    `found`, times what comes in; an auxiliary loss adds itself.

    So accelerate's scaling, the hooks of DistributedDataParallel and accumulation see an ordinary backward pass.
    """
    value = weighting.value if share is None else _part_of_window(weighting, share)
    pairs = [(tensor, gradient) for tensor, gradient in found if gradient is not None]
    if batch.auxiliary_loss is not None:
        parts = 1 if share is None else share.num_micro_batches
        value = value + weighting.auxiliary_loss / parts
        pairs.append((batch.auxiliary_loss, torch.ones_like(batch.auxiliary_loss) / parts))
    tensors = [tensor for tensor, _ in pairs]
    gradients = [gradient if gradient.dtype == x.dtype else gradient.to(x.dtype) for x, gradient in pairs]
    return _Given.apply(value, gradients, *tensors)


def connected_losses(batch: TaskLosses) -> Tensor:
    """`[K]`, attached to the graph; a task without items here may have any value, NaN included: it takes no part, with
    a zero gradient."""
    return torch.where(batch.num_items > 0, batch.losses, 0.0)


def _part_of_window(weighting: Weighting, share: WindowShare) -> Tensor:
    """A micro-batch's part of the window's F; the parts of a method that is linear in the losses add up exactly."""
    of_tasks = (share.everywhere - share.fraction).to(weighting.value.dtype)
    return weighting.value * share.fraction + torch.dot(weighting.coefficients * weighting.losses, of_tasks)


def local_share(batch: TaskLosses, per_task: Tensor, per_feature: Tensor | None) -> Tensor:
    """Scalar sum_k w_k l_k + v . sum_b z_b of one batch on one rank, whose gradient is its part of the global one.

    Args:
        batch: losses and router features, attached to the graph.
        per_task: w `[K]`.
        per_feature: v `[D]`, or None when nothing looks at the features.
    """
    connected = connected_losses(batch)
    share = torch.dot(per_task.to(connected.dtype), connected)
    if per_feature is None or batch.router_features is None:
        return share
    summed = batch.router_features.sum(dim=0, dtype=per_feature.dtype)
    return share + torch.dot(per_feature, summed).to(share.dtype)


# --- from dF/dl to coefficients ------------------------------------------------------------------------------------

CoefficientScale = Literal["as_defined", "sum_to_one", "sum_to_k"]


class CoefficientRules(nn.Module):
    """Floor, scale and priors of the coefficients. They touch what the model descends, never what the router descends.

    * floor a: c_k >= a * mean |c| over the active tasks, the coefficient of a plain sum with the same total.
    * scale: sum |c| brought to 1 (`sum_to_one`) or to the number of active tasks, as in a plain sum (`sum_to_k`).
    * priors a_k: c_k <- a_k c_k; for `ls` the objective sum a_k l_k, for `si` sum a_k log l_k.

    Active are the tasks that F runs over. Held ones are among them: over the present task of a batch alone, every scale
    and floor would undo the balancing.

    State: `task_priors [K]`.
    """

    task_priors: Tensor

    def __init__(
        self, num_tasks: int, floor: float | None, scale: CoefficientScale, task_priors: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.floor = floor
        self.scale = scale
        self.has_priors = task_priors is not None
        priors = [1.0] * num_tasks if task_priors is None else [float(prior) for prior in task_priors]
        if len(priors) != num_tasks:
            raise OptionError(f"task_priors: got {len(priors)} values, expected one for each of the {num_tasks} tasks")
        if any(not prior >= 0 for prior in priors):
            raise OptionError(f"task_priors: {priors} is not valid, expected numbers >= 0")
        # Not state: the priors are what the user says today, also after a resume.
        self.register_buffer("task_priors", torch.tensor(priors, dtype=torch.float64), persistent=False)

    def weigh(
        self,
        whole: GlobalBatch,
        active: Tensor,
        forming: Tensor | None,
        result: Derivatives,
        known: Tensor,
        positive: Tensor | None = None,
    ) -> tuple[Weighting, Tensor]:
        """The weighting of the global batch, and the coefficients `[K]` of all active tasks, held ones among them.

        Args:
            whole: the global batch. active: bool `[K]`, the tasks that F ran over. result: F and its derivatives.
            forming: as in `Weighting`.
            known: `[K]`, the last known losses, these among them. positive: as in `evidence_of`.
        """
        of_all, value = self.forward(result.coefficients, result.output.value, whole.losses, whole.present, active)
        coefficients = of_all
        if active is not whole.present:
            coefficients = torch.where(whole.present, of_all, zero(of_all.dtype, of_all.device))
        weighting = Weighting(
            value=value,
            losses=whole.losses,
            num_items=whole.num_items,
            present=whole.present,
            coefficients=coefficients,
            weights=result.output.weights,
            discrepancy=result.output.discrepancy,
            auxiliary_loss=whole.auxiliary_loss,
            has_auxiliary=whole.has_auxiliary,
            features=whole.features,
            feature_gradient=result.feature_gradient,
            num_rows=whole.num_rows,
            ranks=whole.ranks,
            single=whole.single,
            forming=forming,
            evidence=evidence_of(torch.dot(known, coefficients), whole, positive),
        )
        return weighting, of_all

    def forward(
        self, coefficients: Tensor, value: Tensor, losses: Tensor, present: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The coefficients `[K]` to apply, of all `active` tasks (zero elsewhere), and the value to report.

        With priors the reported value is F + sum (a_k - 1) c_k l_k over the `present` tasks: F in which task k counts
        a_k times, to first order (exactly sum a_k l_k for `ls`).
        """
        applied = coefficients
        if self.floor is not None:
            count = active.sum()
            floor = self.floor * applied.abs().sum() / count.clamp(min=1)
            applied = torch.where(active, torch.maximum(applied, floor), applied)
        if self.scale != "as_defined":
            total = applied.abs().sum()
            target = 1.0 if self.scale == "sum_to_one" else active.sum()
            applied = applied * torch.where(total > 0, target / total.clamp(min=torch.finfo(total.dtype).tiny), total)
        if self.has_priors:
            value = value + ((self.task_priors - 1) * applied * torch.where(present, losses, 0.0)).sum()
            applied = applied * self.task_priors
        return applied, value

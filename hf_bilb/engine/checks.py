"""Loss checks: which losses a balancer can take, and what is said about those that it cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_bilb.engine.objective import Objective
from hf_bilb.engine.records import Normalization, Phase
from hf_bilb.engine.reduction import GlobalBatch
from hf_bilb.engine.weighting import Weighting, evidence_of, is_proof
from hf_bilb.errors import NonFiniteLossError, TaskLossError
from hf_bilb.losses.contract import TaskLosses

NOT_FINITE_ADVICE = "fix the data or the model, or set nonfinite_loss: skip"


class Losses(Protocol):
    """The losses of a `GlobalBatch` or of a `Weighting`."""

    @property
    def losses(self) -> Tensor: ...

    @property
    def present(self) -> Tensor: ...

    @property
    def auxiliary_loss(self) -> Tensor: ...

    @property
    def features(self) -> Tensor | None: ...


class LossChecks:
    """The checks of one balancer; it has no state.

    Args:
        name: the balancer's.
        objective, normalization: what they take.
        task_names: for messages.
    """

    def __init__(
        self, name: str, objective: Objective, normalization: Normalization, task_names: Sequence[str]
    ) -> None:
        self._name = name
        self._objective = objective
        self._normalization = normalization
        self._task_names = task_names
        self._positive_references = normalization.needs_positive_losses
        self._positive_losses = objective.needs_positive_losses

    def valid(self, whole: Losses, phase: Phase, forming: Tensor | None) -> Tensor:
        """Bool scalar, on the device: whether all losses and features are finite, the losses in the domain of the
        logarithms taken, those that references are `forming` from above zero."""
        losses, present = whole.losses, whole.present
        valid = _is_finite(losses.sum() + whole.auxiliary_loss)
        if phase == "warmup":
            return valid
        if whole.features is not None:
            valid = valid & _is_finite(whole.features.sum())
        if self._positive_references:
            valid = valid & ~self._normalization.outside_domain(losses, present, forming).any()
        if self._positive_losses:
            bounds = self._objective.lower_bounds
            above = losses > (0 if bounds is None else bounds)
            valid = valid & torch.where(present, above, True).all()
        return valid

    def is_valid(self, weighting: Weighting, phase: Phase) -> bool:
        """Whether losses and coefficients are such that the method can take them. A few host reads."""
        # Finite losses can overflow in F: 1 / l of a denormal loss, weights that have all underflowed.
        return bool(self.valid(weighting, phase, weighting.forming) & _is_finite(weighting.coefficients.sum()))

    def check(self, batch: TaskLosses, device: torch.device) -> None:
        """Raise `TaskLossError` for losses on another device, or features that the router cannot take."""
        if batch.losses.device != device:
            raise TaskLossError(
                f"losses: are on {batch.losses.device}, the balancer is on {device}; call balancer.to(device)"
            )
        length = self._objective.num_features
        if length == 0:
            return
        features = batch.router_features
        if features is None:
            raise TaskLossError(
                f"router_features: there are none, expected [B, {length}] for router: features of {self._name!r}"
            )
        if features.ndim != 2 or features.shape[1] != length:
            raise TaskLossError(f"router_features: got shape {tuple(features.shape)}, expected [B, {length}]")
        if features.device != device or not features.is_floating_point():
            got = f"{features.dtype} on {features.device}"
            raise TaskLossError(f"router_features: are {got}, expected floating point numbers on {device}")

    def describe(self, weighting: Weighting, step: int | None = None) -> tuple[str, str, bool]:
        """What is wrong with a weighting that is not `valid`; reads the device.

        Returns:
            one line that names the task, its value and, where known, the step; the task; whether the value is finite
            but none that the method can take (outside the domain of a logarithm, or so small that F overflows).
        """
        where = "" if step is None else f" at step {step}"
        not_finite = self._not_finite(weighting.losses, weighting.present, where)
        if not_finite is not None:
            return not_finite
        if not math.isfinite(float(weighting.auxiliary_loss)):
            return f"the auxiliary loss is {float(weighting.auxiliary_loss)}{where}", "auxiliary_loss", False
        routed = weighting.weights if self._objective.num_features > 0 else None
        if routed is not None and not bool(routed.isfinite().all()):
            weights = routed.tolist()
            return f"the weights are {weights}{where}: router_features are not finite", "router_features", False
        outside = self._outside_domain(weighting.losses, weighting.present, where)
        if outside is not None:
            return outside
        values, coefficients = weighting.losses.tolist(), weighting.coefficients.tolist()
        present = _numbers(weighting.present)
        largest = max(present, key=lambda k: values[k])  # finite numbers whose sum is not
        k = next((k for k in present if not math.isfinite(coefficients[k])), largest)
        found = f"the coefficient of task {self._task_names[k]!r} is {coefficients[k]}{where}"
        return f"{found}: balancer {self._name!r} cannot balance a loss of {values[k]}", self._task_names[k], True

    def check_after(self, whole: GlobalBatch, known: Tensor, where: str) -> bool:
        """Whether the losses after a step of the model are finite; `known [K]` has those of absent tasks. A host read.

        Raises:
            NonFiniteLossError: they are, but none that the method can take.
        """
        positive = None
        if self._positive_losses or self._positive_references:
            bounds = self._objective.lower_bounds
            positive = known if bounds is None else known - bounds
        if is_proof(torch.stack(evidence_of(known.sum(), whole, positive)).tolist()):
            return True
        if bool(self.valid(whole, "balancing", self._normalization.forming())):
            return True
        if self._not_finite(whole.losses, whole.present, where) is None:
            outside = self._outside_domain(whole.losses, whole.present, where)
            if outside is not None:
                raise NonFiniteLossError(outside[0])
        return False

    def _not_finite(self, losses: Tensor, present: Tensor, where: str) -> tuple[str, str, bool] | None:
        values = losses.tolist()
        for k in _numbers(present):
            if not math.isfinite(values[k]):
                name = self._task_names[k]
                return f"the loss of task {name!r} is {values[k]}{where}; {NOT_FINITE_ADVICE}", name, False
        return None

    def _outside_domain(self, losses: Tensor, present: Tensor, where: str) -> tuple[str, str, bool] | None:
        """The loss furthest below what the method can take, where one is."""
        if not (self._positive_losses or self._positive_references):
            return None
        values = losses.tolist()
        given = self._objective.lower_bounds
        bounds = [0.0] * len(values) if given is None else given.tolist()
        k = min(_numbers(present), key=lambda k: values[k] - bounds[k])
        if values[k] > bounds[k]:
            return None
        if given is not None and self._objective.takes_logarithm:
            rule = f"takes the logarithm of its distance to min_losses ({bounds[k]:g})"
            advice = "; set balancer.min_losses to a bound below every loss of the task"
        else:
            causes = {
                "takes logarithms": self._objective.takes_logarithm,
                "divides by the losses": self._objective.divides_by_losses,
                f"has normalization: {self._normalization.kind}": True,
            }
            rule = next(cause for cause, holds in causes.items() if holds)
            advice = ": losses must be > 0"
        found = f"the loss of task {self._task_names[k]!r} is {values[k]}{where}"
        return f"{found}, but balancer {self._name!r} {rule}{advice}", self._task_names[k], True


def _is_finite(total: Tensor) -> Tensor:
    """Bool scalar: whether a sum, and with it each of its terms, is finite (two operations, whatever their number)."""
    return (total - total) == 0


def _numbers(mask: Tensor) -> list[int]:
    return [k for k, here in enumerate(mask.tolist()) if here]

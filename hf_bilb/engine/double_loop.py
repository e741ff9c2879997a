"""The double loop of a method with two levels: a second set z of the model's parameters that descends the lower level.

    z_{n+1} = z_n - beta grad_z g(W, z_n),   n < N        BiLB4MTL (arXiv 2502.08585), Algorithm 2

z is warm-started: it starts at the model's parameters x_0 and is kept from update to update. g is evaluated on the
global batch of the update, with the same dropout masks in every pass; buffers (BatchNorm) and torch's random generators
are as before afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_bilb.engine import reduction
from hf_bilb.engine.objective import BilevelObjective, Derivatives, ObjectiveValue, Scalar
from hf_bilb.engine.optimizer import OwnOptimizer
from hf_bilb.engine.reduction import GlobalBatch
from hf_bilb.engine.replay import (
    MicroBatch,
    bare,
    evaluate,
    same_random_numbers,
    summed_gradients,
    summed_over_ranks,
    unchanged,
    whole_parameters,
)
from hf_bilb.engine.weighting import local_share
from hf_bilb.errors import NonFiniteLossError, OptionError
from hf_bilb.losses.contract import TaskLosses

Slope = Callable[[GlobalBatch], Derivatives]


class LowerLevel:
    """z, and the descent of g in z.

    Args:
        model: the model that the micro-batches run; its trainable parameters are x (with adapters, these alone).

    State: `z`, one more copy of the trainable parameters; `started`, whether it has been set to x. Cost of `descend`: N
    forward and backward passes, one forward pass, N all-reduces of the gradient; with several micro-batches one forward
    pass more for each of the N.

    Raises:
        OptionError: a model whose parameters are sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.given = model
        self.model = bare(model)
        named = whole_parameters(model, "lower_level: a double loop")
        self._names = list(named)
        self._x = list(named.values())
        self.z = [parameter.detach().clone() for parameter in self._x]
        self.started = False

    def start(self) -> None:
        """Set z to x, the first time."""
        if not self.started:
            # Again: since it was bound, the model may have been moved to another device or precision.
            self.z = [x.detach().clone() for x in self._x]
            self.started = True

    def descend(
        self,
        micro_batches: Sequence[MicroBatch],
        slope: Slope,
        inner_steps: int,
        inner_learning_rate: float,
        with_features: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> GlobalBatch:
        """Take N steps of z on the batch; returns the global losses at z_N.

        Args:
            micro_batches: this rank's part of the update; each call runs the model and returns its losses.
            slope: g and its derivatives at global losses.
            inner_steps: N. inner_learning_rate: beta.
            with_features: whether g looks at router features.
        """
        with unchanged(self.given):
            for _ in range(inner_steps):
                with self._at_z():
                    gradients = self._gradient(micro_batches, slope, with_features, group)
                torch._foreach_add_(self.z, gradients, alpha=-inner_learning_rate)
            with self._at_z():
                return reduction.reduce_losses(evaluate(micro_batches, self._x), with_features, group)

    def _gradient(
        self, micro_batches: Sequence[MicroBatch], slope: Slope, with_features: bool, group: dist.ProcessGroup | None
    ) -> list[Tensor]:
        """grad_z g, over all micro-batches and ranks, for each parameter."""
        single = len(micro_batches) == 1
        with torch.enable_grad(), same_random_numbers(self._x):
            parts = [micro_batches[0]()] if single else evaluate(micro_batches, self._x)
        whole = reduction.reduce_losses(parts, with_features, group)
        derivatives = slope(whole)
        per_task = derivatives.coefficients / whole.num_items.clamp(min=1)
        gradient = derivatives.feature_gradient
        per_feature = None if gradient is None else gradient / whole.num_rows.clamp(min=1)

        def share(part: TaskLosses) -> Tensor:
            return local_share(part, per_task * part.num_items, per_feature)

        with torch.enable_grad(), same_random_numbers(self._x):
            again = parts if single else (run() for run in micro_batches)
            (found,) = summed_gradients(self._x, again, [share])
        reached = any(one is not None for one in found)
        if not reached and any(bool(part.num_items.any()) for part in parts):
            raise OptionError(
                "lower_level: the losses of reevaluate() do not depend on the trainable parameters of the bound model, "
                "expected those of that model, with gradients"
            )
        found = summed_over_ranks(found, self._x, group)
        return [torch.zeros_like(z) if one is None else one for one, z in zip(found, self.z, strict=True)]

    @contextmanager
    def _at_z(self) -> Iterator[None]:
        # Exchanging the storages costs nothing, whatever the size. Gradients must be taken inside: the graph refers to
        # the parameters, not to what they hold.
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for i, parameter in enumerate(self._x):
            parameter.data, self.z[i] = self.z[i], parameter.data

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """z by parameter name (copies), and `started`."""
        # Files take no other layout.
        layout = torch.contiguous_format
        state = {
            f"z.{name}": z.detach().clone(memory_format=layout) for name, z in zip(self._names, self.z, strict=True)
        }
        return {"started": torch.tensor(self.started), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`; the entries were checked by the caller."""
        self.started = bool(state["started"])
        for name, z in zip(self._names, self.z, strict=True):
            z.copy_(state[f"z.{name}"])


class LowerLevelReport(NamedTuple):
    """How large the term is that the single loop drops, at one update; scalars on the device, detached.

    Attributes:
        lower_gradient_at_z: ||grad_W g(W, z_N)||, which the single loop leaves out.
        lower_gradient_at_x: ||grad_W g(W, x)||.
        upper_gradient: ||grad_W f(W, x)||, without the factor of f.
        lower_at_x, lower_at_z: g at x and at z_N; their difference is how far x is from the lower level's minimum.
        discrepancy: f at x.
        weights: sigma `[K]`.
        clamped_share: share of the weights that lie at their clamp and have no gradient.
    """

    lower_gradient_at_z: Tensor
    lower_gradient_at_x: Tensor
    upper_gradient: Tensor
    lower_at_x: Tensor
    lower_at_z: Tensor
    discrepancy: Tensor
    weights: Tensor
    clamped_share: Tensor

    @property
    def ratio(self) -> Tensor:
        """r = ||grad_W g(W, z_N)|| / ||grad_W g(W, x)||; the paper's single loop rests on its being small."""
        return self.lower_gradient_at_z / self.lower_gradient_at_x

    @property
    def entropy(self) -> Tensor:
        """Entropy of sigma / sum sigma over log K: 1 for equal weights, 0 when one task has it all."""
        shares = self.weights / self.weights.sum()
        return torch.special.entr(shares).sum() / math.log(max(len(shares), 2))


class LevelProbe:
    """Both levels of a bilevel method at global losses.

    Args:
        objective: the method.
        differentiate_at: differentiates a scalar of the objective's at a global batch.
        task_names: for messages.
    """

    def __init__(
        self,
        objective: BilevelObjective,
        differentiate_at: Callable[[GlobalBatch, Scalar], Derivatives],
        task_names: Sequence[str],
    ) -> None:
        self._objective = objective
        self._differentiate_at = differentiate_at
        self._task_names = task_names

    def lower(self, whole: GlobalBatch) -> Derivatives:
        """g and its derivatives."""
        return self._differentiate_at(whole, self._g)

    def upper(self, whole: GlobalBatch) -> Derivatives:
        """f and its derivatives."""
        return self._differentiate_at(whole, self._f)

    def compare(
        self,
        lower_level: LowerLevel,
        at_x: GlobalBatch | None,
        micro_batches: Sequence[MicroBatch],
        inner_steps: int,
        inner_learning_rate: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[LowerLevelReport, Derivatives]:
        """Descend to z_N; the report, and g's derivatives there. Without the losses `at_x`, z is at x now.

        Raises:
            NonFiniteLossError: z, or x, has a loss that is not finite, or that the normalization cannot take. Cost
                in addition to the descent: a few host reads.
        """
        with_features = self._objective.num_features > 0
        if at_x is None:
            at_x = lower_level.descend(micro_batches, self.lower, 0, 0.0, with_features, group)
        at_z = lower_level.descend(micro_batches, self.lower, inner_steps, inner_learning_rate, with_features, group)
        here, there, upper = self.lower(at_x), self.lower(at_z), self.upper(at_x)
        self._check(at_x, here, "x", inner_learning_rate)
        self._check(at_z, there, "z", inner_learning_rate)
        assert upper.output.weights is not None and upper.output.clamped_share is not None
        report = LowerLevelReport(
            _norm(there), _norm(here), _norm(upper), here.output.value, there.output.value,
            upper.output.value, upper.output.weights, upper.output.clamped_share,
        )  # fmt: skip
        return report, there

    def _check(self, whole: GlobalBatch, lower: Derivatives, place: str, inner_learning_rate: float) -> None:
        present = [k for k, here in enumerate(whole.present.tolist()) if here]
        losses = whole.losses.tolist()
        bad = [k for k in present if not math.isfinite(losses[k])]
        if present and not bad and not bool((lower.output.value + _norm(lower)).isfinite()):
            # Outside the domain of a logarithm, or so large that g overflows.
            smallest = min(present, key=losses.__getitem__)
            bad = [smallest if losses[smallest] <= 0 else max(present, key=losses.__getitem__)]
        if bad:
            advice = f"; an inner_learning_rate below {inner_learning_rate} may help" if place == "z" else ""
            found = f"the loss of task {self._task_names[bad[0]]!r} is {losses[bad[0]]} at {place}"
            raise NonFiniteLossError(f"lower level: {found}, which g cannot take{advice}")

    def _g(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        levels = self._objective.levels(losses, active, features)
        return ObjectiveValue(levels.lower, levels.weights)

    def _f(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        levels = self._objective.levels(losses, active, features)
        return ObjectiveValue(levels.upper, levels.weights, clamped_share=levels.clamped_share)


class InnerLoop:
    """The inner loop of a `BilevelObjective`.

    Args:
        objective: the method.
        differentiate_at: differentiates a scalar of the objective's at a global batch.
        task_names: for messages.
        optimizer: of the objective's parameters.

    Attributes:
        level: z, once a model is bound and the method has a double loop.
        report: what the last update's double loop has seen.
        runs: whether every update has an inner loop.
    """

    def __init__(
        self,
        objective: BilevelObjective,
        differentiate_at: Callable[[GlobalBatch, Scalar], Derivatives],
        task_names: Sequence[str],
        optimizer: OwnOptimizer,
    ) -> None:
        self._objective = objective
        self._optimizer = optimizer
        self._probe = LevelProbe(objective, differentiate_at, task_names)
        self.level: LowerLevel | None = None
        self.report: LowerLevelReport | None = None
        self.runs = objective.inner_steps > 0

    def bind(self, model: nn.Module) -> None:
        """Allocate z; the same model again keeps it."""
        if not self.runs:
            return
        if self.level is None or self.level.model is not bare(model):
            self.level = LowerLevel(model)
        else:
            self.level.given = model  # by now perhaps in a wrapper

    def correct(
        self, at_x: GlobalBatch | None, micro_batches: Sequence[MicroBatch] | None, group: dist.ProcessGroup | None
    ) -> None:
        """Take penalty_weight * grad_W g(W, z_N) off the router's gradient (Algorithm 2)."""
        if self.level is None or micro_batches is None:
            missing = "balancer.bind(model)" if self.level is None else "balancer.step(reevaluate=lambda: model(batch))"
            raise OptionError(f"lower_level: a double loop needs {missing}")
        inner_steps, rate = self._objective.inner_steps, self._objective.inner_learning_rate
        self.report, at_z = self._probe.compare(self.level, at_x, micro_batches, inner_steps, rate, group)
        self._optimizer.subtract(at_z.parameter_gradients, self._objective.penalty_weight)

    def diagnose(
        self,
        model: nn.Module,
        micro_batches: Sequence[MicroBatch],
        inner_steps: int,
        inner_learning_rate: float,
        group: dist.ProcessGroup | None,
    ) -> LowerLevelReport:
        """As `LossBalancer.diagnose_lower_level`."""
        level = LowerLevel(model)
        return self._probe.compare(level, None, micro_batches, inner_steps, inner_learning_rate, group)[0]


def _norm(derivatives: Derivatives) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in derivatives.parameter_gradients]).norm()

"""The driver: from the losses of one batch to the decision what to do, the same for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_bilb.engine import reduction
from hf_bilb.engine.checks import Phase, Validity, is_finite
from hf_bilb.engine.coefficients import CoefficientRules
from hf_bilb.engine.inner_loop import InnerLoop
from hf_bilb.engine.monitor import TOO_LARGE_SQUARED, Guards
from hf_bilb.engine.normalization import Normalization
from hf_bilb.engine.objective import (
    BilevelObjective,
    Derivatives,
    HistoryObjective,
    LookAheadObjective,
    Objective,
    ObjectiveValue,
    ProgressObjective,
    Scalar,
    differentiate,
)
from hf_bilb.engine.optimizer import OwnOptimizer
from hf_bilb.engine.options import BalancerOptions
from hf_bilb.engine.progress import Follower
from hf_bilb.engine.reduction import GlobalBatch
from hf_bilb.engine.state import BalancerState
from hf_bilb.engine.trial_step import LookAhead
from hf_bilb.engine.weighting import Decision, LossMemory
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import TaskLosses

AbsentTasks = Literal["auto", "skip", "hold"]


class BalancerDriver(BalancerState):
    """Builds a balancer's parts and decides on batches; `LossBalancer` is its only subclass."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        options: BalancerOptions,
        task_names: Sequence[str],
        *,
        absent_tasks: AbsentTasks = "auto",
        task_priors: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if absent_tasks not in get_args(AbsentTasks):
            raise OptionError(f'absent_tasks: {absent_tasks!r} is not valid, expected one of "auto", "skip", "hold"')
        self.name = name
        self.options = options
        self.task_names = tuple(task_names)
        self.absent_tasks = absent_tasks
        num_tasks = len(self.task_names)
        self.objective = objective
        self.normalization = Normalization(num_tasks, options.normalization, options.reference, options.power)
        self._memory = LossMemory(num_tasks)
        self._guards = Guards(num_tasks)
        self._validity = Validity(name, objective, self.normalization, self.task_names)
        self._rules = CoefficientRules(num_tasks, options.coefficient_floor, options.coefficient_scale, task_priors)
        self._parts = nn.ModuleDict(
            {
                "objective": self.objective,
                "normalization": self.normalization,
                "memory": self._memory,
                "guards": self._guards,
                "rules": self._rules,
            }
        )
        self.phase: Phase = "balancing"
        self._history = objective if isinstance(objective, HistoryObjective) else None
        self._epoch = -1
        self._last: Decision | None = None
        self._whole: GlobalBatch | None = None
        self._ran_over = self._memory.seen
        self._counted = False
        self._open = False
        self._optimizer = OwnOptimizer(
            dict(objective.named_parameters()), options.optimizer, options.learning_rate, objective.weight_decay
        )
        self._inner: InnerLoop | None = None
        if isinstance(objective, BilevelObjective):
            self._inner = InnerLoop(objective, self._differentiate_at, self.task_names, self._optimizer)
        self._follower: Follower | None = None
        if isinstance(objective, ProgressObjective):
            self._follower = Follower(
                objective,
                num_tasks,
                self.normalization,
                self._optimizer,
                self._validity,
                self._known_losses,
                self._guards,
            )
            if self._follower.progress is not None:
                self._parts["progress"] = self._follower.progress
        self._trials: LookAheadObjective | None = None
        if isinstance(objective, LookAheadObjective) and objective.reevaluate == "look_ahead":
            self._trials = objective
        self._look_ahead: LookAhead | None = None
        self._before_trials: dict[str, Tensor] | None = None
        self._move(device, dtype)

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.task_names)

    @property
    def device(self) -> torch.device:
        """Where the K numbers live."""
        return self._memory.last_losses.device

    @property
    def dtype(self) -> torch.dtype:
        """In which precision F is evaluated."""
        return self._memory.last_losses.dtype

    def _move(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        if dtype is not None and dtype not in (torch.float32, torch.float64):
            raise OptionError(f"dtype: {dtype} is not valid, expected torch.float32 or torch.float64")
        self._parts.to(device=device, dtype=dtype)
        self._optimizer.to(device=device, dtype=dtype)

    def decide(
        self,
        micro_batches: Sequence[TaskLosses],
        process_group: dist.ProcessGroup | None = None,
        alone: bool = False,
    ) -> Decision:
        """Evaluate and differentiate F at the global losses; observe references, keep the router's gradient.

        Args:
            micro_batches: this rank's part of the global batch: one batch, or all micro-batches of a window.
            process_group: the ranks that share it.
            alone: take this rank's batch for the whole one; no all-reduce.

        Cost: one all-reduce; no device synchronisation.
        """
        whole = self._reduce(micro_batches, process_group, alone)
        # A batch that will be refused must leave no trace in the state; gated on the device, without reading the flag.
        valid = self._validity.valid(whole, whole.auxiliary_loss, self.phase)
        active = self._observe(whole, valid)
        result = self._evaluate(whole, active)
        decision, of_all = self._decision(whole, active, valid, result)
        if self.phase != "warmup":
            self._guards.observe(of_all, active, decision.valid, result.output.edge_ratio, result.output.collapsed)
        self._whole, self._ran_over, self._open, self._last = whole, active, True, decision
        self._counted = any(batch.counted for batch in micro_batches)
        return decision

    def _reduce(
        self, micro_batches: Sequence[TaskLosses], group: dist.ProcessGroup | None, alone: bool = False
    ) -> GlobalBatch:
        """The global batch, in the balancer's precision."""
        for batch in micro_batches:
            self._validity.check(batch, self.device)
        whole = reduction.reduce_losses(micro_batches, self.objective.num_features > 0, group, alone)
        return whole._replace(
            losses=whole.losses.to(self.dtype),
            num_items=whole.num_items.to(self.dtype),
            auxiliary_loss=whole.auxiliary_loss.to(self.dtype),
            num_rows=whole.num_rows.to(self.dtype),
        )

    def _decision(
        self, whole: GlobalBatch, active: Tensor, valid: Tensor, result: Derivatives
    ) -> tuple[Decision, Tensor]:
        """What to do on the global batch, and the coefficients `[K]` of all active tasks, held ones among them."""
        of_all, value = self._rules(result.coefficients, result.output.value, whole.losses, whole.present, active)
        coefficients = torch.where(whole.present, of_all, self._rules.zero)
        decision = Decision(
            value=value,
            losses=whole.losses,
            num_items=whole.num_items,
            present=whole.present,
            coefficients=coefficients,
            weights=result.output.weights,
            discrepancy=result.output.discrepancy,
            auxiliary_loss=whole.auxiliary_loss,
            feature_gradient=result.feature_gradient,
            num_rows=whole.num_rows,
            # Finite losses can overflow in F: 1 / l of a denormal loss, weights that have all underflowed.
            valid=valid & is_finite(coefficients.sum()),
        )
        return decision, of_all

    def _observe(self, whole: GlobalBatch, valid: Tensor) -> Tensor:
        """Take the losses in where they are `valid`; returns the tasks that F runs over, bool `[K]`."""
        balancing = self.phase == "balancing"
        self.objective.train(balancing)
        observed = whole.present & valid
        self._memory.observe(whole.losses, observed)
        if self.phase != "warmup":
            # While frozen references stay; a task that has none yet needs one.
            self.normalization.observe(whole.losses, observed, frozen=not balancing)
        active = whole.present if self.phase == "warmup" else self._active(whole)
        if not balancing:
            return active
        if self._lower_level is not None:
            self._lower_level.start()
        if self._follower is not None:
            self._follower.begin(whole, active)
        if self._history is not None:
            self._record(self._history, whole, active & valid & whole.present.any())
        return active

    def _record(self, history: HistoryObjective, whole: GlobalBatch, known: Tensor) -> None:
        """Let a method's record take in the `known` losses, none of them where one is beyond all measure."""
        given = torch.where(known, self._memory.last_losses, self.normalization.one)
        losses = self.normalization(given)
        if self._follower is None:  # what a follower learns is in its own step
            entered = torch.where(known, losses, self._rules.zero)
            usable = torch.dot(given, given) + torch.dot(entered, entered) < TOO_LARGE_SQUARED
            known = known & usable
            self._guards.learn(usable, whole.losses)
        history.observe(losses, whole.num_items, known, self._epoch)

    def _evaluate(self, whole: GlobalBatch, active: Tensor) -> Derivatives:
        """F with its derivatives; the router's gradient is kept for `step`."""
        if self.phase == "warmup":
            ones = whole.present.to(self.dtype)
            return Derivatives(ObjectiveValue(torch.dot(ones, whole.losses)), ones, ())
        # Just observed, where they are valid: those of the present tasks are among them.
        result = self._differentiate_losses(self._memory.last_losses, whole, active, self.objective)
        if self.phase == "balancing":
            self._optimizer.accumulate(result.parameter_gradients, whole.num_items, self._squares(whole))
        return result

    def _differentiate_at(self, whole: GlobalBatch, scalar: Scalar) -> Derivatives:
        return self._differentiate(whole, self._active(whole), scalar)

    def _differentiate(self, whole: GlobalBatch, active: Tensor, scalar: Scalar) -> Derivatives:
        return self._differentiate_losses(self._known_losses(whole), whole, active, scalar)

    def _differentiate_losses(self, losses: Tensor, whole: GlobalBatch, active: Tensor, scalar: Scalar) -> Derivatives:
        features = None if whole.features is None else whole.features.to(self.dtype)
        return differentiate(self.objective, self.normalization, losses, active, features, scalar)

    def _known_losses(self, whole: GlobalBatch) -> Tensor:
        return torch.where(whole.present, whole.losses.to(self.dtype), self._memory.last_losses)

    def _squares(self, whole: GlobalBatch) -> Tensor:
        """The sum of the squares of the losses that F is of, a scalar."""
        losses = self._memory.last_losses if self.absent_tasks == "hold" else whole.losses
        return torch.dot(losses, losses)

    def _active(self, whole: GlobalBatch) -> Tensor:
        """Bool `[K]`, the tasks that F runs over."""
        if self.absent_tasks == "skip":
            return whole.present
        # A loss remembered from the warm-up has no reference yet: it cannot be compared.
        held = self._memory.seen if self.normalization.kind == "none" else self.normalization.seen
        if self.absent_tasks == "hold":
            return held
        # Over a single task f = 0 and sigma l / sigma = l say nothing. The rule knows the global batch alone, so that
        # its split into ranks and micro-batches cannot change what is decided.
        return torch.where(whole.present.sum() == 1, held, whole.present)

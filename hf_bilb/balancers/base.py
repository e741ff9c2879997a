"""The loss balancer: the step on the global batch, its own optimizer, explicit state; the same for every method.

A method supplies its objective F (`hf_bilb.objective.Objective`); `LossBalancer` is final and does the rest. It is no
`nn.Module` on purpose: assigned to a model it would leak into the model's weights, optimizer and gradient clipping.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_bilb import distributed
from hf_bilb.balancers.optimizer import OwnOptimizer
from hf_bilb.balancers.options import BalancerOptions
from hf_bilb.balancers.progress import Follower
from hf_bilb.balancers.reevaluation import Reevaluation, as_micro_batches
from hf_bilb.balancers.state import BalancerState
from hf_bilb.coefficients import CoefficientRules
from hf_bilb.decision import Decision, LossMemory, NonFiniteLossError, WindowShare, surrogate_loss
from hf_bilb.distributed import GlobalBatch
from hf_bilb.guards import Guards
from hf_bilb.lower_level import LevelProbe, LowerLevel, LowerLevelReport, MicroBatch, bare
from hf_bilb.normalization import Normalization
from hf_bilb.objective import (
    BilevelObjective,
    Derivatives,
    HistoryObjective,
    Objective,
    ObjectiveValue,
    ProgressObjective,
    Scalar,
    differentiate,
)
from hf_bilb.options import OptionError
from hf_bilb.task_losses import TaskLosses, as_task_losses
from hf_bilb.validity import Phase, Validity, is_finite

AbsentTasks = Literal["auto", "skip", "hold"]


class LossBalancer(BalancerState):
    """A loss balancer: `backward(losses)` instead of `sum(losses).backward()`, then `step()` after the optimizer's.

    State (all in `state_dict()`, flat tensors): the objective's parameters and buffers, its optimizer's moments, the
    reference losses, the last known losses, the guards' counters, the epoch; in a double loop also z, a copy of the
    model's trainable parameters. Cost: one forward and one backward pass of the model, one all-reduce of 2K + 2
    numbers, K numbers of arithmetic.

    Attributes:
        phase: `warmup`: the plain sum of the losses, nothing is learned or taken as reference; `balancing`; `frozen`:
            the method goes on weighting, its own parameters and references stay. The caller sets it before `backward`.
    """

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
        self._bilevel = objective if isinstance(objective, BilevelObjective) else None
        self._lower_level: LowerLevel | None = None
        self._report: LowerLevelReport | None = None
        self._history = objective if isinstance(objective, HistoryObjective) else None
        self._epoch = -1
        self._last: Decision | None = None
        self._whole: GlobalBatch | None = None
        self._counted = False
        self._open = False
        self._optimizer = OwnOptimizer(
            dict(objective.named_parameters()), options.optimizer, options.learning_rate, objective.weight_decay
        )
        self._follower: Follower | None = None
        if isinstance(objective, ProgressObjective):
            self._follower = Follower(objective, num_tasks, self._differentiate, self._optimizer)
            if self._follower.progress is not None:
                self._parts["progress"] = self._follower.progress
        self.to(device=device, dtype=dtype)

    # --- description ---------------------------------------------------------------------------------------------

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

    @property
    def coefficients(self) -> Tensor | None:
        """The last c = dF/dl `[K]` (on the device), zero for absent tasks; None before the first `backward`."""
        return None if self._last is None else self._last.coefficients

    @property
    def weights(self) -> Tensor | None:
        """The last sigma `[K]`; None before the first `backward` and for methods without weights."""
        return None if self._last is None else self._last.weights

    @property
    def reference_losses(self) -> Tensor:
        """l0 `[K]`, NaN for tasks that have not been seen."""
        references = self.normalization.reference_losses
        return torch.where(self.normalization.seen, references, torch.full_like(references, torch.nan))

    def __repr__(self) -> str:
        return f"LossBalancer({self.name!r}, num_tasks={self.num_tasks}, options={self.options})"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LossBalancer:
        """Move to `device` and change the precision to `dtype` (float32 or float64), in place; returns self."""
        if dtype is not None and dtype not in (torch.float32, torch.float64):
            raise OptionError(f"dtype: {dtype} is not valid, expected torch.float32 or torch.float64")
        self._parts.to(device=device, dtype=dtype)
        self._optimizer.to(device=device, dtype=dtype)
        return self

    @property
    def needs_model(self) -> bool:
        """Whether the method needs `bind(model)` and `step(reevaluate=...)`: a double loop."""
        return self._bilevel is not None and self._bilevel.inner_steps > 0

    @property
    def needs_reevaluation(self) -> bool:
        """Whether the method needs `step(reevaluate=...)`: a double loop, or `reevaluate: same_batch`."""
        return self.needs_model or (self._follower is not None and self._follower.progress is None)

    @property
    def has_levels(self) -> bool:
        """Whether the method has an upper and a lower level, which `diagnose_lower_level` compares."""
        return self._bilevel is not None

    @property
    def lower_level_report(self) -> LowerLevelReport | None:
        """What the last update's double loop has seen; None before, and for other methods."""
        return self._report

    def bind(self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> LossBalancer:
        """Make model and optimizer known; returns self.

        Args:
            model: needed by the double loop, which allocates z, one more copy of its trainable parameters; binding the
                same model again keeps z. `famo` keeps its buffers (BatchNorm) while it runs the batch once more.
            optimizer: needed by `learning_rate: follow_model`.

        Raises:
            OptionError: a double loop on a model whose parameters are sharded.
        """
        if optimizer is not None:
            self._optimizer.follow(optimizer)
        if model is not None and self._follower is not None:
            self._follower.model = model
        if model is not None and self.needs_model:
            lower = self._lower_level
            if lower is None or lower.model is not bare(model):
                self._lower_level = LowerLevel(model)
            else:
                lower.given = model  # by now perhaps in a wrapper
        return self

    # --- a step --------------------------------------------------------------------------------------------------

    def backward(
        self,
        losses: Tensor | Mapping[str, Tensor],
        num_items: Tensor | Mapping[str, Tensor | float] | None = None,
        router_features: Tensor | None = None,
        backward: Callable[[Tensor], object] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """One backward pass through the model, with the coefficients of the global batch; also the router's gradient.

        Args:
            losses: tensor `[K]` or dict of scalars, attached to the graph; see `hf_bilb.task_losses` for the contract.
            num_items: `[K]` or dict, valid items behind each loss; needed when labels can be missing.
            router_features: `[B, D]`, for feature routers.
            backward: called with the scalar to differentiate, for example `accelerator.backward`; default its own.
            process_group: the ranks that share the batch; default the initialised default group, if any.

        Returns:
            F, detached, the same on every rank.

        Raises:
            TaskLossError: shapes or names that do not match.
            NonFiniteLossError: naming the task, before any gradient is written (this reads one flag on the host).
        """
        batch = as_task_losses(losses, num_items, self.task_names, router_features=router_features)
        last = self._last
        # A record, or the method's parameters by a comparison with the last update, has moved before F is known.
        before = None if self._follower is None and self._history is None else self.snapshot()
        surrogate, decision = self.surrogate(batch, process_group)
        if not bool(decision.valid):
            self._last = last
            message = self.describe_invalid(decision)[0]
            self.discard()
            if before is not None:
                self.rollback(before)
            raise NonFiniteLossError(message)
        (torch.Tensor.backward if backward is None else backward)(surrogate)
        return decision.value

    def surrogate(
        self, batch: TaskLosses, process_group: dist.ProcessGroup | None = None, share: WindowShare | None = None
    ) -> tuple[Tensor, Decision]:
        """Decide on this batch and `attach` the decision to it: the scalar to differentiate, and the decision.

        Cost: one all-reduce; no device synchronisation. The router's gradient is kept for `step`.
        """
        decision = self.decide([batch], process_group)
        return self.attach(batch, decision, process_group, share), decision

    def attach(
        self,
        batch: TaskLosses,
        decision: Decision,
        process_group: dist.ProcessGroup | None = None,
        share: WindowShare | None = None,
    ) -> Tensor:
        """The scalar whose backward pass gives this rank's exact share of the gradient, and whose value is F.

        Args:
            batch: this rank's losses and counts.
            decision: on the global batch, or on the whole accumulation window.
            process_group: the ranks that share the batch.
            share: the micro-batch's part in an accumulation window; None when the batch is the whole update.

        Returns:
            the scalar; its value is F plus the auxiliary loss, times the micro-batch's fraction.
        """
        return surrogate_loss(batch, decision, distributed.data_parallel_size(process_group), share)

    def decide(self, micro_batches: Sequence[TaskLosses], process_group: dist.ProcessGroup | None = None) -> Decision:
        """Evaluate and differentiate F at the global losses; observe references, keep the router's gradient.

        Args:
            micro_batches: this rank's part of the global batch: one batch, or all micro-batches of a window.
            process_group: the ranks that share it.

        Cost: one all-reduce; no device synchronisation.
        """
        for batch in micro_batches:
            self._validity.check(batch, self.device)
        whole = distributed.reduce_losses(micro_batches, self.objective.num_features > 0, process_group)
        whole = whole._replace(losses=whole.losses.to(self.dtype), num_items=whole.num_items.to(self.dtype))
        auxiliary, present = whole.auxiliary_loss.to(self.dtype), whole.present
        # A batch that will be refused must leave no trace in the state; gated on the device, without reading the flag.
        valid = self._validity.valid(whole, auxiliary, self.phase)
        self._observe(whole.losses, present & valid)
        active = present if self.phase == "warmup" else self._active(whole)
        if self._follower is not None and self.phase == "balancing":
            self._follower.begin(whole, active)
        if self._history is not None and self.phase == "balancing":
            observed = active & valid & present.any()
            losses = self.normalization(torch.where(observed, self._known_losses(whole), 1.0))
            self._history.observe(losses, whole.num_items, observed, self._epoch)
        result = self._evaluate(whole, active)
        of_all, value = self._rules(result.coefficients, result.output.value, whole.losses, present, active)
        coefficients = torch.where(present, of_all, 0.0)
        # Finite losses can overflow in F: 1 / l of a denormal loss, weights that have all underflowed.
        valid = valid & is_finite(coefficients.sum())
        if self.phase != "warmup":
            self._guards.observe(of_all, active, valid, result.output.edge_ratio, result.output.collapsed)
        self._whole, self._open = whole, True
        self._counted = any(batch.counted for batch in micro_batches)
        self._last = Decision(
            value=value,
            losses=whole.losses,
            num_items=whole.num_items,
            present=present,
            coefficients=coefficients,
            weights=result.output.weights,
            discrepancy=result.output.discrepancy,
            auxiliary_loss=auxiliary,
            feature_gradient=result.feature_gradient,
            num_rows=whole.num_rows.to(self.dtype),
            valid=valid,
        )
        return self._last

    def _observe(self, losses: Tensor, observed: Tensor) -> None:
        self._memory.observe(losses, observed)
        if self.phase == "balancing":
            self.normalization.observe(losses, observed)
            if self._lower_level is not None:
                self._lower_level.start()
        elif self.phase == "frozen":
            # References stay; a task that has none yet needs one.
            self.normalization.observe(losses, observed, frozen=True)

    def _evaluate(self, whole: GlobalBatch, active: Tensor) -> Derivatives:
        """F with its derivatives; the router's gradient is kept for `step`."""
        if self.phase == "warmup":
            ones = whole.present.to(self.dtype)
            return Derivatives(ObjectiveValue(torch.dot(ones, whole.losses)), ones, ())
        result = self._differentiate(whole, active, self.objective)
        if self.phase == "balancing":
            self._optimizer.accumulate(result.parameter_gradients, whole.num_items)
        return result

    def _differentiate_at(self, whole: GlobalBatch, scalar: Scalar) -> Derivatives:
        return self._differentiate(whole, self._active(whole), scalar)

    def _differentiate(self, whole: GlobalBatch, active: Tensor, scalar: Scalar) -> Derivatives:
        losses = self._known_losses(whole)
        features = None if whole.features is None else whole.features.to(self.dtype)
        return differentiate(self.objective, self.normalization, losses, active, features, scalar)

    def _known_losses(self, whole: GlobalBatch) -> Tensor:
        return torch.where(whole.present, whole.losses.to(self.dtype), self._memory.last_losses)

    def _active(self, whole: GlobalBatch) -> Tensor:
        """Bool `[K]`, the tasks that F runs over."""
        if self.absent_tasks == "skip":
            return whole.present
        # A loss remembered from the warm-up has no reference yet: it cannot be compared.
        held = self._memory.seen if self.normalization.kind == "none" else self.normalization.seen
        if self.absent_tasks == "hold":
            return held
        # Batches of one task each: over the present task alone, f = 0 and sigma l / sigma = l say nothing.
        return torch.where(whole.one_task_each, held, whole.present)

    def step(
        self,
        reevaluate: Reevaluation | Sequence[Reevaluation] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Update the balancer's own parameters; call it once per update, after the model optimizer's step.

        Args:
            reevaluate: runs the model on the same batch and returns its losses, attached to the graph: as `backward`
                takes them, or with counts or router features a `TaskLosses`; one, or one for each micro-batch of the
                update. Called only by methods that need it (`needs_reevaluation`): the double loop of `bilb`; `famo`,
                without gradients.
            process_group: the ranks that share the batch.

        Raises:
            RuntimeError: before the first `backward`. Without one since the last step it does nothing.
            OptionError: a double loop without `reevaluate` or without `bind(model)`; `famo` without `reevaluate`.
            NonFiniteLossError: a double loop whose z has diverged.
        """
        if self._last is None:
            raise RuntimeError("balancer.step() needs a balancer.backward(losses) before it")
        if self._follower is not None and self._whole is not None and self._optimizer.has_gradient:
            runs = None if reevaluate is None else self._as_micro_batches(reevaluate)
            active = self._active(self._whole)
            self._follower.end(self._whole, active, self._memory.last_losses, runs, process_group)
        if self.needs_model and self._optimizer.has_gradient:
            self._correct_lower_level(reevaluate, process_group)
        self._optimizer.step()
        if self._history is not None and self._open and self.phase != "warmup":
            self._history.end_update()
        self._open = False

    def _correct_lower_level(
        self, reevaluate: Reevaluation | Sequence[Reevaluation] | None, group: dist.ProcessGroup | None
    ) -> None:
        """Take penalty_weight * grad_W g(W, z_N) off the router's gradient (Algorithm 2)."""
        bilevel, lower = self._bilevel, self._lower_level
        assert bilevel is not None
        if lower is None or reevaluate is None:
            missing = "balancer.bind(model)" if lower is None else "balancer.step(reevaluate=lambda: model(batch))"
            raise OptionError(f"lower_level: a double loop needs {missing}")
        self._report, at_z = LevelProbe(bilevel, self._differentiate_at, self.task_names).compare(
            lower,
            self._whole,
            self._as_micro_batches(reevaluate),
            bilevel.inner_steps,
            bilevel.inner_learning_rate,
            group,
        )
        self._optimizer.subtract(at_z.parameter_gradients, bilevel.penalty_weight)

    def diagnose_lower_level(
        self,
        model: nn.Module,
        reevaluate: Reevaluation | Sequence[Reevaluation],
        inner_steps: int,
        inner_learning_rate: float,
        process_group: dist.ProcessGroup | None = None,
    ) -> LowerLevelReport:
        """Measure the term that the single loop drops: grad_W g(W, z_N) against grad_W g(W, x) and grad_W f(W, x).

        z starts at the model's parameters and takes `inner_steps` of gradient descent on the batch. Nothing changes:
        parameters, gradients, buffers, torch's random generators and the balancer's state are as before.

        Args:
            model: the model that `reevaluate` runs.
            reevaluate: as in `step`.
            inner_steps, inner_learning_rate: N and beta.
            process_group: the ranks that share the batch.

        Raises:
            OptionError: a method without two levels, or a model whose parameters are sharded.
            NonFiniteLossError: z has diverged.

        Cost: N + 2 forward and N backward passes; two temporary copies of the trainable parameters.
        """
        if self._bilevel is None:
            raise OptionError(f"diagnostics: balancer {self.name!r} has no lower level, expected bilb")
        report, _ = LevelProbe(self._bilevel, self._differentiate_at, self.task_names).compare(
            LowerLevel(model),
            None,
            self._as_micro_batches(reevaluate),
            inner_steps,
            inner_learning_rate,
            process_group,
        )
        return report

    def _as_micro_batches(self, runs: Reevaluation | Sequence[Reevaluation]) -> list[MicroBatch]:
        check = functools.partial(self._validity.check, device=self.device)
        return as_micro_batches(runs, self.task_names, self._counted, check)

    def discard(self) -> None:
        """Forget the gradients of the current update (a dropped step)."""
        self._optimizer.discard()
        self._open = False

    def on_epoch_begin(self, epoch: int) -> None:
        """Tell methods that count epochs that epoch number `epoch` (from 0) begins. Calling it twice does nothing, so
        that a run resumed in the middle of an epoch keeps its references."""
        if epoch != self._epoch:
            self._epoch = epoch
            self.normalization.begin_epoch()

    def diagnose(self) -> list[str]:
        """Warnings due since the last call, each kind once: negative coefficients, lambda beyond its edge, collapsed
        weights, one task with over 90 % of the weight. Reads counters on the host: call it when logging."""
        return self._guards.due_messages(self.task_names)

    def describe_invalid(self, decision: Decision, step: int | None = None) -> tuple[str, str, bool]:
        """What is wrong with a decision that is not `valid`, see `Validity.describe`; reads the device."""
        return self._validity.describe(decision, step)

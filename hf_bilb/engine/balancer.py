"""The loss balancer: the step on the global batch, its own optimizer, explicit state; the same for every method.

A method supplies its objective F (`hf_bilb.engine.objective.Objective`); `LossBalancer` is final and does the rest. It
is no `nn.Module` on purpose: assigned to a model it would leak into the model's weights, optimizer and gradient
clipping.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_bilb.engine import reduction
from hf_bilb.engine.checks import LossChecks
from hf_bilb.engine.constants import one, zero
from hf_bilb.engine.double_loop import InnerLoop, LowerLevel, LowerLevelReport
from hf_bilb.engine.monitor import TOO_LARGE_SQUARED, Monitor
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
from hf_bilb.engine.records import AbsentTasks, LossMemory, Normalization, Phase, Records
from hf_bilb.engine.reduction import GlobalBatch
from hf_bilb.engine.replay import MicroBatch, Reevaluation, as_micro_batches
from hf_bilb.engine.trial_step import LookAhead
from hf_bilb.engine.weighting import CoefficientRules, Weighting, WindowShare, is_proof, surrogate_loss
from hf_bilb.errors import NonFiniteLossError, OptionError, TaskLossError
from hf_bilb.losses.contract import TaskLosses, as_task_losses

#: Prefix of z's entries in the state.
LOWER_LEVEL = "lower_level."


class LossBalancer:
    """A loss balancer: `backward(losses)` instead of `sum(losses).backward()`, then `step()` after the optimizer's.

    State (all in `state_dict()`, flat tensors): the objective's parameters and buffers, its optimizer's moments, the
    reference losses, the last known losses, the guards' counters, the epoch; in a double loop also z, a copy of the
    model's trainable parameters. Cost: one forward and one backward pass of the model, one all-reduce of 2K + 1
    numbers, K numbers of arithmetic.

    Attributes:
        phase: `warmup`: the plain sum of the losses, nothing is learned or taken as reference; `balancing`; `frozen`:
            the method goes on weighting, its own parameters and references stay. The caller sets it before `backward`.
    """

    #: What a balancer that looks at the tasks' gradients makes of the derivatives of F; None where it takes these.
    _by_gradients: ClassVar[Callable[..., Derivatives] | None] = None

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
        self._records = Records(self.normalization, self._memory, absent_tasks)
        self._monitor = Monitor(num_tasks, objective.collapsed_below)
        self._checks = LossChecks(name, objective, self.normalization, self.task_names)
        self._rules = CoefficientRules(num_tasks, options.coefficient_floor, options.coefficient_scale, task_priors)
        # The names are those of the state's entries.
        self._parts = nn.ModuleDict(
            {
                "objective": self.objective,
                "normalization": self.normalization,
                "memory": self._memory,
                "guards": self._monitor,
                "rules": self._rules,
            }
        )
        self.phase: Phase = "balancing"
        self._history = objective if isinstance(objective, HistoryObjective) else None
        self._epoch = -1
        self._last: Weighting | None = None
        self._whole: GlobalBatch | None = None
        self._ran_over = self._memory.seen
        self._counted = False
        self._open = False
        self._learns = False  # whether the update under way has anything to teach the method
        #: The records before the first decision that nobody has looked at yet, see `refused`.
        self._kept: dict[str, Tensor] | None = None
        #: What the monitor counts when the update under way ends.
        self._shown: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
        self._optimizer = OwnOptimizer(
            dict(objective.named_parameters()), options.optimizer, options.learning_rate, objective.weight_decay
        )
        self._attach_loops(objective)
        self._say_needs(objective)
        self.to(device, dtype)

    def _attach_loops(self, objective: Objective) -> None:
        """What goes beyond one batch's losses: a double loop, a look at the losses after a step, trial steps."""
        self._inner: InnerLoop | None = None
        if isinstance(objective, BilevelObjective):
            self._inner = InnerLoop(objective, self._differentiate_at, self.task_names, self._optimizer)
        self._follower: Follower | None = None
        if isinstance(objective, ProgressObjective):
            known = self._records.known
            self._follower = Follower(
                objective, self.num_tasks, self.normalization, self._optimizer, self._checks, known, self._monitor
            )
            if self._follower.progress is not None:
                self._parts["progress"] = self._follower.progress
        self._trials: LookAheadObjective | None = None
        if isinstance(objective, LookAheadObjective) and objective.reevaluate == "look_ahead":
            self._trials = objective
        self._look_ahead: LookAhead | None = None
        self._before_trials: dict[str, Tensor] | None = None

    def _say_needs(self, objective: Objective) -> None:
        #: Whether the method needs `bind(model)` and `step(reevaluate=...)` for a double loop.
        self.needs_model = self._inner is not None and self._inner.runs
        same_batch = isinstance(objective, ProgressObjective) and objective.reevaluate == "same_batch"
        #: Whether it needs `step(reevaluate=...)`: a double loop, `famo` by default, `marigold` likewise.
        self.needs_reevaluation = self.needs_model or same_batch
        #: Whether it needs `bind(model, optimizer)` and `look_ahead`: `marigold` with `mode: exact`.
        self.needs_look_ahead = self._trials is not None
        self._looks_at_features = objective.num_features > 0
        self._takes_positive = objective.needs_positive_losses or self.normalization.needs_positive_losses
        self._bounded = objective.lower_bounds is not None
        compares = self._follower is not None and self._follower.progress is not None
        self._begins = self.needs_model or compares or self._history is not None

    # --- description ---------------------------------------------------------------------------------------------

    @property
    def needs_gradients(self) -> bool:
        """Whether `decide` looks at the gradients of the tasks in this step (`GradientBalancer`)."""
        return False

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
    def has_levels(self) -> bool:
        """Whether the method has an upper and a lower level, which `diagnose_lower_level` compares."""
        return self._inner is not None

    @property
    def lower_level_report(self) -> LowerLevelReport | None:
        """What the last update's double loop has seen; None before, and for other methods."""
        return None if self._inner is None else self._inner.report

    def bind(self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> LossBalancer:
        """Make model and optimizer known; returns self.

        Args:
            model: needed by the double loop, which allocates z, one more copy of its trainable parameters; binding the
                same model again keeps z. Methods that run a batch once more keep its buffers (BatchNorm) meanwhile.
            optimizer: needed by `learning_rate: follow_model`; with the model, by `look_ahead`, which steps it: the
                optimizer itself, not a wrapper that skips or scales.

        Raises:
            OptionError: a double loop or a look-ahead on a model whose parameters are sharded.
        """
        if optimizer is not None:
            self._optimizer.follow(optimizer)
        if model is not None and self._follower is not None:
            self._follower.model = model
        if model is not None and self._inner is not None:
            self._inner.bind(model)
        if model is not None and optimizer is not None and self.needs_look_ahead:
            self._look_ahead = LookAhead(model, optimizer)
        return self

    # --- a step --------------------------------------------------------------------------------------------------

    def backward(
        self,
        losses: Tensor | Mapping[str, Tensor],
        num_items: Tensor | Mapping[str, Tensor | float] | None = None,
        router_features: Tensor | None = None,
        backward: Callable[[Tensor], object] | None = None,
        process_group: dist.ProcessGroup | None = None,
        shared_features: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """One backward pass through the model, with the coefficients of the global batch; also the router's gradient.

        Args:
            losses: tensor `[K]` or dict of scalars, attached to the graph; see `hf_bilb.losses.contract` for the
            contract.
            num_items: `[K]` or dict, valid items behind each loss; needed when labels can be missing.
            router_features: `[B, D]`, for feature routers.
            backward: called with the scalar to differentiate, for example `accelerator.backward`; default its own.
            process_group: the ranks that share the batch; default the initialised default group, if any.
            shared_features: what the heads are given, for gradient methods with `gradients: features`.

        Returns:
            F, detached, the same on every rank.

        Raises:
            TaskLossError: shapes or names that do not match.
            NonFiniteLossError: naming the task, before any gradient is written (this reads one flag on the host).
            OptionError: `look_ahead` was not called before, for a method that needs it.
        """
        if self.needs_look_ahead and self.phase == "balancing" and self._before_trials is None:
            raise OptionError(
                "mode: 'exact' needs balancer.look_ahead(lambda: model(batch)) before balancer.backward()"
            )
        batch = as_task_losses(
            losses, num_items, self.task_names, router_features=router_features, shared_features=shared_features
        )
        last, before = self._last, self._before_decision()
        surrogate, weighting = self.surrogate(batch, process_group)
        if self.refused([weighting])[0] is not None:
            self._last = last
            message = self.describe_invalid(weighting)[0]
            self.discard()
            if before:
                self.rollback({**self.snapshot(), **before})
            raise NonFiniteLossError(message)
        (torch.Tensor.backward if backward is None else backward)(surrogate)
        return weighting.value

    def _before_decision(self) -> dict[str, Tensor]:
        """What a decision on losses that turn out to be invalid may have moved, but for the records that all methods
        have: the method's parameters by a comparison with the last update, or its own record."""
        if self._follower is not None and self._follower.progress is not None:
            return self.snapshot()
        return {} if self._history is None else _copies(self.objective.state_dict(prefix="objective."))

    def refused(self, weightings: Sequence[Weighting], *others: Tensor) -> tuple[Weighting | None, list[float]]:
        """Look at what was decided for the update under way: one host read, and more only where something is wrong.

        Args:
            weightings: of its micro-batches.
            others: scalars that are read along.

        Returns:
            the first weighting whose losses or coefficients the method cannot take, None where there is none; `others`.
        """
        evidence = [scalar for weighting in weightings for scalar in weighting.evidence]
        dtype = self.dtype if all(x.dtype == self.dtype for x in others) else torch.float64
        scalars = [*evidence, *(other.to(self.device) for other in others)]
        if dtype != self.dtype:
            scalars = [scalar.to(dtype) for scalar in scalars]
        numbers = torch.stack(scalars).tolist() if len(scalars) > 1 else [float(scalar) for scalar in scalars]
        for weighting in weightings:
            own, numbers = numbers[: len(weighting.evidence)], numbers[len(weighting.evidence) :]
            if not is_proof(own) and not self._checks.is_valid(weighting, self.phase):
                return weighting, numbers
        self._kept = None
        if not self.normalization.settled:
            self._records.settle()  # where the device has been waited for
        return None, numbers

    def decide(
        self,
        micro_batches: Sequence[TaskLosses],
        process_group: dist.ProcessGroup | None = None,
        alone: bool = False,
    ) -> Weighting:
        """Evaluate and differentiate F at the global losses; observe references, keep the router's gradient.

        Args:
            micro_batches: this rank's part of the global batch: one batch, or all micro-batches of a window.
            process_group: the ranks that share it.
            alone: take this rank's batch for the whole one; no all-reduce.

        Cost: one all-reduce; no device synchronisation.
        """
        self._counted = any(batch.counted for batch in micro_batches)
        whole = self._reduce(micro_batches, process_group, alone)
        if self._kept is None:
            self._kept = self._records.entries()  # losses are taken in before anybody has looked at them
        balancing = self.phase == "balancing"
        if self.objective.training != balancing:
            self.objective.train(balancing)
        forming = None if self.phase == "warmup" else self.normalization.forming(frozen=self.phase == "frozen")
        active = self._records.observe(whole, self.phase, forming)
        if balancing and self._begins:
            self._begin(whole, active, forming)
        last = self._memory.last_losses  # those of the present tasks among them
        positive = None
        if self.phase == "warmup":
            result = self._plain_sum(whole)
        else:
            if self._takes_positive:
                bounds = self.objective.lower_bounds if self._bounded else None
                positive = last if bounds is None else last - bounds
            features = self._features(whole) if self._looks_at_features else None
            result = differentiate(self.objective, self.normalization, last, active, features)
            if self._by_gradients is not None:
                result = self._by_gradients(result, whole, active, forming, micro_batches, process_group, alone)
        if balancing:
            # A follower's parameters do not follow dF/dtheta.
            if self._follower is None and result.parameter_gradients:
                losses = last if self.absent_tasks == "hold" else whole.losses  # those that F is of
                self._optimizer.accumulate(result.parameter_gradients, whole.num_items, torch.dot(losses, losses))
            self._learns = True
        weighting, of_all = self._rules.weigh(whole, active, forming, result, last, positive)
        if self.phase != "warmup":
            self._shown.append((of_all, active, result.output.weights, result.output.edge_ratio))
        self._whole, self._ran_over, self._open, self._last = whole, active, True, weighting
        return weighting

    def _reduce(
        self, micro_batches: Sequence[TaskLosses], group: dist.ProcessGroup | None, alone: bool = False
    ) -> GlobalBatch:
        """The global batch, in the balancer's precision."""
        device, dtype = self.device, self.dtype
        for batch in micro_batches:
            if self._looks_at_features or batch.losses.device != device:
                self._checks.check(batch, device)
        whole = reduction.reduce_losses(micro_batches, self._looks_at_features, group, alone)
        if whole.losses.dtype == dtype:
            return whole
        return whole._replace(
            losses=whole.losses.to(dtype),
            num_items=whole.num_items.to(dtype),
            auxiliary_loss=whole.auxiliary_loss.to(dtype),
            num_rows=whole.num_rows.to(dtype),
        )

    def _begin(self, whole: GlobalBatch, active: Tensor, forming: Tensor | None) -> None:
        """What methods that look beyond this batch do before F is evaluated."""
        if self._lower_level is not None:
            self._lower_level.start()
        if self._follower is not None:
            self._follower.begin(whole, active)
        if self._history is not None and self._history.has_record:
            known = active & whole.present.any() if self.absent_tasks == "hold" else active
            if self.normalization.needs_positive_losses:
                known = known & self._checks.valid(whole, self.phase, forming)
            self._record(self._history, whole, known)

    def _record(self, history: HistoryObjective, whole: GlobalBatch, known: Tensor) -> None:
        """Let a method's record take in the `known` losses; none of them where one is none that the method can take, or
        beyond all measure."""
        last = self._memory.last_losses
        placeholder = one(last.dtype, last.device)
        given = torch.where(known, last, placeholder)
        losses = self.normalization(given)
        if self._follower is None:  # what a follower learns is in its own step
            squares = torch.dot(given, given)
            if losses is not given:
                entered = torch.where(known, losses, zero(losses.dtype, losses.device))
                squares = squares + torch.dot(entered, entered)
            usable = squares < TOO_LARGE_SQUARED  # which no NaN is
            if history.needs_positive_losses:
                usable = usable & (losses.amin() > 0)
            known = known & usable
            self._monitor.learn(usable, whole.losses)
            losses = torch.where(known, losses, placeholder)  # finite also where they are not taken in
        history.observe(losses, whole.num_items, known, self._epoch)

    def _plain_sum(self, whole: GlobalBatch) -> Derivatives:
        ones = whole.present.to(self.dtype)
        return Derivatives(ObjectiveValue(torch.dot(ones, whole.losses)), ones, ())

    def _differentiate_at(self, whole: GlobalBatch, scalar: Scalar) -> Derivatives:
        """For the double loop: a scalar of the method's at other losses, with the tasks that are present there."""
        return self._differentiate(self._records.known(whole), whole, self._records.active(whole.present), scalar)

    def _differentiate(self, losses: Tensor, whole: GlobalBatch, active: Tensor, scalar: Scalar) -> Derivatives:
        return differentiate(self.objective, self.normalization, losses, active, self._features(whole), scalar)

    def _features(self, whole: GlobalBatch) -> Tensor | None:
        return None if whole.features is None else whole.features.to(self.dtype)

    def surrogate(
        self, batch: TaskLosses, process_group: dist.ProcessGroup | None = None, share: WindowShare | None = None
    ) -> tuple[Tensor, Weighting]:
        """Decide on this batch and apply the weighting to it (`surrogate_loss`): the scalar to differentiate, and the
        weighting.

        Cost: one all-reduce; no device synchronisation. The router's gradient is kept for `step`.
        """
        weighting = self.decide([batch], process_group)
        return self.apply(batch, weighting, share), weighting

    #: The scalar whose backward pass gives this rank's exact share of the gradient; see `surrogate_loss`.
    apply = staticmethod(surrogate_loss)

    def preview(self, batch: TaskLosses, share: WindowShare | None = None, alone: bool = True) -> Tensor:
        """What `surrogate` would return; the balancer is as before afterwards.

        Args:
            batch, share: as in `surrogate`.
            alone: for this rank's batch alone, without communication, so that one rank may call it without the others.

        Cost: a copy of the state.
        """
        with self._no_trace():
            weighting = self.decide([batch], alone=alone)
            return self.apply(batch, weighting, share)

    @contextmanager
    def _no_trace(self) -> Iterator[None]:
        """Weightings that are taken inside leave nothing behind, whatever is under way."""
        before, last, whole, kept = self.snapshot(), self._last, self._whole, self._kept
        ran_over, counted, is_open, learns = self._ran_over, self._counted, self._open, self._learns
        shown = list(self._shown)
        started = self._lower_level is not None and self._lower_level.started
        try:
            with self._optimizer.accumulation_kept(), self._monitor.lessons_not_counted():
                yield
        finally:
            with self._optimizer.accumulation_kept():
                self.rollback(before)
            self._last, self._whole, self._ran_over, self._kept = last, whole, ran_over, kept
            self._counted, self._open, self._learns, self._shown = counted, is_open, learns, shown
            if self._lower_level is not None:
                self._lower_level.started = started

    def step(
        self,
        reevaluate: Reevaluation | Sequence[Reevaluation] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Update the balancer's own parameters; call it once per update, after the model optimizer's step.

        Args:
            reevaluate: runs the model on the same batch and returns its losses, attached to the graph: as `backward`
                takes them, or with counts or router features a `TaskLosses`; one, or one for each micro-batch of the
                update. Called only by methods that need it (`needs_reevaluation`): the double loop of `bilb`; `famo`
                and `marigold`, without gradients.
            process_group: the ranks that share the batch.

        Raises:
            RuntimeError: before the first `backward`. Without one since the last step it does nothing.
            OptionError: a method that needs `reevaluate` without it, a double loop without `bind(model)`.
            NonFiniteLossError: a double loop whose z has diverged; a loss after the model's step that is finite, but
                none that the method can take.
        """
        if self._last is None:
            raise RuntimeError("balancer.step() needs a balancer.backward(losses) before it")
        if self._follower is not None and self._whole is not None and self._learns:
            runs = None if reevaluate is None else self._as_micro_batches(reevaluate)
            self._follower.end(self._whole, self._ran_over, self._memory.last_losses, runs, process_group)
        if self._inner is not None and self._inner.runs and self._learns:
            runs = None if reevaluate is None else self._as_micro_batches(reevaluate)
            self._inner.correct(self._whole, runs, process_group)
        taken = self._optimizer.step() if self._optimizer.has_gradient else None
        if taken is not None:
            self._monitor.learn(taken, self._last.losses)
        for shown in self._shown:
            self._monitor.observe(*shown)
        self._shown = []
        if self._history is not None and self._open and self.phase != "warmup":
            self._history.end_step()
        self._open, self._learns, self._before_trials, self._kept = False, False, None, None

    def look_ahead(
        self,
        reevaluate: Reevaluation | Sequence[Reevaluation],
        process_group: dist.ProcessGroup | None = None,
        before_step: Callable[[], object] | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Try the model's next step, undo it, and step the balancer's own parameters by what it did to the losses.

        Call it before the forward pass of each update; it does nothing for methods that do not look ahead
        (`needs_look_ahead`), in a warm-up, when frozen, and on losses that `backward` will refuse. Parameters,
        gradients, the optimizer's state, buffers and torch's random generators are as before afterwards.

        Args:
            reevaluate: as in `step`, on the batch that comes next.
            process_group: the ranks that share the batch.
            before_step: what comes between backward pass and step, such as clipping; it finds the trial's gradients.
            loss_scale: of the trial's backward pass, for fp16; its gradients are unscaled.

        Raises:
            OptionError: `bind(model, optimizer)` is missing.
            NonFiniteLossError: a loss after the trial is finite, but none that the method can take.

        Cost: see `LookAhead`; one host read for each trial, and one more.
        """
        if self._trials is None or self.phase != "balancing":
            return
        trial_steps, follower = self._look_ahead, self._follower
        if trial_steps is None or follower is None:
            raise OptionError("mode: 'exact' needs balancer.bind(model, optimizer)")
        before = self._before_trials = self.snapshot()
        runs = self._as_micro_batches(reevaluate)
        learned: dict[str, Tensor] = {}
        try:
            with trial_steps.undone():
                parts = trial_steps.first_pass(runs)
                whole = self._reduce(parts, process_group)
                forming = self.normalization.forming()
                if not bool(self._checks.valid(whole, self.phase, forming)):
                    return
                self.objective.train()
                active = self._records.observe(whole, self.phase, forming)
                if self._begins:
                    self._begin(whole, active, forming)
                known = self._records.known(whole)
                derivatives = [self._differentiate(known, whole, active, trial) for trial in self._trials.trials]
                weightings = [self._rules.weigh(whole, active, forming, one, known)[0] for one in derivatives]
                after = trial_steps.try_steps(parts, runs, weightings, before_step, loss_scale, process_group)
                follower.learn(known, whole.num_items, after, active, " after a trial step")
            learned = {name: x for name, x in self.snapshot().items() if name.startswith(("objective.", "optimizer."))}
        finally:
            # The losses are observed in the pass that counts; an error leaves no trace.
            self.rollback({**before, **learned})

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
        if self._inner is None:
            raise OptionError(f"diagnostics: balancer {self.name!r} has no lower level, expected bilb")
        runs = self._as_micro_batches(reevaluate)
        return self._inner.diagnose(model, runs, inner_steps, inner_learning_rate, process_group)

    def _as_micro_batches(self, runs: Reevaluation | Sequence[Reevaluation]) -> list[MicroBatch]:
        check = functools.partial(self._checks.check, device=self.device)
        return as_micro_batches(runs, self.task_names, self._counted, check)

    # --- state ---------------------------------------------------------------------------------------------------

    @property
    def _lower_level(self) -> LowerLevel | None:
        return None if self._inner is None else self._inner.level

    def snapshot(self) -> dict[str, Tensor]:
        """`state_dict()` without z, which only `step` changes: what an update that is dropped has to bring back."""
        state = _copies(self._parts.state_dict())
        state.update({f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()})
        state["epoch"] = torch.tensor(self._epoch)
        return state

    def rollback(self, snapshot: Mapping[str, Tensor]) -> None:
        """Restore a `snapshot()`."""
        _check_entries(snapshot, self.snapshot())
        self._learns, self._kept, self._shown = False, None, []
        self._epoch = int(snapshot["epoch"])
        prefix = "optimizer."
        own = {name: tensor for name, tensor in entries_without(snapshot, prefix).items() if name != "epoch"}
        self._parts.load_state_dict(own)
        self._optimizer.load_state_dict(entries_below(snapshot, prefix))

    def restart(self, snapshot: Mapping[str, Tensor]) -> None:
        """`rollback` at the start of a run; z will start at the model's parameters."""
        self.rollback(snapshot)
        if self._lower_level is not None:
            self._lower_level.started = False

    def state_dict(self) -> dict[str, Tensor]:
        """All state as a flat dict of tensors (detached copies), between two updates. A double loop's z is in it once
        a model is bound."""
        z = {} if self._lower_level is None else self._lower_level.state_dict()
        return {**self.snapshot(), **{f"{LOWER_LEVEL}{name}": tensor for name, tensor in z.items()}}

    def check_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raise `TaskLossError` when `load_state_dict(state)` would: entries missing, unknown or of another shape."""
        _check_entries(state, self.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`.

        Raises:
            TaskLossError: entries that are missing, unknown or of another shape; nothing is changed then.
        """
        self.check_state_dict(state)
        if self._lower_level is not None:
            self._lower_level.load_state_dict(entries_below(state, LOWER_LEVEL))
        self.rollback(entries_without(state, LOWER_LEVEL))

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Begin with what another run has learned: parameters, moments, references and last losses; the epoch and the
        guards' counters start again, and so does what belonged to another model: z, and losses to compare the next
        with.

        Raises:
            TaskLossError: as `load_state_dict`.
        """
        now = self.snapshot()
        fresh = {name: now[name] for name in now if name == "epoch" or name.startswith(("guards.", "progress."))}
        self.restart({**entries_without(state, LOWER_LEVEL), **fresh})

    def discard(self) -> None:
        """Forget the gradients of the current update (a dropped step), and what its look-ahead has taught; also its
        losses, unless they were looked at and nothing was `refused`."""
        if self._before_trials is not None:
            self.rollback(self._before_trials)
        if self._kept is not None:
            self.rollback({**self.snapshot(), **self._kept})
        self._optimizer.discard()
        self._open, self._learns, self._before_trials, self._kept, self._shown = False, False, None, None, []

    def on_epoch_begin(self, epoch: int) -> None:
        """Tell methods that count epochs that epoch number `epoch` (from 0) begins. Calling it twice does nothing, so
        that a run resumed in the middle of an epoch keeps its references."""
        if epoch != self._epoch:
            self._epoch = epoch
            self.normalization.begin_epoch()

    def unseen_tasks(self) -> list[str]:
        """The tasks that have had no items in any step so far. Reads K flags on the host."""
        return [task for task, seen in zip(self.task_names, self._memory.seen.tolist(), strict=True) if not seen]

    def diagnose(self) -> list[str]:
        """Warnings due since the last call, each kind once: negative coefficients, lambda beyond its edge, collapsed
        weights, one task with over 90 % of the sum of |coefficients|, losses or gradients too large to learn from.
        Reads counters on the host: call it when logging."""
        return self._monitor.due_messages(self.task_names)

    def describe_invalid(self, weighting: Weighting, step: int | None = None) -> tuple[str, str, bool]:
        """What is wrong with a weighting that is not `valid`, see `LossChecks.describe`; reads the device."""
        return self._checks.describe(weighting, step)


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _check_entries(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            what = "is missing" if name not in state else "is unknown"
            raise TaskLossError(
                f"balancer state: entry {name!r} {what}; was it saved by another method or version, or with other "
                "options?"
            )
        if state[name].shape != expected[name].shape:
            got, want = tuple(state[name].shape), tuple(expected[name].shape)
            tasks = len(expected["memory.last_losses"])
            raise TaskLossError(f"balancer state: entry {name!r} has shape {got}, expected {want} for {tasks} tasks")


def entries_below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of `state` under `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def entries_without(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of `state` that are not under `prefix`."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}

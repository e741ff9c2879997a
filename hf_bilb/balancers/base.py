"""The loss balancer: the step on the global batch, its own optimizer, explicit state; the same for every method.

A method supplies its objective F (`hf_bilb.objective.Objective`); `LossBalancer` is final and does the rest. It is no
`nn.Module` on purpose: assigned to a model it would leak into the model's weights, optimizer and gradient clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_bilb import distributed
from hf_bilb.balancers.optimizer import OwnOptimizer
from hf_bilb.balancers.options import BalancerOptions
from hf_bilb.coefficients import CoefficientRules
from hf_bilb.decision import Decision, LossMemory, NonFiniteLossError, WindowShare
from hf_bilb.guards import Guards
from hf_bilb.normalization import Normalization
from hf_bilb.objective import Objective, differentiate
from hf_bilb.options import OptionError
from hf_bilb.task_losses import TaskLossError, TaskLosses, as_task_losses

AbsentTasks = Literal["skip", "hold"]


class LossBalancer:
    """A loss balancer: `backward(losses)` instead of `sum(losses).backward()`, then `step()` after the optimizer's.

    State (all in `state_dict()`, flat tensors): the objective's parameters and buffers, its optimizer's moments, the
    reference losses, the last known losses, the guards' counters, the epoch. Cost: one forward and one backward pass of
    the model, one all-reduce of 2K + 1 numbers, K numbers of arithmetic.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        options: BalancerOptions,
        task_names: Sequence[str],
        *,
        absent_tasks: AbsentTasks = "skip",
        task_priors: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if absent_tasks not in ("skip", "hold"):
            raise OptionError(f'absent_tasks: {absent_tasks!r} is not valid, expected one of "skip", "hold"')
        self.name = name
        self.options = options
        self.task_names = tuple(task_names)
        self.absent_tasks = absent_tasks
        num_tasks = len(self.task_names)
        self.objective = objective
        self.normalization = Normalization(num_tasks, options.normalization, options.reference, options.power)
        self._memory = LossMemory(num_tasks)
        self._guards = Guards(num_tasks)
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
        self._epoch = -1
        self._last: Decision | None = None
        self._optimizer = OwnOptimizer(dict(objective.named_parameters()), options.optimizer, options.learning_rate)
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

    def bind(self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> LossBalancer:
        """Make model and optimizer known, which `learning_rate: follow_model` needs; returns self."""
        if optimizer is not None:
            self._optimizer.follow(optimizer)
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
        surrogate, decision = self.surrogate(batch, process_group)
        if not bool(decision.valid):
            self._last = last
            self._optimizer.discard()
            raise NonFiniteLossError(self.describe_invalid(decision)[0])
        (torch.Tensor.backward if backward is None else backward)(surrogate)
        return decision.value

    def surrogate(
        self, batch: TaskLosses, process_group: dist.ProcessGroup | None = None, share: WindowShare | None = None
    ) -> tuple[Tensor, Decision]:
        """The scalar whose backward pass gives this rank's exact share of the gradient, and whose value is F.

        Args:
            batch: this rank's losses and counts.
            process_group: the ranks that share the batch.
            share: the micro-batch's part in an accumulation window; None when the batch is the whole update.

        Returns:
            the scalar (value: F plus the auxiliary loss, times the micro-batch's fraction) and the decision.

        Cost: one all-reduce; no device synchronisation. The router's gradient is kept for `step`.
        """
        self._check_device(batch.losses)
        losses, num_items, auxiliary = distributed.reduce_losses(
            batch.losses, batch.num_items, batch.auxiliary_loss, process_group
        )
        decision = self.decide(losses, num_items, auxiliary)
        ranks = distributed.data_parallel_size(process_group)
        local = batch.num_items / num_items.clamp(min=1) if share is None else share.local
        # A task without items here may have any value, NaN included: it takes no part, with a zero gradient.
        connected = torch.where(batch.num_items > 0, batch.losses, 0.0)
        total = torch.dot((ranks * decision.coefficients * local).to(connected.dtype), connected)
        reported = decision.value if share is None else self._part_of_window(decision, share)
        if batch.auxiliary_loss is not None:
            parts = 1 if share is None else share.num_micro_batches
            total = total + batch.auxiliary_loss.reshape(()).to(total.dtype) / parts
            reported = reported + decision.auxiliary_loss / parts
        return total + (reported - total.detach()), decision

    def _part_of_window(self, decision: Decision, share: WindowShare) -> Tensor:
        """A micro-batch's part of the window's F; the parts of a method that is linear in the losses add up exactly."""
        of_tasks = (share.everywhere - share.fraction).to(self.dtype)
        return decision.value * share.fraction + torch.dot(decision.coefficients * decision.losses, of_tasks)

    def decide(self, losses: Tensor, num_items: Tensor, auxiliary_loss: Tensor | None = None) -> Decision:
        """Evaluate and differentiate F at the global losses; observe references, keep the router's gradient.

        Args:
            losses: `[K]` global losses.
            num_items: `[K]` global counts; zero = absent.
            auxiliary_loss: scalar, for the record.
        """
        losses, num_items = losses.detach().to(self.dtype), num_items.detach().to(self.dtype)
        present = num_items > 0
        auxiliary = losses.new_zeros(()) if auxiliary_loss is None else auxiliary_loss.detach().to(self.dtype)
        # A batch that will be refused must leave no trace in the state; gated on the device, without reading the flag.
        valid = self._valid(losses, present, auxiliary)
        observed = present & valid
        self.normalization.observe(losses, observed)
        self._memory.observe(losses, observed)
        active, point = present, losses
        if self.absent_tasks == "hold":
            active, point = self._memory.seen.clone(), self._memory.last_losses
        result = differentiate(self.objective, self.normalization, point, active)
        self._optimizer.accumulate(result.parameter_gradients, num_items)
        coefficients, value = self._rules(result.coefficients, result.output.value, losses, present)
        # Finite losses can overflow in F: 1 / l of a denormal loss, weights that have all underflowed.
        valid = valid & _is_finite(coefficients.sum())
        self._guards.observe(coefficients, present, valid, result.output.edge_ratio, result.output.collapsed)
        self._last = Decision(
            value=value,
            losses=losses,
            num_items=num_items,
            present=present,
            coefficients=coefficients,
            weights=result.output.weights,
            discrepancy=result.output.discrepancy,
            auxiliary_loss=auxiliary,
            valid=valid,
        )
        return self._last

    def step(self, reevaluate: Callable[[], object] | None = None) -> None:
        """Update the balancer's own parameters; call it once per update, after the model optimizer's step.

        Args:
            reevaluate: returns the losses at the new parameters, on the same batch; called only by methods that need a
                second forward pass (none of `ls`, `si`, `uw`, `bilb` does).

        Raises:
            RuntimeError: before the first `backward`. Without one since the last step it does nothing.
        """
        if self._last is None:
            raise RuntimeError("balancer.step() needs a balancer.backward(losses) before it")
        self._optimizer.step()

    def discard(self) -> None:
        """Forget the gradients of the current update (a dropped step)."""
        self._optimizer.discard()

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

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All state as a flat dict of tensors (detached copies), between two updates."""
        state = {name: tensor.detach().clone() for name, tensor in self._parts.state_dict().items()}
        state.update({f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()})
        state["epoch"] = torch.tensor(self._epoch)
        return state

    def check_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raise `TaskLossError` when `load_state_dict(state)` would: entries missing, unknown or of another shape."""
        expected = self.state_dict()
        for name in sorted(expected.keys() | state.keys()):
            if name not in state or name not in expected:
                what = "is missing" if name not in state else "is unknown"
                raise TaskLossError(
                    f"balancer state: entry {name!r} {what}; was it saved by another method or version?"
                )
            if state[name].shape != expected[name].shape:
                got, want = tuple(state[name].shape), tuple(expected[name].shape)
                raise TaskLossError(
                    f"balancer state: entry {name!r} has shape {got}, expected {want} for {self.num_tasks} tasks"
                )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`.

        Raises:
            TaskLossError: entries that are missing, unknown or of another shape; nothing is changed then.
        """
        self.check_state_dict(state)
        self._epoch = int(state["epoch"])
        prefix = "optimizer."
        own = {name: tensor for name, tensor in state.items() if name != "epoch" and not name.startswith(prefix)}
        self._parts.load_state_dict(own)
        self._optimizer.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})

    # --- checks --------------------------------------------------------------------------------------------------

    def _valid(self, losses: Tensor, present: Tensor, auxiliary: Tensor) -> Tensor:
        """Bool scalar, on the device: whether all losses are finite and in the domain of the logarithms taken."""
        valid = _is_finite(losses.sum() + auxiliary)
        if self.normalization.needs_positive_losses:
            valid = valid & ~self.normalization.outside_domain(losses, present).any()
        if self.objective.takes_logarithm:
            valid = valid & torch.where(present, losses > 0, True).all()
        return valid

    def _check_device(self, losses: Tensor) -> None:
        if losses.device != self.device:
            raise TaskLossError(
                f"losses: are on {losses.device}, the balancer is on {self.device}; call balancer.to(device)"
            )

    def describe_invalid(self, decision: Decision, step: int | None = None) -> tuple[str, str, bool]:
        """What is wrong with a decision that is not `valid`; reads the device.

        Returns:
            one line that names the task, its value and, where known, the step; the task; whether the value is finite
            but none that the method can take (outside the domain of a logarithm, or so small that F overflows).
        """
        where = "" if step is None else f" at step {step}"
        values = decision.losses.tolist()
        present = [k for k, here in enumerate(decision.present.tolist()) if here]
        for k in present:
            if not math.isfinite(values[k]):
                name = self.task_names[k]
                advice = "fix the data or the model, or set nonfinite_loss: skip"
                return f"the loss of task {name!r} is {values[k]}{where}; {advice}", name, False
        if not math.isfinite(float(decision.auxiliary_loss)):
            return f"the auxiliary loss is {float(decision.auxiliary_loss)}{where}", "auxiliary_loss", False
        k = min(present, key=lambda k: values[k])
        if values[k] > 0 or not (self.objective.takes_logarithm or self.normalization.needs_positive_losses):
            coefficients = decision.coefficients.tolist()
            largest = max(present, key=lambda k: values[k])  # finite numbers whose sum is not
            k = next((k for k in present if not math.isfinite(coefficients[k])), largest)
            found = f"the coefficient of task {self.task_names[k]!r} is {coefficients[k]}{where}"
            return f"{found}: balancer {self.name!r} cannot balance a loss of {values[k]}", self.task_names[k], True
        normalization = f"has normalization: {self.options.normalization}"
        cause = "takes logarithms" if self.objective.takes_logarithm else normalization
        rule = f"but balancer {self.name!r} {cause}: losses must be > 0"
        return f"the loss of task {self.task_names[k]!r} is {values[k]}{where}, {rule}", self.task_names[k], True


def _is_finite(total: Tensor) -> Tensor:
    """Bool scalar: whether a sum, and with it each of its terms, is finite (two operations, whatever their number)."""
    return (total - total) == 0

"""The balancer of gradient methods: the weighting comes from the tasks' gradients, not from dF/dl.

Everything else is that of `LossBalancer`: the global losses, their normalization, absent tasks, warm-up and freezing,
floor, scale and priors of the coefficients, state. A step without accumulation takes three things: the Jacobian of the
shared parameters, K backward passes; the decision on K x K numbers, on the CPU; and the gradients of the parameters of
one task alone, one pass through the heads. The shared parameters get J^T c, for which nothing is run again.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from hf_bilb.engine.balancer import LossBalancer, entries_below, entries_without
from hf_bilb.engine.constants import zero
from hf_bilb.engine.gradient_method import GradientMethod, GradientOptions, GramianMethod, JacobianMethod
from hf_bilb.engine.objective import Derivatives
from hf_bilb.engine.reduction import GlobalBatch, all_reduce_sum
from hf_bilb.engine.task_gradients import (
    GlobalGradients,
    Rows,
    RunningGradients,
    SharedParameters,
    reduce_gradients,
)
from hf_bilb.engine.weighting import (
    Weighting,
    WindowShare,
    evidence_of,
    is_proof,
    of_this_rank,
    surrogate_loss,
    with_gradients,
)
from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.contract import TaskLosses

#: Prefix of the shared parameters' entries in the state.
SHARED_PARAMETERS = "shared_parameters."


class GradientMemory(nn.Module):
    """What is remembered between two steps that look at the gradients.

    State: `weights [K]`, the last ones found; `known [K]`, whether there are any; `gramian [K, K]`, its last known
    entries, for `absent_tasks: hold`; `steps`, how many there have been, on the host.
    """

    weights: Tensor
    known: Tensor
    gramian: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("known", torch.zeros(num_tasks, dtype=torch.bool))
        self.register_buffer("gramian", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))
        self.steps = 0

    def remember(self, tasks: Tensor, weights: Tensor) -> None:
        """Keep the `weights [A]` of the `tasks [A]`."""
        if len(tasks) == len(self.weights):
            self.weights.copy_(weights)
            self.known.fill_(True)
            return
        at = tasks.to(self.weights.device)
        self.weights.index_copy_(0, at, weights.to(self.weights))
        self.known.index_fill_(0, at, True)

    def last_weights(self) -> Tensor:
        """The last weights `[K]`; a task that has none yet gets the mean of the others'."""
        mean = torch.where(self.known, self.weights, 0.0).sum() / self.known.sum().clamp(min=1)
        return torch.where(self.known, self.weights, torch.where(self.known.any(), mean, 1.0))

    def get_extra_state(self) -> Tensor:
        """The number of steps, as a part of the state."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the number of steps."""
        self.steps = int(state)


class Found(NamedTuple):
    """What was found with a decision, for applying it.

    Attributes:
        gradients: of the global batch; None in a step between two looks at them.
        direction: by parameter `[n]`, of a `JacobianMethod`.
        slopes: dF/dl `[K]`, what the heads descend under `heads: sum`.
        single: whether the decision is on one micro-batch, whose J is that of the whole decision.
    """

    gradients: GlobalGradients | None
    direction: list[Tensor] | None
    slopes: Tensor
    single: bool


class OnHost(NamedTuple):
    """What a decision rests on, read from the device at once.

    Attributes:
        gramian: `[K, K]`, float64. slopes: dF/dl, of each task. losses: of each task, normalised.
        active, present: of each task, the tasks that F runs over, and those with a loss in this step.
        valid: whether the losses are such that the method can take them.
    """

    gramian: Tensor
    slopes: list[float]
    losses: list[float]
    active: list[bool]
    present: list[bool]
    valid: bool


class GradientBalancer(LossBalancer):
    """A balancer whose weights come from the gradients of the tasks. `bind(model)` lets it know the parameters.

    Without `bind`, on one process, the parameters are those that the graph of the losses leads to.

    State: in addition to that of `LossBalancer` the last weights, the last Gramian, and, once a model is bound, two
    bytes for each of its trainable parameters' entries. Cost of a step that looks at the gradients: K backward passes
    through the shared part and the heads, K d numbers of memory, an all-reduce of K d numbers; with `gradients:
    features` K passes through the heads, one ordinary backward pass, and K (K + 1) numbers. One host read of K x K.
    """

    objective: GradientMethod
    options: GradientOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = self.options
        self._memory_of_gradients = GradientMemory(self.num_tasks)
        self._parts["gradients"] = self._memory_of_gradients
        self._shared = SharedParameters(self.num_tasks, options.shared_parameters)
        self._of_features = options.gradients == "features"
        self._takes_jacobian = isinstance(self.objective, JacobianMethod)
        self._running: list[RunningGradients] = []
        self._num_gathered = 0
        self._gathered_of: list[int] = []
        #: Whether the micro-batches have to be gathered once more: a task seen for the first time in a later one has
        #: changed which parameters are shared. The same on all ranks.
        self.gathers_again = False
        self._found: Found | None = None
        self._known_before: dict[str, Any] | None = None
        self._outputs_of_module: list[Tensor] = []
        self._model: nn.Module | None = None
        self._hook: RemovableHandle | None = None
        self.to(self.device, self.dtype)

    @property
    def needs_gradients(self) -> bool:
        """Whether this step looks at the gradients of the tasks: every `every_n_steps` steps, not in a warm-up."""
        return self.phase != "warmup" and self._memory_of_gradients.steps % self.options.every_n_steps == 0

    def bind(self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> LossBalancer:
        """As in `LossBalancer.bind`; the model's trainable parameters become known, the same ones keep what is known.

        Raises:
            OptionError: a pattern of `shared_parameters` that fits no parameter, a `shared_module` that is none.
        """
        super().bind(model, optimizer)
        if model is None:
            return self
        if isinstance(model, DistributedDataParallel):
            model = model.module  # whose names the patterns are of
        others = self._shared.bind(model)
        if model is self._model and not others:
            return self
        self._model = model
        self._allocate()
        self._watch_module(model)
        return self

    def _watch_module(self, model: nn.Module) -> None:
        name = self.options.shared_module
        if not self._of_features or name is None:
            return
        modules = dict(model.named_modules())
        if name not in modules:
            raise OptionError(f"shared_module: {name!r} is no module of the model, expected one of its names")
        if self._hook is not None:
            self._hook.remove()
        self._hook = modules[name].register_forward_hook(_OutputHook(self))
        weakref.finalize(self, self._hook.remove)

    def _follow_model(self) -> None:
        """Take the parameters that the bound model trains now: some may have been frozen, replaced, or added."""
        if self._model is not None and self._shared.bound and not self._shared.is_of(self._model):
            self._shared.bind(self._model)
            self._allocate()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and what is read from a pickle, is bound to no model."""
        return {
            **vars(self),
            "_model": None,
            "_hook": None,
            "_outputs_of_module": [],
            "_found": None,
            "_running": [],
            "_known_before": None,
        }

    def share(self, parameters: Sequence[nn.Parameter]) -> LossBalancer:
        """Say which parameters are shared, in place of `bind`: all of `parameters` are; returns self."""
        self._shared.take(list(parameters))
        self._allocate()
        return self

    def _allocate(self) -> None:
        if isinstance(self.objective, JacobianMethod):
            self.objective.allocate(sum(p.numel() for p in self._shared.parameters))

    def keep_output(self, output: Any) -> None:
        """Note what `shared_module` has returned in a pass with gradients; it may be called several times in one."""
        if torch.is_grad_enabled():
            self._outputs_of_module += [x for x in _tensors(output) if x.requires_grad]

    def _before_decision(self) -> dict[str, Tensor]:
        return {}  # all but the losses is remembered when the gradients are known to be finite

    # --- the gradients -------------------------------------------------------------------------------------------

    def gather(self, batch: TaskLosses, process_group: dist.ProcessGroup | None = None, alone: bool = False) -> None:
        """Take in the gradients of a micro-batch, whose graph is kept; `decide` then uses what has been gathered.

        Cost: K backward passes from the losses to the shared parameters or features.
        """
        if self.objective.needs_model and not self._shared.bound:
            raise OptionError(f"balancer {self.name!r} remembers a gradient of the model's size: balancer.bind(model)")
        self._follow_model()
        local = (batch.num_items > 0).tolist()
        if any(local) and not batch.losses.requires_grad:
            raise TaskLossError(
                "losses: none of them depends on a trainable parameter (detached, or made under torch.no_grad), "
                "expected losses that a backward pass can start from"
            )
        present = self._whole_presence(local, batch, process_group, alone)
        again = self._looks_again()
        if self._known_before is None:
            self._known_before = self._shared.knowledge()
        self._shared.look(batch.losses, local, present, process_group, alone, again, self.task_names)
        inputs = self._features_of(batch) if self._of_features else self._shared.looked_at
        if self._num_gathered > 0 and not self._of_features:
            # A task that comes in a later micro-batch may change what is shared: the earlier ones lack a part then.
            self.gathers_again |= list(map(id, inputs)) != self._gathered_of
        self._gathered_of = list(map(id, inputs))
        if not self.gathers_again:
            # Of features the examples of a sample are nobody else's: there is one sample.
            sample = 0 if self._of_features else self._num_gathered % self.objective.samples
            running = self._running[sample] if sample < len(self._running) else RunningGradients()
            running.add(batch, inputs, self._of_features, self.options.tasks_per_pass, local)
            self._running[sample:] = [running, *self._running[sample + 1 :]]
        self._num_gathered += 1
        self._outputs_of_module = []

    def _looks_again(self) -> bool:
        """In the steps 1, 2, 4, 8, ... as long as not everything has been reached. The same on all ranks."""
        steps = self._memory_of_gradients.steps
        return self._shared.undecided and steps > 0 and steps & (steps - 1) == 0

    def forget_gathered(self) -> None:
        """Forget the gradients of the micro-batches that were gathered; what is known of the parameters stays."""
        self._running, self._num_gathered, self.gathers_again = [], 0, False

    def _whole_presence(self, local: list[bool], batch: TaskLosses, group: Any, alone: bool) -> list[bool]:
        if all(self._shared.known.tolist()) and not self._looks_again():
            return local  # nothing is new: nobody looks
        counts = batch.num_items if alone else all_reduce_sum(batch.num_items.detach(), group)
        found: list[bool] = (counts > 0).tolist()
        return found

    def _features_of(self, batch: TaskLosses) -> list[Tensor | GradientEdge]:
        features = batch.shared_features or tuple(self._outputs_of_module)
        if not features:
            raise TaskLossError(
                "gradients: 'features' needs what the heads are given: the field shared_features of the model's "
                "output, or the option shared_module with the name of a module, and balancer.bind(model)"
            )
        return [_inside_wrapper(tensor) for tensor in features]

    def _by_gradients(
        self,
        plain: Derivatives,
        whole: GlobalBatch,
        active: Tensor,
        forming: Tensor | None,
        micro_batches: Sequence[TaskLosses],
        process_group: dist.ProcessGroup | None,
        alone: bool,
    ) -> Derivatives:
        """What takes the place of `plain`, the derivatives of F: the method's weights, or its direction."""
        single = not self._running
        if not self.needs_gradients:
            self._follow_model()
            self._found = Found(None, None, plain.coefficients, single)
            known = self._memory_of_gradients.last_weights()
            known = known.to(self.dtype)
            weights = torch.where(active, known, zero(known.dtype, known.device))
            return self._weighted(plain._replace(parameter_gradients=()), weights)
        if single:
            for batch in micro_batches:
                self.gather(batch, process_group, alone)
        if self.gathers_again:
            raise RuntimeError("the micro-batches have to be gathered once more")
        gradients = reduce_gradients(self._running, process_group, alone)
        single = single and self._num_gathered == 1
        self.forget_gathered()
        self._found = Found(gradients, None, plain.coefficients, single)
        host = self._read(gradients.gramian, plain.coefficients, active, whole, forming)
        if not host.valid:
            self._unlearn()
            return plain._replace(coefficients=torch.zeros_like(plain.coefficients))
        # Where the sum is finite, each of its terms is.
        if not math.isfinite(float(host.gramian.sum())) and not host.gramian.isfinite().all():
            self._unlearn()
            # Refused: `describe_invalid` reads whose gradient it is.
            bad = ~host.gramian.diagonal().isfinite()
            bad = (bad | ~bad.any()).to(self.device)
            return plain._replace(coefficients=torch.where(bad, torch.nan, torch.zeros_like(plain.coefficients)))
        if self._takes_jacobian:
            return self._decide_by_jacobian(gradients, plain, host)
        holds = len(gradients.sample_items) == 1
        return self._decide_by_gramian(host, holds, plain)

    def _read(
        self, gramian: Tensor, slopes: Tensor, active: Tensor, whole: GlobalBatch, forming: Tensor | None
    ) -> OnHost:
        losses = last = self._memory.last_losses
        if self.normalization.kind != "none":
            with torch.no_grad():
                losses = self.normalization(losses)
        evidence = evidence_of(last.sum(), whole, last if self._takes_positive else None)
        parts = [gramian.to(self.device), slopes, losses, active, whole.present, *evidence]
        if self.device.type != "cpu":  # in one transfer
            flat = torch.cat([part.double().reshape(-1) for part in parts]).cpu()
            sizes = [part.numel() for part in parts]
            parts = [x.view(part.shape).to(part.dtype) for x, part in zip(flat.split(sizes), parts, strict=True)]
        on_host: list[Any] = [part.tolist() for part in parts[1:]]
        slope, loss, is_active, is_present, *proof = on_host
        valid = is_proof(proof) or bool(self._checks.valid(whole, self.phase, forming))
        return OnHost(parts[0], slope, loss, is_active, is_present, valid)

    def _unlearn(self) -> None:
        """A NaN of the losses' own makes every parameter look as if each task reached it."""
        self._found = None
        if self._known_before is not None:
            self._shared.restore(self._known_before)

    def _weighted(self, plain: Derivatives, weights: Tensor) -> Derivatives:
        return plain._replace(output=plain.output._replace(weights=weights), coefficients=weights * plain.coefficients)

    def _decide_by_gramian(self, host: OnHost, holds: bool, plain: Derivatives) -> Derivatives:
        """From the weights of the method.

        Args:
            holds: whether the last known entries stand in for those of absent tasks. With several samples the Gramian
                is none of one point: nothing stands in.
        """
        memory, gramian = self._memory_of_gradients, host.gramian
        if holds:
            if not all(host.present):
                here = torch.tensor(host.present)
                gramian = torch.where(here[:, None] & here, gramian, memory.gramian.double().cpu())
            if self.phase == "balancing":
                memory.gramian.copy_(gramian)
        tasks = [k for k in range(self.num_tasks) if host.active[k] and (holds or host.present[k])]
        if not tasks:
            return self._weighted(plain, torch.zeros_like(plain.coefficients))
        whole = len(tasks) == self.num_tasks
        slopes, numbers = torch.tensor(host.slopes, dtype=torch.float64), torch.tensor(tasks)
        chosen = gramian * slopes * slopes[:, None]
        chosen = chosen if whole else chosen[numbers[:, None], numbers]
        if holds and not all(host.present[k] for k in tasks):
            chosen = _nearest_gramian(chosen)
        losses = torch.tensor([host.losses[k] for k in tasks], dtype=torch.float64)
        weights, own = self._weights_of(chosen, losses, numbers, plain.parameter_gradients)
        if self.phase == "balancing":
            memory.remember(numbers, weights)
        found = weights if whole else torch.zeros(self.num_tasks, dtype=torch.float64).index_copy_(0, numbers, weights)
        return self._weighted(plain, found.to(self.device, self.dtype))._replace(parameter_gradients=own)

    def _weights_of(
        self, gramian: Tensor, losses: Tensor, tasks: Tensor, own: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """w `[A]`, and the gradient of the method's own parameters where it has `own` ones."""
        method = self.objective
        assert isinstance(method, GramianMethod)
        with torch.no_grad():
            weights = method.weights(gramian, losses, tasks)
        if not own:
            return weights, own
        with torch.enable_grad():
            loss = method.parameter_loss(gramian, losses, tasks)
            assert loss is not None, "a method with parameters has a loss for them"
            return weights, torch.autograd.grad(loss, list(method.parameters()), materialize_grads=True)

    def _decide_by_jacobian(self, gradients: GlobalGradients, plain: Derivatives, host: OnHost) -> Derivatives:
        method = self.objective
        assert isinstance(method, JacobianMethod)
        # Of the features, whatever has the same Gramian gives the same weights.
        rows = gradients.samples[0] if gradients.samples else Rows([_root(gradients.gramian)])
        tasks = torch.tensor([k for k in range(self.num_tasks) if host.present[k] and host.active[k]])
        if not len(tasks):
            return self._weighted(plain, torch.zeros_like(plain.coefficients))
        scaled = self._scaled_jacobian(rows, tasks, plain.coefficients, host)
        with torch.no_grad():
            gradient, weights = method.direction(scaled, torch.tensor(host.losses, dtype=torch.float64)[tasks], tasks)
        found = None
        if weights is not None:
            found = torch.zeros(self.num_tasks, dtype=torch.float64).index_copy_(0, tasks, weights.double().cpu())
        if not method.weighted:
            direction = self._by_parameter(gradient, rows.sizes)
            self._found = None if self._found is None else self._found._replace(direction=direction)
            shown = None if found is None else found.to(self.device, self.dtype)
            return plain._replace(output=plain.output._replace(weights=shown))
        assert found is not None, "a method that is weighted has weights"
        if self.phase == "balancing":
            self._memory_of_gradients.remember(tasks, found[tasks])
        return self._weighted(plain, found.to(self.device, self.dtype))

    def _scaled_jacobian(self, rows: Rows, tasks: Tensor, slopes: Tensor, host: OnHost) -> Tensor:
        """`[A, d]` of the normalised losses."""
        jacobian = self._whole_jacobian(rows)
        chosen = tasks.to(jacobian.device)
        present = jacobian if len(tasks) == self.num_tasks else jacobian[chosen]
        # Priors multiply weights; where there are none, the gradients.
        by_priors = self._rules.has_priors and not self.objective.weighted
        if not by_priors and all(host.slopes[k] == 1 for k in tasks.tolist()):
            return present
        factors = slopes * self._rules.task_priors if by_priors else slopes
        return present * factors.to(jacobian)[chosen, None]

    def _whole_jacobian(self, rows: Rows) -> Tensor:
        """`[K, d]`: of what is looked at; for a method that remembers vectors of the model's size of all parameters,
        zero where they are not looked at, so that it is of one length whatever is known to be shared."""
        if self.objective.needs_model:
            found = dict(zip(map(id, self._shared.looked_at), rows, strict=True))
            rows = Rows(
                found.get(id(p), rows[0].new_zeros(1, 1).expand(self.num_tasks, p.numel()))
                for p in self._shared.parameters
            )
        if rows.whole is not None:
            return rows.whole
        return torch.cat(list(rows), dim=1)

    def _by_parameter(self, direction: Tensor, sizes: list[int]) -> list[Tensor]:
        if not self.objective.needs_model:
            return list(direction.split(sizes))
        parts = direction.split([p.numel() for p in self._shared.parameters])
        looked_at = set(map(id, self._shared.looked_at))
        return [part for p, part in zip(self._shared.parameters, parts, strict=True) if id(p) in looked_at]

    # --- how the weighting is applied ----------------------------------------------------------------------------

    def apply(self, batch: TaskLosses, weighting: Weighting, share: WindowShare | None = None) -> Tensor:
        """As in `LossBalancer`. The backward pass of the scalar gives each parameter the gradient found for it; where
        shared parameters and heads descend the same sum, it is an ordinary one."""
        found = self._found
        if self.phase == "warmup" or found is None:
            return surrogate_loss(batch, weighting, share)
        clip = self._clip(found, weighting)
        same = self.options.heads == "weights" and clip is None and found.direction is None
        direct = found.gradients is not None and not self._of_features and found.single and self._covers()
        samples = 1 if found.gradients is None else len(found.gradients.sample_items)
        if same and not direct and samples < 3:
            return surrogate_loss(batch, weighting, share)
        shared, rest = self._shared.of_several, self._shared.of_one
        heads = weighting.coefficients if self.options.heads == "weights" else self._plain(found, weighting)
        coefficients = weighting.coefficients if clip is None else weighting.coefficients * clip
        pairs: list[tuple[nn.Parameter, Tensor | None]]
        if found.direction is not None:
            pairs = self._direction_pairs(found.direction, clip, share)
            given = {id(parameter) for parameter, _ in pairs}
            # What is shared and not looked at descends the plain sum, as the parameters of one task do.
            rest = [*rest, *(parameter for parameter in shared if id(parameter) not in given)]
        elif direct:
            assert found.gradients is not None
            part = coefficients if share is None else coefficients * share.everywhere
            looked_at = self._shared.looked_at
            summed = found.gradients.samples[0].weighted(part)
            pairs = [(p, gradient.view(p.shape)) for p, gradient in zip(looked_at, summed, strict=True)]
        else:
            if samples == 3 and found.gradients is not None:
                of_rank = coefficients * self._share_of_sample(batch, found.gradients, share) * weighting.ranks
            else:
                of_rank = of_this_rank(coefficients, batch, weighting, share)
            pairs = list(zip(shared, _gradients_of(batch, of_rank, shared), strict=True))
        # What the bound model does not have (a head in another module, a temperature) descends what heads descend.
        rest = [*rest, *self._shared.others(batch.losses)]
        own = _gradients_of(batch, of_this_rank(heads, batch, weighting, share), rest)
        return with_gradients([*pairs, *zip(rest, own, strict=True)], batch, weighting, share)

    def _covers(self) -> bool:
        return self.options.shared_parameters is None or len(self._shared.looked_at) == len(self._shared.of_several)

    def _plain(self, found: Found, weighting: Weighting) -> Tensor:
        slopes = found.slopes * self._rules.task_priors if self._rules.has_priors else found.slopes
        return torch.where(weighting.present, slopes, zero(slopes.dtype, slopes.device))

    def _direction_pairs(
        self, direction: list[Tensor], clip: Tensor | None, share: WindowShare | None
    ) -> list[tuple[nn.Parameter, Tensor | None]]:
        for factor in (clip, None if share is None else share.fraction):
            if factor is not None:
                direction = [part * factor for part in direction]
        return [(p, part.view(p.shape)) for p, part in zip(self._shared.looked_at, direction, strict=True)]

    def _share_of_sample(self, batch: TaskLosses, gradients: GlobalGradients, share: WindowShare | None) -> Tensor:
        """`[K]`: this rank's items over those of the third sample, which alone is descended; zero for the others."""
        if share is None or share.number % 3 != 2:
            return torch.zeros_like(batch.num_items)
        return batch.num_items / gradients.sample_items[2].to(batch.num_items).clamp(min=1)

    def _clip(self, found: Found, weighting: Weighting) -> Tensor | None:
        """What brings the gradient of the shared parameters to `max_norm`; None where it is off."""
        limit = self.options.max_norm
        if limit is None or found.gradients is None:
            return None
        if found.direction is not None:
            square = torch.stack([d.double().square().sum() for d in found.direction]).sum()
        else:
            c = weighting.coefficients.double()
            square = c @ found.gradients.gramian.to(c) @ c
        norm = square.clamp(min=0).sqrt()
        return (limit / (norm + 1e-6)).clamp(max=1.0).to(self.dtype)

    # --- steps and state -----------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> None:
        """As in `LossBalancer.step`; the number of steps, on which `every_n_steps` goes, is one more."""
        counts = self._open and self.phase != "warmup"
        super().step(*args, **kwargs)
        self._found, self._known_before, self._outputs_of_module = None, None, []
        if counts:
            self._memory_of_gradients.steps += 1
            if self._history is None:  # else `LossBalancer` has said so
                self.objective.end_step()

    def discard(self) -> None:
        """As in `LossBalancer.discard`; what has been gathered is forgotten."""
        super().discard()
        self.forget_gathered()
        self._found, self._known_before, self._outputs_of_module = None, None, []

    def rollback(self, snapshot: Mapping[str, Tensor]) -> None:
        """As in `LossBalancer.rollback`; what has been gathered is forgotten."""
        super().rollback(snapshot)
        self.forget_gathered()
        self._known_before = None

    @contextmanager
    def _no_trace(self) -> Iterator[None]:
        running, gathered, found, outputs = self._running, self._num_gathered, self._found, self._outputs_of_module
        again, known = self.gathers_again, self._known_before
        self.forget_gathered()
        try:
            with self._shared.unchanged(), super()._no_trace():
                yield
        finally:
            self._running, self._num_gathered, self._found = running, gathered, found
            self._outputs_of_module, self.gathers_again, self._known_before = outputs, again, known

    def describe_invalid(self, weighting: Weighting, step: int | None = None) -> tuple[str, str, bool]:
        """As in `LossBalancer`; names the tasks whose gradient is not finite, where the losses are."""
        finite = bool(weighting.losses.isfinite().all()) and bool(weighting.auxiliary_loss.isfinite())
        bad = weighting.coefficients.isnan().tolist()
        if finite and any(bad):
            names = [name for name, is_bad in zip(self.task_names, bad, strict=True) if is_bad]
            where = "" if step is None else f" at step {step}"
            shown = ", ".join(repr(name) for name in names[:8])
            return f"the gradient of task {shown} is not finite{where}, though its loss is", names[0], False
        return super().describe_invalid(weighting, step)

    def state_dict(self) -> dict[str, Tensor]:
        """As in `LossBalancer.state_dict`; once a model is bound with what is known of its parameters."""
        known = {f"{SHARED_PARAMETERS}{name}": tensor for name, tensor in self._shared.state_dict().items()}
        return {**super().state_dict(), **known}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As in `LossBalancer.load_state_dict`."""
        self.check_state_dict(state)
        known = entries_below(state, SHARED_PARAMETERS)
        if known:
            self._shared.load_state_dict(known)
        self.rollback(entries_without(state, SHARED_PARAMETERS))

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """As in `LossBalancer.start_from`; which parameters are shared is found again."""
        super().start_from(entries_without(state, SHARED_PARAMETERS))


class _OutputHook:
    """Gives a balancer what a module returns. A copy of the module has none that listens."""

    def __init__(self, balancer: GradientBalancer | None) -> None:
        self._balancer = None if balancer is None else weakref.ref(balancer)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        balancer = None if self._balancer is None else self._balancer()
        if balancer is not None:
            balancer.keep_output(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_OutputHook, (None,))


def _gradients_of(batch: TaskLosses, weights: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    """The gradient of sum_k w_k l_k, with w_k = 0 for tasks without items here; the graph is kept."""
    if not parameters or not batch.losses.requires_grad:  # a rank without a label has nothing to go back from
        return (None,) * len(parameters)
    weights = weights.to(batch.losses.dtype)
    return torch.autograd.grad(batch.losses, list(parameters), weights, retain_graph=True, allow_unused=True)


def _nearest_gramian(matrix: Tensor) -> Tensor:
    """A matrix put together from entries of several steps, without its negative eigenvalues."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0)) @ vectors.T


def _inside_wrapper(tensor: Tensor) -> Tensor | GradientEdge:
    """The place of `tensor` in the graph of the losses. With `find_unused_parameters` DistributedDataParallel returns
    copies of the model's outputs, to which no loss leads back."""
    node = tensor.grad_fn
    if node is None or type(node).__name__ != "_DDPSinkBackward":
        return tensor
    inner, number = node.next_functions[tensor.output_nr]
    return tensor if inner is None else GradientEdge(inner, number)


def _root(gramian: Tensor) -> Tensor:
    """A matrix `[K, K]` whose Gramian is the given one."""
    values, vectors = torch.linalg.eigh((gramian + gramian.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]

"""MARIGOLD, zeroth-order bilevel gradient balancing. Chen et al., "Feed m Birds with One Scone", equations 7-14.

    min_lambda max_rho  sum_i rho_i ( f_i(A(lambda, theta)) - f_i(theta) )   worst decrement; lambda, rho in the simplex
    A(lambda, theta) = one step of the model's optimizer, with its state, on sum_i lambda_i f_i

Algorithm 1, with u uniform on the unit sphere of the m trainable weights and R = sum_i rho_i f_i:

    g_lambda = (m / r) R(A(lambda + r u, theta)) u            g_rho_i = f_i(A(lambda + r u, theta)) - f_i(theta)

Appendix C: lambda = softmax(beta u / f), rho = softmax(beta v / f), f the losses at theta, constant to the gradient; u
descends g_lambda and v ascends g_rho by Adam, through the chain rule: dP/du and dP/dv of

    P = sum_k lambda_k(u) stopgrad(g_lambda_k) - sum_i rho_i(v) stopgrad(g_rho_i)

    u -> logits, v -> worst_logits, r -> perturbation, the sphere's u -> direction, P -> `progress`

`mode` says which step A is. `exact` (Algorithm 2 as printed): a trial step that is undone; the step that counts is
taken with the new lambda. `commit`: the perturbed step is the model's step, and the new lambda counts from the next
update on. `lagged`: as commit, and f after it are the losses of the next batch. The paper's times (Table 3) are those
of `lagged`; its text ("one backward pass") fits the last two.

The general upper level (section 3.5): R is any function of the losses after the step, `upper_level: {tasks: [...]}` for
the sum of some (auxiliary learning, equations 13-14) or a function of one's own; there is no rho then. R is only
evaluated, so it need not be differentiable. Of the lower level the weights of `trainable_tasks` are learned; the other
tasks keep weight 1.

The one-point estimator is unbiased for the gradient of the smoothed R, but its deviation grows as m R / r: with r =
1e-3 and a learning rate of 1e-4 u is nearly a random walk. `one_point_baseline` takes R(f(theta)) off, for nothing, and
stays unbiased. lambda + r u may leave the simplex, as in the paper. The paper does not say where u and v start: v at 0
(equal rho), u at `initial`; 1 makes lambda fall with the loss, 0 makes it uniform. beta was tuned over 0.01 .. 3 there:
0.03 for Cityscapes, our default, 1 for NYUv2, with which a loss far below 1 takes all the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from hf_bilb.balancers.random_numbers import NormalDraws
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.balancers.router import initial_values
from hf_bilb.config.options import bounded, nearest
from hf_bilb.config.user_code import check_reference, load_reference
from hf_bilb.engine.constants import one, zero
from hf_bilb.engine.objective import (
    Derivatives,
    HistoryObjective,
    LookAheadObjective,
    ObjectiveValue,
    Scalar,
    StepProgress,
)
from hf_bilb.engine.options import BalancerOptions, LearningRate, masked_softmax, masked_sum
from hf_bilb.errors import OptionError

Mode = Literal["exact", "commit", "lagged"]
Parametrization = Literal["softmax_over_loss", "softmax", "identity", "positive"]
#: (losses `[K]` after the step, bool `[K]` which of them are known) -> scalar; both detached, losses normalised.
UpperFunction = Callable[[Tensor, Tensor], Tensor]

_LOOKS_AT = {"exact": "look_ahead", "commit": "same_batch", "lagged": "next_batch"}


@dataclass(frozen=True, kw_only=True)
class UpperTasks:
    """`upper_level: {tasks: [click]}`: R is the sum of these tasks' losses after the step.

    Attributes:
        tasks: their names.
    """

    tasks: list[str]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise OptionError("tasks: is empty, expected names of tasks")


@dataclass(frozen=True, kw_only=True)
class MarigoldOptions(BalancerOptions):
    """Options of `marigold`; see the module's docstring for the symbols.

    Attributes:
        mode: whose losses say what a step does: `exact`, `commit` or `lagged`.
        perturbation: r, how far the weights are moved.
        beta: the softmax's factor.
        initial: u at the start, a number or one per task; for `identity` and `positive` the weight itself.
        estimator: of g_lambda: `one_point` (the paper), `one_point_baseline`, or `two_point`, which needs `exact`.
        upper_level: R: `worst_decrement`, `{tasks: [names]}`, or a function (losses `[K]`, known `[K]`) -> scalar, in a
            recipe `path/to/file.py:function`.
        parametrization: of the weights: `softmax_over_loss` (the paper), `softmax`, `identity` (u itself) or `positive`
            (exp u).
        trainable_tasks: names of the tasks whose weights are learned, the others have weight 1; null = all.
        seed: of the directions.
    """

    learning_rate: LearningRate = 1e-4
    mode: Mode = "commit"
    perturbation: float = bounded(1e-3, above=0)
    beta: float = bounded(0.03, above=0)
    initial: float | list[float] = 1.0
    estimator: Literal["one_point", "one_point_baseline", "two_point"] = "one_point"
    upper_level: Literal["worst_decrement"] | UpperTasks | str | UpperFunction = "worst_decrement"
    parametrization: Parametrization = "softmax_over_loss"
    trainable_tasks: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parametrization == "softmax_over_loss":
            self.require_positive_normalization("marigold", "divides by the losses, but for parametrization: softmax")
        if self.estimator == "two_point" and self.mode != "exact":
            raise OptionError(
                f"estimator: 'two_point' is not valid with mode: {self.mode!r}, whose only step is the model's; "
                "expected mode: exact, or 'one_point_baseline'"
            )
        if self.trainable_tasks == []:
            raise OptionError("trainable_tasks: is empty, expected names of tasks, or null for all")
        if isinstance(self.upper_level, str) and self.upper_level != "worst_decrement":
            check_reference(self.upper_level, "upper_level")
        if self.parametrization == "positive":
            initial = self.initial if isinstance(self.initial, list) else [self.initial]
            if not min(initial) > 0:
                raise OptionError(f"initial: {self.initial} is not valid with parametrization: positive, expected > 0")


@register_balancer(
    "marigold",
    options=MarigoldOptions,
    paper="Chen et al., Feed m Birds with One Scone, eq. 7-14, Algorithms 1 and 2",
    costs=(
        Cost(2, 1, when="mode: commit"),
        Cost(1, 1, when="mode: lagged"),
        Cost(3, 2, "4d with Adam", when="mode: exact"),
        Cost(4, 3, "5d with Adam", when="mode: exact, estimator: two_point"),
    ),
)
class Marigold(HistoryObjective, LookAheadObjective):
    """MARIGOLD. State: `logits [K]` and for the worst decrement `worst_logits [K]`, trainable; `direction [K]` and the
    number of updates; with `lagged` the last update's losses.

    Cost, in forward and backward passes of the model: `lagged` 1 and 1, `commit` 2 and 1, `exact` 3 and 2, and copies
    of the trainable parameters, their gradients and the optimizer's state; `two_point` 4 and 3, and one more set of
    gradients. With several micro-batches `exact` runs each once more.
    """

    direction: Tensor
    trainable: Tensor
    upper_tasks: Tensor

    def __init__(self, num_tasks: int, options: MarigoldOptions) -> None:
        super().__init__()
        self.options = options
        self.reevaluate = _LOOKS_AT[options.mode]  # type: ignore[assignment]
        self.divides_by_losses = options.parametrization == "softmax_over_loss"
        self.draws = NormalDraws(num_tasks, options.seed)
        initial = initial_values(options.initial, num_tasks, "initial")
        self.logits = nn.Parameter(initial.log() if options.parametrization == "positive" else initial)
        self._upper_function: UpperFunction | None = None
        if options.upper_level == "worst_decrement":
            self.worst_logits = nn.Parameter(torch.zeros(num_tasks, dtype=torch.float64))
        elif isinstance(options.upper_level, str):
            self._upper_function = load_reference(options.upper_level, "upper_level")
        elif not isinstance(options.upper_level, UpperTasks):
            self._upper_function = options.upper_level
        self.register_buffer("direction", torch.zeros(num_tasks, dtype=torch.float64))
        # Not state: they are what the user says today, also after a resume.
        for name in ("trainable", "upper_tasks"):
            self.register_buffer(name, torch.ones(num_tasks, dtype=torch.bool), persistent=False)

    def set_task_names(self, task_names: Sequence[str]) -> None:
        """Find the tasks that the options name."""
        options = self.options
        if options.trainable_tasks is not None:
            self.trainable.copy_(_mask(options.trainable_tasks, task_names, "trainable_tasks"))
        if isinstance(options.upper_level, UpperTasks):
            self.upper_tasks.copy_(_mask(options.upper_level.tasks, task_names, "upper_level.tasks"))

    def name_of(self, kind: str) -> str:
        """The mode that looks at `kind`."""
        return next(f"mode: {mode!r}" for mode, looks_at in _LOOKS_AT.items() if looks_at == kind)

    # --- lower level ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """Draw the direction: a unit vector over the active tasks whose weights are trained."""
        drawn = self.draws(losses)
        drawn = torch.where(self._trained(active), drawn, zero(drawn.dtype, drawn.device))
        self.direction.copy_(drawn / drawn.norm().clamp(min=torch.finfo(drawn.dtype).tiny))

    def end_step(self) -> None:
        """The next update draws again, as long as anything is drawn."""
        if self.training:
            self.draws.end_step()

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F = sum_k lambda_k l_k over the `active` tasks, in `commit` and `lagged` with lambda + r u while it learns;
        lambda is a constant to its gradient."""
        return self._weighted(losses, active, features, self._sign)

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = lambda_k, or lambda_k + r u_k."""
        weights = self._weights(losses, active)
        applied = self._applied(weights, self._sign)
        value = masked_sum(applied * losses, active)
        own = tuple(torch.zeros_like(parameter) for parameter in self.parameters())
        slopes = torch.where(active, applied, zero(applied.dtype, applied.device))
        return Derivatives(ObjectiveValue(value, weights), slopes, own)

    @property
    def _sign(self) -> float:
        return 1.0 if self.training and self.options.mode != "exact" else 0.0

    @property
    def trials(self) -> tuple[Scalar, ...]:
        """The lower level at lambda + r u, for `two_point` also at lambda - r u."""
        signs = (1.0, -1.0) if self.options.estimator == "two_point" else (1.0,)
        return tuple(partial(self._weighted, sign=sign) for sign in signs)

    def _weighted(self, losses: Tensor, active: Tensor, features: Tensor | None, sign: float) -> ObjectiveValue:
        weights = self._weights(losses.detach(), active).detach()
        return ObjectiveValue(masked_sum(self._applied(weights, sign) * losses, active), weights)

    def _applied(self, weights: Tensor, sign: float) -> Tensor:
        """lambda + r u, or with the other sign."""
        return weights + sign * self.options.perturbation * self.direction

    def _weights(self, losses: Tensor, active: Tensor) -> Tensor:
        """lambda `[K]`, zero where not active."""
        kind = self.options.parametrization
        trained: Tensor
        if kind == "identity":
            trained = self.logits
        elif kind == "positive":
            trained = self.logits.exp()
        else:
            trained = self._softmax(self.logits, losses, self._trained(active))
            if self._trains_all:
                return trained
        if not self._trains_all:
            trained = torch.where(self.trainable, trained, one(trained.dtype, trained.device))
        return torch.where(active, trained, zero(trained.dtype, trained.device))

    def _trained(self, active: Tensor) -> Tensor:
        return active if self._trains_all else active & self.trainable

    @property
    def _trains_all(self) -> bool:
        return self.options.trainable_tasks is None

    def _softmax(self, logits: Tensor, losses: Tensor, mask: Tensor) -> Tensor:
        scores = self.options.beta * logits
        return masked_softmax(scores / losses if self.divides_by_losses else scores, mask)

    # --- upper level ---------------------------------------------------------------------------------------------

    def progress(self, step: StepProgress) -> Tensor:
        """P, whose gradient is that of Algorithm 1."""
        (weights, slope), *worst = self._pairs(step)
        value = masked_sum(weights * slope, step.active)
        for rho, risen in worst:
            value = value - masked_sum(rho * risen, step.compared)
        return value

    def progress_in_closed_form(self, step: StepProgress) -> tuple[Tensor, ...]:
        """J^T g_lambda and -J^T g_rho."""
        with torch.enable_grad():
            (weights, slope), *worst = self._pairs(step)
        slopes = [torch.where(step.active, slope, zero(slope.dtype, slope.device))]
        slopes += [torch.where(step.compared, -risen, zero(risen.dtype, risen.device)) for _, risen in worst]
        return torch.autograd.grad([weights, *(rho for rho, _ in worst)], list(self.parameters()), slopes)

    def _pairs(self, step: StepProgress) -> list[tuple[Tensor, Tensor]]:
        """lambda and g_lambda, and for the worst decrement rho and g_rho."""
        weights = self._weights(step.before, step.active)
        if self.options.upper_level != "worst_decrement":
            return [(weights, self._slope(step, self._upper))]
        rho = self._softmax(self.worst_logits, step.before, step.compared)

        def decrement(losses: Tensor, known: Tensor) -> Tensor:
            return (rho * losses).sum()  # zero where not known

        after = step.after if step.opposite is None else (step.after + step.opposite) / 2
        return [(weights, self._slope(step, decrement)), (rho, after - step.before)]

    @torch.no_grad()
    def _slope(self, step: StepProgress, upper: UpperFunction) -> Tensor:
        """g_lambda `[K]`, the estimate of dR/dlambda; zero where R cannot be known."""
        options = self.options
        known = step.compared
        at = upper(step.after, known)
        if step.opposite is not None:
            at = (at - upper(step.opposite, known)) / 2
        elif options.estimator == "one_point_baseline":
            at = at - upper(step.before, known)
        number = self._trained(step.active).sum().to(self.direction.dtype)
        slope = number / options.perturbation * at * self.direction
        comparable = torch.where(self.upper_tasks, known, True).all() if self._sums_tasks else known.any()
        return torch.where(comparable, slope, zero(slope.dtype, slope.device))

    @property
    def _sums_tasks(self) -> bool:
        return isinstance(self.options.upper_level, UpperTasks)

    def _upper(self, losses: Tensor, known: Tensor) -> Tensor:
        """R of a general upper level."""
        if self._upper_function is None:
            return masked_sum(losses, self.upper_tasks & known)
        value = self._upper_function(losses, known)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise OptionError(f"upper_level: the function returned {value!r}, expected a tensor with one number")
        return value.reshape(()).to(losses)


def _mask(names: Sequence[str], task_names: Sequence[str], key: str) -> Tensor:
    """Bool `[K]`, where the tasks called `names` are."""
    for name in names:
        if name not in task_names:
            raise OptionError(
                f"{key}: {name!r} is no task{nearest(name, task_names)}; expected some of {', '.join(task_names)}"
            )
    return torch.tensor([name in names for name in task_names])

"""The driver: a loss balancer is a scalar function F of the K losses; everything else follows by differentiation.

    F(losses [K], active [K], features [D] | None; theta) -> scalar
    coefficients c = dF/dlosses   what each task's loss is multiplied with in the one backward pass through the model
    router gradient = dF/dtheta   what the balancer's own optimizer descends

`detach()` inside F separates the two levels of a bilevel method. F costs K numbers; the model is not involved.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_bilb.engine.constants import one, zero
from hf_bilb.engine.records import Normalization


class ObjectiveValue(NamedTuple):
    """What an objective returns.

    Attributes:
        value: scalar F, differentiable in the losses and in theta.
        weights: sigma `[K]`, where the method has weights.
        discrepancy: scalar f, where the method has one.
        edge_ratio: scalar, discrepancy weight over the value beyond which a coefficient can turn negative.
        clamped_share: scalar, the share of weights that lie at their clamp.
    """

    value: Tensor
    weights: Tensor | None = None
    discrepancy: Tensor | None = None
    edge_ratio: Tensor | None = None
    clamped_share: Tensor | None = None


#: F, or another function of an objective with its arguments.
Scalar = Callable[[Tensor, Tensor, "Tensor | None"], ObjectiveValue]


class Objective(nn.Module, ABC):
    """A method: F with its parameters theta (`nn.Parameter`) and its other state (buffers), all built in float64.

    Subclasses take `(num_tasks, options)` and implement `forward`. Losses arrive normalised; entries outside `active`
    are finite but meaningless and must not enter F.
    """

    #: True when F needs losses > 0 after normalization (a logarithm); checked before the model is touched.
    takes_logarithm: bool = False
    #: True when F needs losses > 0 without taking their logarithm; checked likewise.
    divides_by_losses: bool = False
    #: D, the length of the features that F looks at; 0 when it looks at none.
    num_features: int = 0
    #: All weights below it: the method has turned into another; None: that cannot be.
    collapsed_below: float | None = None
    #: L2 penalty on the method's own parameters, a part of their gradient.
    weight_decay: float = 0.0

    def set_task_names(self, task_names: Sequence[str]) -> None:
        """Called once, before the first loss, for methods whose options name tasks.

        Raises:
            OptionError: a name that is no task.
        """
        return

    @property
    def needs_positive_losses(self) -> bool:
        """Whether F needs losses > 0, or above `lower_bounds`."""
        return self.takes_logarithm or self.divides_by_losses

    @property
    def lower_bounds(self) -> Tensor | None:
        """`[K]`, above which the losses must lie where a logarithm is taken; None: above 0."""
        return None

    @abstractmethod
    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the tasks in the bool mask `active [K]` at the normalised `losses [K]`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # That of another F, or of another P, is none of this one.
        if "forward" in vars(cls) and "closed_form" not in vars(cls):
            cls.closed_form = Objective.closed_form  # type: ignore[method-assign]
        if "progress" in vars(cls) and "progress_in_closed_form" not in vars(cls):
            cls.progress_in_closed_form = ProgressObjective.progress_in_closed_form  # type: ignore[attr-defined]

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives | None:
        """F and its derivatives as `forward` and autograd have them, in fewer operations; None where nobody has written
        them down. Called without gradients, for methods without features; arguments as in `forward`. What it returns is
        kept until it is logged: it must be no parameter or buffer."""
        return None


class HistoryObjective(Objective):
    """A method that keeps a record: of the losses it has seen, or of the updates there have been.

    The record is buffers or extra state, so that it is saved and goes back when an update is dropped. Both hooks do
    nothing unless a method overrides them, and must not read the device.
    """

    @property
    def has_record(self) -> bool:
        """Whether it remembers losses."""
        return type(self).observe is not HistoryObjective.observe

    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """Take in the losses at which F is evaluated next; called while balancing, neither in a warm-up nor frozen.

        Args:
            losses: `[K]`, global, normalised, detached; those of held tasks are the last known ones.
            num_items: `[K]`, global, zero for held tasks.
            active: bool `[K]`, the tasks that F runs over; all False for a batch that is refused or has no task.
            epoch: number of the epoch, -1 when nobody has told.
        """
        return

    def end_step(self) -> None:
        """An update has ended, balancing or frozen; not called for an update that is dropped."""
        return


class StepProgress(NamedTuple):
    """What a step of the model has done to the losses; normalised, detached, finite everywhere.

    Attributes:
        before: `[K]`, meaningless outside `active`.
        after: `[K]`, meaningless outside `compared`.
        active: bool `[K]`, the tasks that F ran over in that step.
        compared: bool `[K]`, those of them whose losses after the step are known.
        opposite: `[K]`, the losses after the opposite trial step; None where there was none.
    """

    before: Tensor
    after: Tensor
    active: Tensor
    compared: Tensor
    opposite: Tensor | None = None


class ProgressObjective(Objective):
    """A method whose parameters follow how far a step has brought the losses, not dF/dtheta.

    They descend dP/dtheta, with P from `progress`. The losses after the step are those of the same batch, run once
    more; or those of the next update; or those after a trial step that is undone, before the update itself.
    """

    reevaluate: Literal["same_batch", "next_batch", "look_ahead"] = "same_batch"

    def name_of(self, kind: str) -> str:
        """How a recipe asks for `reevaluate` to be `kind`, for messages."""
        return f"reevaluate: {kind!r}"

    @abstractmethod
    def progress(self, step: StepProgress) -> Tensor:
        """P, a scalar of which only dP/dtheta is looked at."""

    def progress_in_closed_form(self, step: StepProgress) -> tuple[Tensor, ...] | None:
        """dP/dtheta for each parameter, in fewer operations; None where nobody has written it down."""
        return None


class LookAheadObjective(ProgressObjective):
    """A method that with `reevaluate: look_ahead` tries steps other than the one that F asks for."""

    @property
    @abstractmethod
    def trials(self) -> tuple[Scalar, ...]:
        """One scalar, or two opposite ones; the gradient of each makes a trial step. Arguments as in `forward`."""


class BilevelObjective(Objective):
    """A method with two levels, min_W f(W, x*(W)) with x*(W) in argmin_x g(W, x); W are its parameters.

    `levels` gives both as separate scalars, for the double loop and for diagnostics.
    """

    #: N, beta and the factor of g of the penalty form; N = 0 is the single loop.
    inner_steps: int = 0
    inner_learning_rate: float = 0.0
    penalty_weight: float = 1.0

    @abstractmethod
    def levels(self, losses: Tensor, active: Tensor, features: Tensor | None) -> Levels:
        """f, g and sigma; arguments as in `forward`. g is attached to W even where F detaches it."""


class Levels(NamedTuple):
    """Both levels of a bilevel method.

    Attributes:
        upper: scalar f, without its factor.
        lower: scalar g, without its factor.
        weights: sigma `[K]`.
        clamped_share: scalar, the share of weights that have no gradient because they lie at their clamp.
    """

    upper: Tensor
    lower: Tensor
    weights: Tensor
    clamped_share: Tensor


class Derivatives(NamedTuple):
    """A scalar at one point and its derivatives, detached.

    Attributes:
        output: what the objective returned.
        coefficients: dF/dl `[K]`, with respect to the losses before normalization; zero outside the active tasks.
        parameter_gradients: dF/dtheta for each parameter of the objective.
        feature_gradient: dF/dfeatures `[D]`, None without features.
    """

    output: ObjectiveValue
    coefficients: Tensor
    parameter_gradients: tuple[Tensor, ...]
    feature_gradient: Tensor | None = None


def differentiate(
    objective: Objective,
    normalization: Normalization,
    losses: Tensor,
    active: Tensor,
    features: Tensor | None = None,
    scalar: Scalar | None = None,
) -> Derivatives:
    """Evaluate F(normalise(losses)) and differentiate it.

    Args:
        losses: `[K]`, global, detached or not; entries outside `active` are replaced.
        active: bool `[K]`, the tasks that F runs over.
        features: `[D]` or None.
        scalar: another function of the objective's than F to differentiate (one of its levels).

    Returns:
        `Derivatives`; coefficients are zero outside `active`.

    Cost: one forward and backward of K numbers, or a closed form; no device synchronisation, no communication.
    """
    if scalar is None and features is None:
        with torch.no_grad():
            found = _in_closed_form(objective, normalization, losses, active)
        if found is not None:
            return found
    # Placeholder one: finite under every normalization, so that no NaN or infinity reaches the graph.
    point = torch.where(active, losses.detach(), one(losses.dtype, losses.device)).requires_grad_()
    inputs = [point, *objective.parameters()]
    if features is not None:
        features = features.detach().requires_grad_()
        inputs.append(features)
    with torch.enable_grad():
        output = (objective if scalar is None else scalar)(normalization(point), active, features)
        gradients = torch.autograd.grad(output.value, inputs, materialize_grads=True)
    detached = [None if field is None else _kept(field) for field in output]
    of_losses, *of_parameters = gradients
    of_features = None if features is None else of_parameters.pop()
    coefficients = torch.where(active, of_losses, zero(of_losses.dtype, of_losses.device))
    return Derivatives(ObjectiveValue._make(detached), coefficients, tuple(of_parameters), of_features)


def _kept(field: Tensor) -> Tensor:
    """What an objective returned, for later: a parameter or a buffer, or a part of one, will be written into."""
    return field.detach().clone() if field.grad_fn is None or field._is_view() else field.detach()


def _in_closed_form(
    objective: Objective, normalization: Normalization, losses: Tensor, active: Tensor
) -> Derivatives | None:
    if type(objective).closed_form is Objective.closed_form:
        return None
    if normalization.kind == "none":
        return objective.closed_form(losses, active)
    placeholder = one(losses.dtype, losses.device)
    normalised, factor, divisors = normalization.with_slopes(torch.where(active, losses, placeholder))
    found = objective.closed_form(normalised, active)
    if found is None:
        return None
    slopes = found.coefficients if factor is None else found.coefficients * factor
    return found._replace(coefficients=functools.reduce(torch.div, divisors, slopes))


def progress_gradients(
    objective: ProgressObjective,
    normalization: Normalization,
    step: StepProgress,
) -> tuple[Tensor, ...]:
    """dP/dtheta for each parameter of the objective, of a step whose losses are not normalised yet, and can be wherever
    they are meaningless.

    Cost: one forward and backward of K numbers, or a closed form; no device synchronisation, no communication.
    """
    with torch.no_grad():
        opposite = None if step.opposite is None else normalization(step.opposite)
        step = step._replace(before=normalization(step.before), after=normalization(step.after), opposite=opposite)
        found = objective.progress_in_closed_form(step)
    if found is not None:
        return found
    with torch.enable_grad():
        return torch.autograd.grad(objective.progress(step), list(objective.parameters()), materialize_grads=True)

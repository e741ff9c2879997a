"""Methods that look at the gradients of the K tasks, where loss balancers look at the K losses.

    g_k = gradient of task k's loss with respect to the shared parameters,  J = [g_1; ..; g_K],  G = J J^T

A method is a function of G, whose result are K weights w, and the shared parameters descend J^T w (`GramianMethod`); or
a function of J itself (`JacobianMethod`). The K gradients cost K backward passes, or K passes through the heads alone
(`gradients: features`). What they are taken of, how they travel over ranks and micro-batches and how the result reaches
the parameters is the same for all methods, and none of their business.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_bilb.config.options import bounded
from hf_bilb.engine.objective import Derivatives, Objective, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, masked_sum, sum_in_closed_form
from hf_bilb.errors import OptionError

HeadWeights = Literal["sum", "weights"]


@dataclass(frozen=True, kw_only=True)
class GradientOptions(BalancerOptions):
    """Options of every gradient method.

    Attributes:
        gradients: `parameters`, of the shared parameters; `features`, with respect to `shared_features` of the model's
            output, or to the output of `shared_module`: K backward passes through the heads only, one through the rest.
        shared_parameters: names of parameters, or patterns with `*`; null: every parameter that more than one task's
            loss reaches.
        shared_module: with `gradients: features`, the name of the module whose output is looked at; null: the field
            `shared_features` of the model's output.
        every_n_steps: the weights are found every n steps, and applied in one ordinary backward pass in between.
        heads: what the parameters of one task alone descend: the plain `sum` of the losses, or their sum with the same
            `weights` as the shared ones.
        max_norm: the gradient of the shared parameters is clipped to this norm; null: not at all.
        tasks_per_pass: so many tasks go through the backward pass at once, which is faster and takes as many times the
            memory of the activations' gradients; 1: one after the other; null: as many as are fastest.
    """

    gradients: Literal["parameters", "features"] = "parameters"
    shared_parameters: list[str] | None = None
    shared_module: str | None = None
    every_n_steps: int = bounded(1, at_least=1)
    heads: HeadWeights = "weights"
    max_norm: float | None = bounded(None, above=0)
    tasks_per_pass: int | None = bounded(None, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared_parameters == []:
            raise OptionError("shared_parameters: is empty, expected patterns, or null for all that are shared")
        if self.shared_module is not None and self.gradients != "features":
            raise OptionError("shared_module: is the module whose output gradients: 'features' looks at, expected null")
        if self.gradients == "features" and self.shared_parameters is not None:
            raise OptionError("shared_parameters: are not looked at with gradients: 'features', expected null")
        if self.max_norm is None:
            return
        unknown = {
            "gradients: 'features'": self.gradients == "features",
            f"every_n_steps: {self.every_n_steps}": self.every_n_steps > 1,
        }
        for key in [key for key, holds in unknown.items() if holds]:
            raise OptionError(
                f"max_norm: {self.max_norm} is not valid with {key}, where the norm of the shared parameters' gradient "
                "is not known; expected null (the Trainer's max_grad_norm clips the whole gradient)"
            )


class GradientMethod(Objective):
    """A gradient method. F, which it reports and whose slopes the heads descend, is the plain sum of the losses.

    What a method remembers is buffers `[K]`, which `tasks` index, or parameters. They may lie on another device and be
    of another precision than what the method is given: read them with `.to(gramian)`, write them with `copy_` or
    `index_copy_`. In evaluation mode (`not self.training`: the method is frozen) nothing is remembered.
    """

    #: How many independent samples of the batch the method takes, the micro-batches of a step in turn. With one
    #: micro-batch all samples are the same.
    samples: int = 1
    #: Whether it remembers something of the model's size, and so needs `bind(model)`.
    needs_model: bool = False

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """The sum of the losses of the `active` tasks."""
        return ObjectiveValue(masked_sum(losses, active))

    def closed_form(self, losses: Tensor, active: Tensor) -> Derivatives:
        """dF/dl_k = 1; parameters of the method's own are no part of F."""
        own = tuple(torch.zeros_like(parameter) for parameter in self.parameters())
        return sum_in_closed_form(losses, active)._replace(parameter_gradients=own)

    def end_step(self) -> None:
        """A step has ended, balancing or frozen; not called for one that is dropped."""
        return


class GramianMethod(GradientMethod):
    """A method whose result are weights: the shared parameters descend sum_k w_k g_k."""

    @abstractmethod
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """w `[A]` for the A tasks that have a loss in this step, 1 <= A <= K; finite whatever is finite.

        Args:
            gramian: `[A, A]`, float64 on the CPU, of the gradients of the normalised losses. With several `samples` it
                is J_a J_b^T of two of them, which need not be symmetric.
            losses: `[A]`, float64 on the CPU, normalised.
            tasks: `[A]`, int64 on the CPU, the numbers of the tasks, in ascending order.
        """

    def parameter_loss(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor | None:
        """A scalar that the method's own parameters descend with the balancer's optimizer; None: it has none."""
        return None


class Direction(NamedTuple):
    """What a `JacobianMethod` returns.

    Attributes:
        gradient: `[d]`, what the shared parameters descend.
        weights: `[A]`, where the method has some.
    """

    gradient: Tensor
    weights: Tensor | None = None


class JacobianMethod(GradientMethod):
    """A method whose result is a direction. It needs K x d numbers of memory."""

    #: Whether the direction is sum_k w_k g_k of the gradients given and its weights, so that these stand for it.
    weighted: bool = False

    @abstractmethod
    def direction(self, jacobian: Tensor, losses: Tensor, tasks: Tensor) -> Direction:
        """The direction `[d]`.

        Args:
            jacobian: `[A, d]`, of the global batch, in the precision and on the device of the gradients.
            losses, tasks: as for `GramianMethod.weights`.
        """

    def allocate(self, num_parameters: int) -> None:
        """Called once, when d is known, before the first `direction`, for methods that remember vectors of length d."""
        return

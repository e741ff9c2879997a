"""The driver: a loss balancer is a scalar function F of the K losses; everything else follows by differentiation.

    F(losses [K], active [K], features [D] | None; theta) -> scalar
    coefficients c = dF/dlosses   what each task's loss is multiplied with in the one backward pass through the model
    router gradient = dF/dtheta   what the balancer's own optimizer descends

`detach()` inside F separates the two levels of a bilevel method. F costs K numbers; the model is not involved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_bilb.normalization import Normalization


class ObjectiveValue(NamedTuple):
    """What an objective returns.

    Attributes:
        value: scalar F, differentiable in the losses and in theta.
        weights: sigma `[K]`, where the method has weights.
        discrepancy: scalar f, where the method has one.
        edge_ratio: scalar, discrepancy weight over the value beyond which a coefficient can turn negative.
        collapsed: bool scalar, True when the weights have become so small that the method has turned into another.
    """

    value: Tensor
    weights: Tensor | None = None
    discrepancy: Tensor | None = None
    edge_ratio: Tensor | None = None
    collapsed: Tensor | None = None


class Objective(nn.Module, ABC):
    """A method: F with its parameters theta (`nn.Parameter`) and its other state (buffers), all built in float64.

    Subclasses take `(num_tasks, options)` and implement `forward`. Losses arrive normalised; entries outside `active`
    are finite but meaningless and must not enter F.
    """

    #: True when F needs losses > 0 after normalization (a logarithm); checked before the model is touched.
    takes_logarithm: ClassVar[bool] = False

    @abstractmethod
    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the tasks in the bool mask `active [K]` at the normalised `losses [K]`."""


class Derivatives(NamedTuple):
    """F at one point, detached, with its coefficients dF/dl `[K]` and dF/dtheta for each parameter of the objective."""

    output: ObjectiveValue
    coefficients: Tensor
    parameter_gradients: tuple[Tensor, ...]


def differentiate(
    objective: Objective, normalization: Normalization, losses: Tensor, active: Tensor, features: Tensor | None = None
) -> Derivatives:
    """Evaluate F(normalise(losses)) and differentiate it.

    Args:
        losses: `[K]`, global, detached or not; entries outside `active` are replaced.
        active: bool `[K]`, the tasks that F runs over.
        features: `[D]` or None.

    Returns:
        `Derivatives`; coefficients are zero outside `active`.

    Cost: one forward and backward of K numbers, no device synchronisation, no communication.
    """
    # Placeholder one: finite under every normalization, so that no NaN or infinity reaches the graph.
    point = torch.where(active, losses.detach(), 1.0).requires_grad_()
    with torch.enable_grad():
        output = objective(normalization(point), active, features)
        parameters = tuple(objective.parameters())
        gradients = torch.autograd.grad(output.value, (point, *parameters), allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip((point, *parameters), gradients, strict=True)]
    detached = ObjectiveValue._make(None if field is None else field.detach() for field in output)
    return Derivatives(detached, torch.where(active, filled[0], 0.0), tuple(filled[1:]))

"""Options that every loss balancer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_bilb.config.options import bounded, check_bounds
from hf_bilb.engine.constants import lowest, zero
from hf_bilb.engine.objective import Derivatives, ObjectiveValue
from hf_bilb.engine.records import MeanOf, NormalizationKind, ReferenceKind
from hf_bilb.engine.weighting import CoefficientScale
from hf_bilb.errors import OptionError

LearningRate = float | Literal["follow_model"]


@dataclass(frozen=True, kw_only=True)
class BalancerOptions:
    """Options of every loss balancer.

    Attributes:
        learning_rate: of the balancer's own parameters; `follow_model` takes the model optimizer's current one.
        optimizer: of the balancer's own parameters, `adam` (torch defaults) or `sgd`.
        normalization: of the losses before F: `none`, `initial` (l / l0), `rescaled`, `log`, `power`.
        power: p of `normalization: power`, (l / l0)^p / p.
        reference: when l0 is taken: `first_step`, `every_epoch` or `{mean_of: n}`.
        coefficient_floor: share of the plain sum's coefficient (at equal total) below which none falls; null = off.
        coefficient_scale: `as_defined`, or sum |c| over the tasks that F runs over brought to 1 or to their number.
    """

    learning_rate: LearningRate = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    normalization: NormalizationKind = "none"
    power: float = bounded(0.5, above=0)
    reference: ReferenceKind | MeanOf = "first_step"
    coefficient_floor: float | None = bounded(None, at_least=0, at_most=1, expected="a share in [0, 1]")
    coefficient_scale: CoefficientScale = "as_defined"

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        if self.learning_rate != "follow_model" and self.learning_rate < 0:
            raise OptionError(f"learning_rate: {self.learning_rate} is not valid, expected a number >= 0")
        check_bounds(self)

    @classmethod
    def prepared(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options of a recipe as fields of this class, for a method that takes keys which are none."""
        return options

    def require_positive_normalization(self, name: str, why: str = "takes the logarithm itself") -> None:
        """Raise `OptionError` for `normalization: log` (negative values) in a method that takes logarithms."""
        if self.normalization == "log":
            raise OptionError(f"normalization: 'log' is not valid, expected another one: {name} {why}")


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values [K]` where `mask [K]`, without boolean indexing (which would synchronise the device)."""
    return torch.where(mask, values, zero(values.dtype, values.device)).sum()


def sum_in_closed_form(losses: Tensor, active: Tensor) -> Derivatives:
    """F = sum of the `losses [K]` in `active [K]`, and its derivatives."""
    return Derivatives(ObjectiveValue(masked_sum(losses, active)), active.to(losses.dtype), ())


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax of `scores [K]` over those in `mask [K]`, zero elsewhere and where there is none."""
    # Finite, so that no NaN arises where nothing is in the mask.
    given = torch.where(mask, scores, lowest(scores.dtype, scores.device))
    return torch.where(mask, torch.softmax(given, dim=0), zero(scores.dtype, scores.device))

"""What happens to the coefficients dF/dl before the backward pass: floor, scale, the user's priors, in that order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hf_bilb.errors import OptionError

CoefficientScale = Literal["as_defined", "sum_to_one", "sum_to_k"]


class CoefficientRules(nn.Module):
    """Floor, scale and priors of the coefficients. They touch what the model descends, never what the router descends.

    * floor a: c_k >= a * mean |c| over the active tasks, the coefficient of a plain sum with the same total.
    * scale: sum |c| brought to 1 (`sum_to_one`) or to the number of active tasks, as in a plain sum (`sum_to_k`).
    * priors a_k: c_k <- a_k c_k; for `ls` the objective sum a_k l_k, for `si` sum a_k log l_k.

    Active are the tasks that F runs over. Held ones are among them: over the present task of a batch alone, every scale
    and floor would undo the balancing.

    State: `task_priors [K]`.
    """

    task_priors: Tensor
    zero: Tensor

    def __init__(
        self, num_tasks: int, floor: float | None, scale: CoefficientScale, task_priors: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.floor = floor
        self.scale = scale
        self.has_priors = task_priors is not None
        priors = [1.0] * num_tasks if task_priors is None else [float(prior) for prior in task_priors]
        if len(priors) != num_tasks:
            raise OptionError(f"task_priors: got {len(priors)} values, expected one for each of the {num_tasks} tasks")
        if any(not prior >= 0 for prior in priors):
            raise OptionError(f"task_priors: {priors} is not valid, expected numbers >= 0")
        # Not state: the priors are what the user says today, also after a resume.
        self.register_buffer("task_priors", torch.tensor(priors, dtype=torch.float64), persistent=False)
        # At hand where it is needed in every step: torch makes a new one of a Python number.
        self.register_buffer("zero", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(
        self, coefficients: Tensor, value: Tensor, losses: Tensor, present: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The coefficients `[K]` to apply, of all `active` tasks (zero elsewhere), and the value to report.

        With priors the reported value is F + sum (a_k - 1) c_k l_k over the `present` tasks: F in which task k counts
        a_k times, to first order (exactly sum a_k l_k for `ls`).
        """
        applied = coefficients
        if self.floor is not None:
            count = active.sum()
            floor = self.floor * applied.abs().sum() / count.clamp(min=1)
            applied = torch.where(active, torch.maximum(applied, floor), applied)
        if self.scale != "as_defined":
            total = applied.abs().sum()
            target = 1.0 if self.scale == "sum_to_one" else active.sum()
            applied = applied * torch.where(total > 0, target / total.clamp(min=torch.finfo(total.dtype).tiny), total)
        if self.has_priors:
            value = value + ((self.task_priors - 1) * applied * torch.where(present, losses, 0.0)).sum()
            applied = applied * self.task_priors
        return applied, value

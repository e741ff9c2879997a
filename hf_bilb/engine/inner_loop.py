"""The double loop of a method with two levels: z, what it takes off the router's gradient, and its measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import nn

from hf_bilb.engine.double_loop import LevelProbe, LowerLevel, LowerLevelReport
from hf_bilb.engine.objective import BilevelObjective, Derivatives, Scalar
from hf_bilb.engine.optimizer import OwnOptimizer
from hf_bilb.engine.reduction import GlobalBatch
from hf_bilb.engine.replay import MicroBatch, bare
from hf_bilb.errors import OptionError


class InnerLoop:
    """The inner loop of a `BilevelObjective`.

    Args:
        objective: the method.
        differentiate_at: differentiates a scalar of the objective's at a global batch.
        task_names: for messages.
        optimizer: of the objective's parameters.

    Attributes:
        level: z, once a model is bound and the method has a double loop.
        report: what the last update's double loop has seen.
    """

    def __init__(
        self,
        objective: BilevelObjective,
        differentiate_at: Callable[[GlobalBatch, Scalar], Derivatives],
        task_names: Sequence[str],
        optimizer: OwnOptimizer,
    ) -> None:
        self._objective = objective
        self._optimizer = optimizer
        self._probe = LevelProbe(objective, differentiate_at, task_names)
        self.level: LowerLevel | None = None
        self.report: LowerLevelReport | None = None

    @property
    def runs(self) -> bool:
        """Whether every update has an inner loop."""
        return self._objective.inner_steps > 0

    def bind(self, model: nn.Module) -> None:
        """Allocate z; the same model again keeps it."""
        if not self.runs:
            return
        if self.level is None or self.level.model is not bare(model):
            self.level = LowerLevel(model)
        else:
            self.level.given = model  # by now perhaps in a wrapper

    def correct(
        self, at_x: GlobalBatch | None, micro_batches: Sequence[MicroBatch] | None, group: dist.ProcessGroup | None
    ) -> None:
        """Take penalty_weight * grad_W g(W, z_N) off the router's gradient (Algorithm 2)."""
        if self.level is None or micro_batches is None:
            missing = "balancer.bind(model)" if self.level is None else "balancer.step(reevaluate=lambda: model(batch))"
            raise OptionError(f"lower_level: a double loop needs {missing}")
        inner_steps, rate = self._objective.inner_steps, self._objective.inner_learning_rate
        self.report, at_z = self._probe.compare(self.level, at_x, micro_batches, inner_steps, rate, group)
        self._optimizer.subtract(at_z.parameter_gradients, self._objective.penalty_weight)

    def diagnose(
        self,
        model: nn.Module,
        micro_batches: Sequence[MicroBatch],
        inner_steps: int,
        inner_learning_rate: float,
        group: dist.ProcessGroup | None,
    ) -> LowerLevelReport:
        """As `LossBalancer.diagnose_lower_level`."""
        level = LowerLevel(model)
        return self._probe.compare(level, None, micro_batches, inner_steps, inner_learning_rate, group)[0]

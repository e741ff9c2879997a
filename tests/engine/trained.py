"""A model, a balancer and batches for the tests of the double loop: `Trained` is a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.engine.weighting import surrogate_loss
from hf_bilb.losses.contract import TaskLosses
from tests.engine.algorithm_2 import X_RATE, D, Network, Part, flat, part, trainable

NAMES = ["a", "b", "c"]
OPTIONS: dict[str, Any] = {
    "activation": "sigmoid",
    "initial_logits": [0.4, -0.3, 1.1],
    "normalization": "none",
    "discrepancy_weight": 0.3,
    "pairs": "adjacent",
    "optimizer": "sgd",
    "learning_rate": 0.2,
    "lower_level": {"inner_steps": 3, "inner_learning_rate": 0.1, "penalty_weight": 2.0},
}
ADAM = {"optimizer": "adam", "learning_rate": 0.05}
FEATURES = {"router": "features", "num_features": D, "activation": "softmax"}
STEPS = 6


class Trained:
    """A model with a balancer in a loop of one's own."""

    def __init__(self, model: Network | None = None, absent_tasks: str = "skip", **options: Any) -> None:
        self.model = Network() if model is None else model
        self.balancer = build(absent_tasks, **options).bind(self.model)
        self.optimizer = torch.optim.SGD(trainable(self.model), lr=X_RATE)

    def update(self, parts: Sequence[Part], form: Callable[..., Any] = TaskLosses) -> None:
        """One update; `form` makes what `reevaluate` returns of losses, counts and features."""
        self.descend(parts)
        runs = [lambda part=part: form(*self.model(part)) for part in parts]
        self.balancer.step(reevaluate=runs[0] if len(runs) == 1 else runs)

    def descend(self, parts: Sequence[Part]) -> None:
        """The model's half of an update."""
        self.optimizer.zero_grad()
        batches = [TaskLosses(*self.model(part)) for part in parts]
        decision = self.balancer.decide(batches)
        for batch in batches:
            surrogate_loss(batch, decision).backward()
        self.optimizer.step()

    @property
    def x(self) -> Tensor:
        return flat(trainable(self.model))

    @property
    def z(self) -> Tensor:
        state = self.balancer.state_dict()
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return flat(state[f"lower_level.z.{name}"] for name in names)

    @property
    def w(self) -> Tensor:
        return flat(self.balancer.objective.parameters())


def build(absent_tasks: Any = "skip", **options: Any) -> LossBalancer:
    merged = {**OPTIONS, **options}
    return build_balancer("bilb", task_names=NAMES, dtype=torch.float64, absent_tasks=absent_tasks, **merged)


#: Batches of one part each: whole, with absent tasks, with a task that comes late; and of several parts.
WHOLE = [[part(t)] for t in range(STEPS)]
GAPS = [[part(t, missing=missing)] for t, missing in enumerate([(), (0,), (1, 2), (1,), (0, 2), ()])]
LATE = [[part(t, missing=missing)] for t, missing in enumerate([(2,), (2,), (), (0,), (2,), ()])]
PARTS = [[part(10 * t, 5), part(10 * t + 1, 2, missing=(t % 3,)), part(10 * t + 2, 4)] for t in range(STEPS)]

"""What each method costs, as registered, is what it does to a model: passes are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from hf_bilb import build_balancer, list_balancers
from hf_bilb.balancers import Cost, get_balancer_spec
from hf_bilb.balancers.registry import GRADIENT_METHODS

#: How many steps the inner loop of `N` takes.
N = 3
#: The options that `when` says in words, or not in full.
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("bilb", "lower_level: {inner_steps: N, ...}"): {"lower_level": {"inner_steps": N, "inner_learning_rate": 0.01}},
}
CASES = [(name, cost) for name in list_balancers() for cost in get_balancer_spec(name).costs]


class Counted(nn.Module):
    """Three losses, each in (0, 1); counts the passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.forwards = self.backwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += 1
        losses = self.body(inputs).sigmoid().mean(dim=0)
        if losses.requires_grad:
            losses.register_hook(self._count)
        return losses

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize(("name", "cost"), CASES, ids=[f"{name}-{cost.when}" for name, cost in CASES])
def test_passes_of_an_update(name: str, cost: Cost) -> None:
    torch.manual_seed(0)
    options = OPTIONS.get((name, cost.when)) or yaml.safe_load(f"{{{cost.when}}}")
    model = Counted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if name in GRADIENT_METHODS:
        options = {**options, "tasks_per_pass": 1}  # three at once would be seen as one pass
    balancer = build_balancer(name, 3, **options).bind(model, optimizer)
    inputs = torch.randn(5, 4)
    for _ in range(3):
        model.forwards = model.backwards = 0
        optimizer.zero_grad()
        balancer.look_ahead(lambda: model(inputs))  # nothing, for methods that do not
        balancer.backward(model(inputs))
        optimizer.step()
        balancer.step(reevaluate=lambda: model(inputs))
    expected = [
        number if isinstance(number, int) else eval(number, {"N": N, "K": 3})
        for number in (cost.forwards, cost.backwards)
    ]
    assert [model.forwards, model.backwards] == expected

"""How many torch operations a step of a balancer adds to that of a plain sum: on a GPU each is a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bilb import build_balancer

K = 40
#: At most so many more, in a steady step of a loop of one's own with complete labels.
AT_MOST = {"ls": 24, "si": 40, "gls": 51, "imtl_l": 54, "uw": 55, "stch": 93, "bilb": 134, "famo": 150}


class Counting(TorchDispatchMode):
    """Counts operations that do something: a view of a tensor, or a question about types, is none."""

    NOTHING = ("detach", "promote_types", "view", "expand", "t", "unsqueeze", "select", "slice", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.NOTHING:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[Tensor, Tensor], object]) -> list[str]:
    """Those of the sixth step."""
    model = torch.nn.Linear(3, K)
    counts = torch.full((K,), 8.0)
    for _ in range(5):
        step(model(torch.ones(8, 3)).square().mean(0), counts)
    losses = model(torch.ones(8, 3)).square().mean(0)
    with Counting() as counting:
        step(losses, counts)
    return counting.names


@pytest.mark.parametrize("name", AT_MOST)
def test_operations_of_a_step(name: str) -> None:
    balancer = build_balancer(name, K, **({"reevaluate": "next_batch"} if name == "famo" else {}))
    balancer.on_epoch_begin(0)

    def step(losses: Tensor, counts: Tensor) -> None:
        balancer.backward(losses, counts)
        balancer.step()

    added = len(operations(step)) - len(operations(lambda losses, counts: losses.sum().backward()))
    assert added <= AT_MOST[name]


def test_counters_and_references_are_not_looked_at_in_every_step() -> None:
    balancer = build_balancer("ls", K)
    names = operations(lambda losses, counts: balancer.backward(losses, counts))
    assert "stack" not in names and "abs" not in names  # of the guards
    assert names.count("lt") == 0  # of the references

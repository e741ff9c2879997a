"""`balancer.backward` leaves in `.grad` what the method makes of the gradients, step after step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bilb import build_balancer
from tests.balancers.gradient.reference import GRAMIAN, JACOBIAN, build, direction_of, error, gradients, load

FLOAT = torch.float64


class Losses(nn.Module):
    """K losses J theta + c at theta = 0, whose gradients are J."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=FLOAT))

    def forward(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        return jacobian @ self.theta + losses


def walk(name: str, jacobians: Tensor, losses: Tensor, **options: Any) -> list[Tensor]:
    """`.grad` of theta in each step, theta staying where it is."""
    model = Losses(jacobians.shape[2])
    balancer = build_balancer(name, jacobians.shape[1], dtype=FLOAT, **options).bind(model)
    found = []
    for jacobian, row in zip(jacobians, losses, strict=True):
        model.zero_grad()
        balancer.backward(model(jacobian, row))
        assert model.theta.grad is not None
        found.append(model.theta.grad.clone())
        balancer.step()
    return found


#: Own parameters that an optimizer moves between two steps.
LEARNS = {"gradnorm": {"learning_rate": 0.0}}


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11])
@pytest.mark.parametrize("name", [*GRAMIAN, *JACOBIAN])
def test_every_method(name: str, num_tasks: int) -> None:
    jacobians = torch.stack([gradients(num_tasks, 2 * num_tasks, seed=t) for t in range(4)])
    losses = 0.5 + torch.rand(4, num_tasks, generator=torch.Generator().manual_seed(0), dtype=FLOAT)
    options = LEARNS.get(name, {})
    method = build(name, num_tasks, **options)
    if hasattr(method, "allocate"):
        method.allocate(jacobians.shape[2])
        method.allocate = lambda size: None
    for found, jacobian, row in zip(walk(name, jacobians, losses, **options), jacobians, losses, strict=True):
        assert error(found, direction_of(method, jacobian, row)) <= 1e-11
        method.end_step()


@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize(
    ("file", "name", "options", "key", "tolerance"),
    [
        ("cagrad", "cagrad", {"c": 0.4}, "grad_unclipped_0.4", 1e-4),
        ("cagrad", "cagrad", {"c": 0.4, "max_norm": 1.0}, "grad_clipped1_0.4", 1e-4),
        ("pcgrad", "pcgrad", {"order": "identity"}, "grad_identity", 1e-9),
        ("imtl_g", "imtl_g", {}, "grad", 1e-9),
        ("fairgrad", "fairgrad", {"alpha": 2.0}, "grad_2.0", 1e-6),
        ("aligned_mtl", "aligned_mtl", {}, "grad", 1e-9),
        ("upgrad", "upgrad", {}, "grad", 1e-9),
        ("moco", "moco", {}, "grad", 1e-9),
        ("gradvac", "gradvac", {}, "grad", 1e-8),
        ("nashmtl", "nash_mtl", {}, "grad", 1e-5),
        ("nashmtl", "nash_mtl", {"max_norm": 1.0}, "grad_clipped1", 1e-5),
        ("mgda_official", "mgda", {}, "w_exact_none", 1e-9),
    ],
    ids=lambda value: str(value)[:16],
)
def test_recorded_gradients(
    num_tasks: int, file: str, name: str, options: dict[str, Any], key: str, tolerance: float
) -> None:
    case = load(f"{file}_K{num_tasks}")
    jacobians, losses, expected = (
        case[field] if case["J"].ndim == 3 else case[field][None] for field in ("J", "losses", key)
    )
    if key.startswith("w_"):
        expected = num_tasks * expected[0] @ jacobians
    for found, recorded in zip(walk(name, jacobians, losses, **options), expected, strict=True):
        assert error(found, recorded) < tolerance

"""Methods by name on given gradients, and the recorded directions of public code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.registry import get_balancer_spec, resolve_options
from hf_bilb.engine.gradient_method import Direction, GramianMethod, JacobianMethod

FOLDER = Path(__file__).parents[2] / "parity_data" / "gradient"

GRAMIAN = "aligned_mtl cagrad fairgrad gradnorm gradvac imtl_g mgda modo nash_mtl pcgrad sdmgrad upgrad".split()
JACOBIAN = "graddrop moco torchjd".split()


def load(name: str) -> dict[str, Any]:
    """The arrays of a file as tensors, numbers as numbers."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key].copy()) if file[key].shape else file[key].item() for key in file}


def build(name: str, num_tasks: int, **options: Any) -> Any:
    """The method itself, without a balancer."""
    return get_balancer_spec(name).objective(num_tasks, resolve_options(name, options))


def weights_of(method: GramianMethod, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
    """w for all tasks of `jacobian`."""
    losses = torch.ones(len(jacobian), dtype=torch.float64) if losses is None else losses
    return method.weights(jacobian @ jacobian.T, losses, torch.arange(len(jacobian)))


def direction_of(method: Any, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
    """The direction, of either kind of method, for all tasks of `jacobian`."""
    losses = torch.ones(len(jacobian), dtype=torch.float64) if losses is None else losses
    if isinstance(method, JacobianMethod):
        method.allocate(jacobian.shape[1])
        found = method.direction(jacobian, losses, torch.arange(len(jacobian)))
        assert isinstance(found, Direction)
        return found.gradient
    return weights_of(method, jacobian, losses) @ jacobian


def gradients(num_tasks: int, size: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Random gradients `[K, d]` that agree a little, their norms over 2 x `spread` orders of magnitude."""
    generator = torch.Generator().manual_seed(1000 * num_tasks + size + 7 * seed)
    drawn = torch.randn(num_tasks + 1, size, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-spread, spread, num_tasks, dtype=torch.float64)
    return (drawn[1:] + 0.2 * drawn[0]) * scales[:, None]


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number expected."""
    return float((found - expected).abs().max() / expected.abs().max())

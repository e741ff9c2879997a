"""IMTL-G, impartial multi-task learning, the part that looks at gradients. Liu et al., ICLR 2021.

    g = sum_k w_k g_k with sum_k w_k = 1 and equal projections  g . g_k / |g_k|  for all k
    <=>  w = C^-1 1 / n, divided by its sum,   C = G / (n n^T),  n_k = |g_k|

    w -> the weights (some may be negative), C -> the cosines of the gradients

The paper and the official code write it with differences to the first task, which is the same to rounding error.

The cosines are singular where gradients depend on each other: then it is the pseudoinverse of C (torchjd: of G, which
differs then by how the tasks' norms are weighed; FAMO's code adds 1e-8 to the diagonal). Where the w so found add up to
zero, as with opposite gradients, no such g exists, and all weights are equal. A task with a zero gradient takes no part
and gets the mean of the others' weights, for its head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import without_zero_gradients
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod

#: The weights are equal where their sum is a smaller share than this of the sum of their absolute values.
_CANCELLED = 1e-8


@dataclass(frozen=True, kw_only=True)
class ImtlGOptions(GradientOptions):
    """Options of `imtl_g`: those of every gradient method."""


@register_balancer(
    "imtl_g", options=ImtlGOptions, paper="Liu et al., ICLR 2021, IMTL-G", costs=(Cost(1, "K", memory="K d"),)
)
class ImtlG(GramianMethod):
    """IMTL-G. No state. The weights add up to 1."""

    def __init__(self, num_tasks: int, options: ImtlGOptions) -> None:
        super().__init__()

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """w `[A]`."""
        if not (gramian.diagonal() > 0).any():
            return torch.full_like(losses, 1 / len(losses))
        return without_zero_gradients(gramian, equal_projections)


def equal_projections(gramian: Tensor) -> Tensor:
    """w with sum 1 whose sum of gradients has equal projections on them; none of these may be zero."""
    norms = gramian.diagonal().sqrt()
    cosines = gramian / norms[:, None] / norms
    values, vectors = torch.linalg.eigh(cosines)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    # In units of the smallest norm: the sum decides the scale in any case.
    found = (vectors @ (inverse * vectors.sum(dim=0))) * (norms.min() / norms)
    total = found.sum()
    if total.abs() <= _CANCELLED * found.abs().sum():
        return torch.full_like(found, 1 / len(found))
    return found / total

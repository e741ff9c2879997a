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

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import Array, array, quietly, without_zero_gradients
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
        if not (array(gramian).diagonal() > 0).any():
            return torch.full_like(losses, 1 / len(losses))
        return torch.from_numpy(without_zero_gradients(array(gramian), equal_projections))


@quietly
def equal_projections(gramian: Array) -> Array:
    """w with sum 1 whose sum of gradients has equal projections on them; none of these may be zero."""
    norms = np.sqrt(gramian.diagonal())
    values, vectors = np.linalg.eigh(gramian / norms[:, None] / norms)
    kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
    inverse = np.where(kept, 1 / values, 0.0)
    # In units of the smallest norm: the sum decides the scale in any case.
    found: Array = (vectors @ (inverse * vectors.sum(axis=0))) * (norms.min() / norms)
    total = found.sum()
    if abs(total) <= _CANCELLED * np.abs(found).sum():
        return np.full_like(found, 1 / len(found))
    return found / total

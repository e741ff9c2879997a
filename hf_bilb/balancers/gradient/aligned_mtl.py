"""Aligned-MTL, independent component alignment. Senushkin et al., CVPR 2023 (arXiv 2305.19000).

    G = V diag(s) V^T,   B = sqrt(c) V diag(s)^-1/2 V^T,   w = B 1

    w -> the weights, s -> the eigenvalues of G above zero, c -> `scale_mode`: the smallest, the median or the mean s

The rows of B J are orthogonal and of one length: the system of gradients has the condition number 1. Official code and
LibMTL sum these rows as here, torchjd takes their mean: ours is K times torchjd's. An eigenvalue is zero below
K s_max times the machine precision, as in all three. Gradients that are all zero get weights of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import array, normalised
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.engine.gradient_method import GradientOptions, GramianMethod, HeadWeights


@dataclass(frozen=True, kw_only=True)
class AlignedOptions(GradientOptions):
    """Options of `aligned_mtl`.

    Attributes:
        scale_mode: which squared length the aligned gradients get: the smallest (`min`), the `median` or the mean
            (`rmse`) of the eigenvalues of G.
    """

    scale_mode: Literal["min", "median", "rmse"] = "min"
    heads: HeadWeights = "sum"


@register_balancer(
    "aligned_mtl",
    options=AlignedOptions,
    paper="Senushkin et al., CVPR 2023 (arXiv 2305.19000)",
    costs=(Cost(1, "K", memory="K d"),),
)
class AlignedMtl(GramianMethod):
    """Aligned-MTL. No state."""

    def __init__(self, num_tasks: int, options: AlignedOptions) -> None:
        super().__init__()
        self._scale_mode = options.scale_mode

    @torch.no_grad()
    def weights(self, gramian: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """w `[A]`. It does not change with the scale of G."""
        scaled, scale = normalised(array(gramian))
        if scale == 0:
            return torch.ones_like(losses)
        values, vectors = np.linalg.eigh(scaled)
        kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
        values, vectors = values[kept], vectors[:, kept]
        # Of an even number the median is the lower one, as in torch.
        chosen = {"min": values[0], "median": values[(len(values) - 1) // 2], "rmse": values.mean()}[self._scale_mode]
        return torch.from_numpy(vectors @ (vectors.sum(axis=0) * np.sqrt(chosen / values)))

"""Whether a model is still worth keeping."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_bilb.engine.reduction import all_reduce_sum
from hf_bilb.trainer.sharded import local_part


def weights_are_finite(model: nn.Module, device: torch.device) -> bool:
    """Whether every trainable parameter is finite and no buffer holds a NaN, on all ranks.

    Frozen parameters and buffers may hold infinities on purpose (masks).

    Args:
        device: of the process group's communication.

    Cost: each tensor is read once, where it lies; one host read and, on several ranks, one all-reduce of one number.
    """
    fine = [local_part(p).isfinite().all() for p in model.parameters() if p.requires_grad and _is_float(p)]
    fine += [~local_part(b).isnan().any() for b in model.buffers() if _is_float(b)]
    if not fine:
        return True
    bad = (~torch.stack([flag.to(device) for flag in fine])).sum().float()
    return not bool(all_reduce_sum(bad))


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.is_meta

"""Parameters that lie in parts on several ranks: FSDP2's and those of DeepSpeed's ZeRO stage 3."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, detached; of ZeRO-3's parameters, which are empty between two steps, too."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    return getattr(tensor, "ds_tensor", tensor).detach()


def reshard(model: nn.Module) -> None:
    """Give the whole parameters back that a forward pass without a backward pass leaves in an FSDP2 model.

    While they are there, `model.parameters()` are they, and not those of the optimizer: `model.zero_grad()` would leave
    the gradients of the step where they are.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

"""Parameters and gradients that lie in parts on several ranks: under FSDP2, and under DeepSpeed's ZeRO."""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_bilb.engine.reduction import data_parallel_size
from hf_bilb.errors import TaskLossError


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


def find_unused(model: nn.Module) -> None:
    """Let FSDP2 reduce zeros for the parameters that a rank's losses do not reach: heads whose tasks it has no labels
    of, while another rank has. Otherwise the ranks reduce other numbers of gradients, and die or wait for ever."""
    for module in model.modules():
        # Since torch 2.13.
        if isinstance(module, FSDPModule) and hasattr(module, "set_reduce_scatter_unused_params"):
            module.set_reduce_scatter_unused_params(True, recurse=False)


def check_same_reach(loss: Tensor, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise `TaskLossError`, on all ranks, where the ranks' backward passes reach different parameters.

    ZeRO's stages 2 and 3 add the ranks' gradients up in the order in which they come: other heads on one rank than on
    another are a wrong sum, or an endless wait. Parameters that no rank reaches are fine.

    Cost: a walk over the graph on the host, one all-reduce of two numbers and a host read.
    """
    if data_parallel_size() == 1:
        return
    reached = _leaves(loss)
    unreached = [name for name, p in named_parameters if p.requires_grad and id(p) not in reached]
    code = crc32("\n".join(unreached).encode())
    bounds = torch.tensor([code, -code], device=loss.device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if int(bounds[0]) != -int(bounds[1]):
        first = repr(unreached[0]) if unreached else "nothing"
        shown = f"{first} and {len(unreached) - 1} more" if len(unreached) > 1 else first
        raise TaskLossError(
            f"losses: the ranks reach different parameters (this one leaves out: {shown}), which ZeRO's stages 2 and 3 "
            "add up wrongly; run every head on every batch and return its outputs, or use stage 1, FSDP2 or "
            "DistributedDataParallel"
        )


def _leaves(loss: Tensor) -> set[int]:
    """The ids of the tensors that the backward pass of `loss` ends in."""
    found, seen = set(), set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting += [following for following, _ in node.next_functions]
    return found

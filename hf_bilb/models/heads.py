"""Task heads without a loop over tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_OF_PATTERNS = re.compile(r"[()*+?{}|^$\[\]\\]")


def head_name(task: str) -> str:
    """The attribute that holds the task's head: `head_<task>`, and for signs of a pattern their numbers: `_28` for `(`.

    transformers takes the names of weights for regular expressions when it loads them.
    """
    return "head_" + _OF_PATTERNS.sub(lambda sign: f"_{ord(sign[0]):x}", task)


def joined_outputs(heads: Sequence[nn.Module], features: Tensor) -> Tensor:
    """The outputs of linear heads on the same features, one after the other: `[..., D] -> [..., sum of sizes]`.

    One matrix product, where every head is a plain `nn.Linear`. Where one is wrapped (an adapter, `modules_to_save` of
    peft), quantised, or watched by hooks, each is called as the module that it is.

    Cost: a copy of the weights, `sum of sizes x D` numbers, forward and backward, for K - 1 products less.
    """
    if not all(map(_is_plain, heads)):
        return torch.cat([head(features) for head in heads], dim=-1)
    weights, biases = zip(*((head.weight, head.bias) for head in heads), strict=True)
    return functional.linear(features, torch.cat(weights), torch.cat(biases))


def _is_plain(head: nn.Module) -> bool:
    """Whether calling it is nothing but its matrix product. (What accelerate hooks has a `forward` of its own.)"""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return type(head) is nn.Linear and head.bias is not None and not any(hooks) and "forward" not in vars(head)


class TaskHeads(nn.Module):
    """K heads of one hidden layer each, computed together: `[B, D] -> [B, K]`.

    All heads read the same representation, so their K hidden layers of P units are one linear map to K·P units; the
    output layers are one contraction with a `[K, P]` matrix. No unit of one head reaches another head's output.

    Cost: two kernels forward whatever K is; K·P·(D + 2) + K parameters.
    """

    def __init__(self, num_features: int, num_tasks: int, head_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_features, num_tasks * head_size)
        self.weight = nn.Parameter(torch.empty(num_tasks, head_size))
        self.bias = nn.Parameter(torch.empty(num_tasks))
        self.reset_output_layers()

    def reset_output_layers(self) -> None:
        """Small weights, zero biases: the first predictions are close to 0, the mean of standardised labels.

        So the first loss of every task is close to its variance, which makes `normalization: initial` (loss / first
        loss) the part of the variance that is not explained.
        """
        nn.init.normal_(self.weight, std=0.1 / self.weight.shape[1] ** 0.5)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """`features [B, D]` -> predictions `[B, K]`."""
        hidden = functional.silu(self.hidden(features)).unflatten(1, self.weight.shape)
        return torch.einsum("bkp,kp->bk", hidden, self.weight) + self.bias

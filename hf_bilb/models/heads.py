"""Task heads without a loop over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models.base import MultiTaskModel
from hf_bilb.models.outputs import MultiTaskOutput


def head_name(task: str) -> str:
    """The attribute that holds the task's head."""
    return f"head_{task}"


class TypedTasksModel(MultiTaskModel):
    """A model with tasks of any types: a linear head for each, its attribute `head_<task>`, and their losses.

    Tasks of rows read one vector per row, tasks of tokens one per token; all heads that read the same are one matrix
    product. Every head takes part in every batch, with zero gradients where its task has no label, so that
    `DistributedDataParallel` needs no search for unused parameters.
    """

    def _add_heads(self, tasks: Mapping[str, TaskType], num_features: int, dropout: float = 0.0) -> None:
        """Make the heads, in the order of the tasks, with dropout before them, and the losses."""
        self._losses = MixedLosses(tasks)
        self._of_tokens = {name: task.items == "tokens" for name, task in tasks.items()}
        self.dropout = nn.Dropout(dropout)
        for name, task in tasks.items():
            self.add_module(head_name(name), nn.Linear(num_features, task.size))

    @property
    def has_token_tasks(self) -> bool:
        """Whether some task is of tokens."""
        return any(self._of_tokens.values())

    def _heads_output(
        self,
        features: Tensor,
        labels: Tensor | None,
        return_dict: bool | None,
        token_features: Tensor | None = None,
        tag_labels: Tensor | None = None,
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """What `forward` returns.

        Args:
            features: `[B, D]`, what the heads of tasks of rows read, after dropout.
            labels, tag_labels: of the batch; without both, there are predictions alone.
            return_dict: False for a plain tuple of what is there; None follows the config.
            token_features: `[B, T, D]`, what `features` are made of, and what the heads of tasks of tokens read; None:
                there is no such task.

        Returns:
            `MultiTaskOutput`: `logits` in at least float32, `[B, K]` where every task has one output, else a tuple with
            one tensor per task; with labels of any task also the losses (`hf_bilb.losses.mixed`).
        """
        rows = self._joined_logits(features, of_tokens=False)
        tokens = None if token_features is None else self._joined_logits(token_features, of_tokens=True)
        losses = None
        if labels is not None or tag_labels is not None:
            losses = self._losses.of_joined(rows, tokens, labels, tag_labels)
        logits = self._logits_by_task(rows, tokens)
        return self._output(logits, losses, features, return_dict, read=token_features)

    def _joined_logits(self, features: Tensor, of_tokens: bool) -> Tensor | None:
        """The outputs of all tasks of rows, or of tokens; None where there is no such task."""
        heads = [self.get_submodule(head_name(name)) for name, it_is in self._of_tokens.items() if it_is is of_tokens]
        if not heads:
            return None
        outputs = joined_outputs(heads, self.dropout(features))
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def _logits_by_task(self, rows: Tensor | None, tokens: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        if rows is not None and tokens is None and rows.shape[1] == len(self._of_tokens):
            return rows
        of_rows = iter(() if rows is None else rows.split(self._losses.row_sizes, dim=1))
        of_tokens = iter(() if tokens is None else tokens.split(self._losses.token_sizes, dim=2))
        return tuple(next(of_tokens if it_is else of_rows) for it_is in self._of_tokens.values())


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
        hidden = functional.silu(self.hidden(features)).view(len(features), *self.weight.shape)
        return torch.einsum("bkp,kp->bk", hidden, self.weight) + self.bias

"""The base of models with tasks of different types: linear heads, computed together, and their losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models.base import MultiTaskModel
from hf_bilb.models.heads import head_name, joined_outputs
from hf_bilb.models.outputs import MultiTaskOutput


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

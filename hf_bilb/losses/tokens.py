"""Losses of K tasks over tokens, from the logits of one causal language model and one cross-entropy pass.

    l_k = 1/N_k * sum over the tokens t of task k of -log softmax(logits_{t-1})[label_t],    N_k = their number

What is large in a language model's loss are the logits `[B, T, V]` and what the cross-entropy makes of them, in
float32. They are made once, as `transformers` makes them; the K means are taken of the `[B, T]` losses of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import TaskLossError

#: Labels with this value are no items: prompts, padding, the first token of an example.
IGNORED = -100
#: Name of the label column. A column `labels` would be taken by the model's forward, for a loss of its own.
TOKEN_LABELS = "token_labels"
# Tokens that are summed one after the other in float32; the sums of such blocks are then added pairwise. One running
# sum over a batch of 100,000 tokens would be wrong in the fifth digit.
_BLOCK = 64


def token_task_losses(logits: Tensor, labels: Tensor, task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy per task over its tokens; the label at `t` is predicted by the logits at `t - 1`.

    Args:
        logits: `[B, T, V]`, any floating dtype; half precision is raised to float32, as `transformers` does.
        labels: `[B, T]` int64, not shifted, -100 where the token is no item. The first of a row never is one.
        task_ids: `[B]` int64, the task of each row, or `[B, T]`, of each token (packed rows); 0 to K - 1 wherever there
            is a label, anything elsewhere.
        num_tasks: K.

    Returns:
        `losses [K]` in nats, in the dtype of the cross-entropy, zero (with zero gradients) for a task without tokens,
        and `num_items [K]`, its tokens.

    Raises:
        TaskLossError: shapes that do not fit together.
        IndexError: on a CPU, a task id out of range (on a GPU, which is not waited for, the device's own error).

    Cost: memory and time of the cross-entropy of one task with the same tokens, and O(B T + K B T / 64) numbers
    whatever V is. No device synchronisation. The gradient is exact; on a GPU the order of the sums is not fixed.
    """
    _check_shapes(logits, labels, task_ids)
    # The labels are shifted, not the logits: a slice of those would be a copy.
    targets = shifted_labels(labels)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = functional.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    groups = _groups(targets, task_ids)
    num_blocks = -(-values.numel() // _BLOCK)
    blocks = torch.arange(values.numel(), device=values.device) // _BLOCK
    sums = values.new_zeros(num_tasks * num_blocks).index_add(0, groups * num_blocks + blocks, values)
    num_items = _count(targets, groups, num_tasks)
    means = sums.view(num_tasks, num_blocks).sum(dim=1) / num_items.clamp(min=1).to(values.dtype)
    return means, num_items.to(torch.promote_types(values.dtype, torch.float32))


def token_item_counts(labels: Tensor, task_ids: Tensor, num_tasks: int) -> Tensor:
    """The `num_items [K]` (int64) of `token_task_losses`, before there are logits: what accumulation is exact by."""
    targets = shifted_labels(labels)
    return _count(targets, _groups(targets, task_ids), num_tasks)


def shifted_labels(labels: Tensor) -> Tensor:
    """`[B, T]`: at `t` the label of `t + 1`, -100 at the end."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _groups(targets: Tensor, task_ids: Tensor) -> Tensor:
    """`[B * T]`: the task of each shifted label, 0 where there is none."""
    if task_ids.ndim == 1:
        of_targets = task_ids[:, None].expand_as(targets)
    else:
        of_targets = functional.pad(task_ids[:, 1:], (0, 1))
    return torch.where(targets.ne(IGNORED), of_targets, 0).reshape(-1)


def _count(targets: Tensor, groups: Tensor, num_tasks: int) -> Tensor:
    there = targets.reshape(-1).ne(IGNORED).long()
    return there.new_zeros(num_tasks).index_add(0, groups, there)


def _check_shapes(logits: Tensor, labels: Tensor, task_ids: Tensor) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise TaskLossError(
            f"{TOKEN_LABELS}: got shape {tuple(labels.shape)} for logits {tuple(logits.shape)}, expected [B, T] and "
            "[B, T, V]"
        )
    if task_ids.shape not in (labels.shape[:1], labels.shape):
        raise TaskLossError(
            f"task_ids: got shape {tuple(task_ids.shape)}, expected {list(labels.shape[:1])}, a task for each row, or "
            f"{list(labels.shape)}, one for each token"
        )


@dataclass(frozen=True)
class TokenLosses:
    """`token_task_losses` as the Trainer's `task_loss_func`, and their counts as its `task_item_counts`.

        losses = TokenLosses(num_tasks=3)
        BilevelMTLTrainer(model=AutoModelForCausalLM..., task_loss_func=losses, task_item_counts=losses.count, ...)

    with `label_names=["token_labels", "task_ids"]` and these columns in every batch.

    Attributes:
        num_tasks: K.
    """

    num_tasks: int

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """`losses [K]` and `num_items [K]` of the model's `logits`.

        Raises:
            TaskLossError: the batch lacks a column, or the model has computed a loss of its own: from a column
                `labels`, which would double the memory of the logits, or for its experts, which would be left out.
        """
        if outputs.get("loss") is not None:
            raise TaskLossError(
                "labels: the model has computed a loss of its own from this column, at the memory and time of a second "
                f"cross-entropy; call the column {TOKEN_LABELS!r}"
            )
        if outputs.get("aux_loss") is not None:
            raise TaskLossError(
                "aux_loss: the model's loss for its experts would be left out; its config needs output_router_logits: "
                "false"
            )
        return token_task_losses(outputs["logits"], *_columns(batch), self.num_tasks)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """`[K]`, the tokens of each task in a batch; raises `TaskLossError` where a column is missing."""
        return token_item_counts(*_columns(batch), self.num_tasks)


def _columns(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    for name in (TOKEN_LABELS, "task_ids"):
        if name not in batch:
            raise TaskLossError(f"{name}: is no column of the batch, which has {', '.join(batch)}")
    return batch[TOKEN_LABELS], batch["task_ids"]

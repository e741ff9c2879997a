"""How many items stand behind a task's loss in a batch: one place decides, for training, evaluation, logs and ranks.

Losses are means; what they weigh against those of other batches and ranks is their number of items: in this order,

1. `num_items` that the model, or the `task_loss_func`, gives with the losses;
2. what the user's `task_item_counts(batch)` returns;
3. the valid labels in the task's label column: neither NaN nor -100 (nor, in a column of integers, `ignore_index`).
   For a column of vectors, tokens or pixels these are its entries. That is the count behind a mean over the labelled
   rows (tokens, pixels), which a loss that skips missing labels is;
   Where not every task has a column, and the batch has `task_ids` `[B]`, they are those of the task's rows;
4. the batch size, or the number of the task's rows. It stands in for tasks whose labels no column tells, and is right
   where none is missing.

A task whose labels are all missing has no items: it is absent, and its loss is ignored, NaN included. Not so a NaN
gradient: a mean over an empty selection (`errors[labelled].mean()`) and `cross_entropy` have none, but the mean of
errors that are NaN, or their sum over a count of zero, has; the masked losses of `hf_bilb.losses.contract` are safe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from hf_bilb.engine import reduction
from hf_bilb.engine.checks import NOT_FINITE_ADVICE
from hf_bilb.errors import TaskLossError
from hf_bilb.losses.contract import short_names
from hf_bilb.losses.masked import valid_labels
from hf_bilb.trainer.task_datasets import TASK_IDS

logger = logging.getLogger(__name__)


class ItemCounts(NamedTuple):
    """Items of a batch on this rank.

    Attributes:
        num_items: `[K]`.
        assumed: names of the tasks for which the batch size stands in.
    """

    num_items: Tensor
    assumed: tuple[str, ...]


class ItemCounter:
    """How many items each task has in a batch, from the batch alone (2 to 4 above). No device synchronisation.

    Args:
        given: the user's `task_item_counts(batch) -> [K]`, or None.
        label_names: the label columns.
        task_names: the K tasks.
        ignore_index: an integer label that stands for a missing one, in addition to -100; None = there is no other.
    """

    def __init__(
        self,
        given: Callable[[Mapping[str, Any]], Tensor] | None,
        label_names: Sequence[str],
        task_names: Sequence[str],
        ignore_index: int | None = None,
    ) -> None:
        self._given = given
        self._label_names = list(label_names)
        self._task_names = tuple(task_names)
        self._ignore_index = ignore_index
        self._said = False

    def count(self, batch: Mapping[str, Any]) -> ItemCounts:
        """Counts of a batch; raises `TaskLossError` when `task_item_counts` returns something else than `[K]`."""
        num_tasks = len(self._task_names)
        if self._given is not None:
            counts: object = self._given(batch)
            if isinstance(counts, Mapping) and counts.keys() == set(self._task_names):
                counts = torch.stack([torch.as_tensor(counts[name]).reshape(()) for name in self._task_names])
            if not isinstance(counts, Tensor) or counts.shape != (num_tasks,):
                raise TaskLossError(
                    f"task_item_counts: returned {counts!r}, expected a tensor [{num_tasks}], or a dict with a number "
                    "for each task"
                )
            return ItemCounts(counts, ())
        columns = label_columns(batch, self._label_names, self._task_names)
        if isinstance(columns, Tensor):
            valid = valid_labels(columns, self._ignore_index)
            return ItemCounts(valid.sum(dim=(0, *range(2, valid.ndim))), ())
        told = _valid_numbers(list(columns.values()), self._ignore_index)
        if len(columns) == num_tasks:
            return ItemCounts(told, ())
        task_ids = task_ids_of(batch)
        if task_ids is not None:
            return self._of_rows(batch, task_ids)
        # By index, so that nothing but K numbers is made.
        places = [k for k, name in enumerate(self._task_names) if name in columns]
        num_items = torch.full((num_tasks,), int(batch_size(batch)), device=told.device)
        num_items[places] = told
        return ItemCounts(num_items, tuple(name for name in self._task_names if name not in columns))

    def _of_rows(self, batch: Mapping[str, Any], task_ids: Tensor) -> ItemCounts:
        """Each task's labels in its own rows of the batch, or these rows where there is no label column."""
        given = [batch.get(name) for name in self._label_names if name != TASK_IDS]
        labels = [x for x in given if isinstance(x, Tensor) and x.shape[:1] == task_ids.shape]
        valid = [valid_labels(column, self._ignore_index).reshape(len(task_ids), -1).sum(dim=1) for column in labels]
        of_row = sum(valid[1:], valid[0]) if valid else torch.ones_like(task_ids)
        num_items = torch.zeros(len(self._task_names), dtype=torch.int64, device=task_ids.device)
        return ItemCounts(num_items.index_add_(0, task_ids, of_row), () if labels else self._task_names)

    def say_assumed(self, tasks: Iterable[str]) -> None:
        """Say, once, that the batch size stands in for the counts of `tasks`, where that can make a difference."""
        if self._said:
            return
        self._said = True
        logger.warning(
            "num_items: nothing tells how many labels %s in a batch (label_names: %s); the batch size is taken, which "
            "is right only where no label is missing; return num_items with the losses, or give the Trainer "
            "task_item_counts(batch) -> [K]",
            tasks_have(tuple(tasks)),
            self._label_names,
        )

    def explain(self, message: str, task: str, batches: Iterable[Mapping[str, Any]]) -> str:
        """A message about a loss that is not finite, with advice where NaN labels of this update can be the cause.

        Args:
            message: of `Validity.describe`, about `task`.
            batches: this rank's micro-batches of the update.

        Cost: reads the labels on the host, and one all-reduce of two numbers (every rank raises).
        """
        if task not in self._task_names or f"{task!r} is nan" not in message:
            return message
        missing, labels = self._nan_labels(task, batches)
        if missing == 0:
            return message
        return (
            f"{message.removesuffix(f'; {NOT_FINITE_ADVICE}')}; {missing} of its {labels} labels in this step are NaN, "
            "which stands for missing ones: leave them out before the mean (masked_mse, masked_l1, "
            "masked_bce_with_logits of hf_bilb.losses.masked do); if they are, fix the data or the model"
        )

    def _nan_labels(self, task: str, batches: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
        found = []
        for batch in batches:
            columns = label_columns(batch, self._label_names, self._task_names)
            if isinstance(columns, Tensor):
                own = [columns[:, self._task_names.index(task)]]
            else:
                given = [batch.get(name) for name in self._label_names]
                # Where no column is known to be the task's, any of them may be.
                own = [columns[task]] if task in columns else [label for label in given if isinstance(label, Tensor)]
            found += [label for label in own if label.is_floating_point()]
        device = found[0].device if found else torch.device("cpu")
        numbers = [sum(int(label.isnan().sum()) for label in found), sum(label.numel() for label in found)]
        if reduction.data_parallel_size() > 1 and found:
            numbers = reduction.all_reduce_sum(torch.tensor(numbers, device=device)).tolist()
        return numbers[0], numbers[1]


def tasks_have(names: Sequence[str]) -> str:
    """For a message: "task 'a' has", or "tasks a, b have"."""
    return f"task {names[0]!r} has" if len(names) == 1 else f"tasks {short_names(names)} have"


def batch_size(batch: Mapping[str, Any]) -> float:
    """The number of examples of a batch, 1 where nothing in it tells."""
    return float(find_batch_size(batch) or 1)


def task_ids_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The column `task_ids` `[B]` of a batch whose rows are of one task each; None: there is none."""
    task_ids = batch.get(TASK_IDS)
    whole = isinstance(task_ids, Tensor) and task_ids.ndim == 1 and not task_ids.is_floating_point()
    return task_ids if whole else None


def label_columns(
    batch: Mapping[str, Any], label_names: Sequence[str], task_names: Sequence[str]
) -> Tensor | dict[str, Tensor]:
    """Which labels of a batch belong to which task.

    Returns:
        one column `[B, K]` or `[B, K, ...]` that holds those of all tasks (the only one, or `labels`); or task -> its
        column, `[B]` or `[B, ...]`, in the order of `task_names`: the column of its name, the others, where there are K
        columns, in the order of `label_names`.
        Tasks without a column in the batch have no entry. Where `task_ids` say whose a row's labels are, neither the
        order of the columns nor the width of one of integers (which may be tokens) says it.
    """
    num_tasks = len(task_names)
    by_row = TASK_IDS in batch and task_ids_of(batch) is not None
    if len(label_names) == 1 or ("labels" in label_names and not set(label_names) & set(task_names)):
        # In addition to `labels` there may be columns that only the loss needs, such as weights of the examples.
        only = batch.get("labels" if len(label_names) > 1 else label_names[0])
        wide = isinstance(only, Tensor) and only.ndim > 1 and only.shape[1] == num_tasks
        if isinstance(only, Tensor) and wide and (only.is_floating_point() or not by_row):
            return only
    column_of = {task: task for task in task_names if task in label_names}
    if len(label_names) == num_tasks and not by_row:
        others = [name for name in label_names if name not in column_of]
        column_of.update(zip([task for task in task_names if task not in column_of], others, strict=True))
    given = {task: batch.get(column_of[task]) for task in task_names if task in column_of}
    return {task: column for task, column in given.items() if isinstance(column, Tensor) and column.ndim > 0}


def _valid_numbers(columns: Sequence[Tensor], ignore_index: int | None) -> Tensor:
    """How many labels of each column are valid, `[number of columns]`."""
    if not columns:
        return torch.zeros(0, dtype=torch.int64)
    first = columns[0]
    if first.ndim == 1 and all(column.shape == first.shape and column.dtype == first.dtype for column in columns):
        return valid_labels(torch.stack(list(columns)), ignore_index).sum(dim=1)
    return torch.stack([valid_labels(column, ignore_index).sum() for column in columns])

"""Losses of K tasks of different types, one vectorised computation per type.

    regression             squared error of each of D numbers
    classification         cross-entropy of C classes
    multi_label            binary cross-entropy of each of M labels
    token_classification   cross-entropy of C classes, of each token
    segmentation           cross-entropy of C classes, of each pixel
    dense_regression       absolute error of each of D numbers, of each pixel

`hf_bilb.losses.task_types` says where the labels of a task lie in a batch. A task's loss is the mean over its valid
labels, and `num_items` their number: of a task with several numbers or labels, each of them is an item.

Weights of classes make a weighted mean, `sum(w l) / sum(w)` with w the weight of the label's class, as that of
`torch.nn.CrossEntropyLoss`. So that the means of micro-batches and ranks, which are combined by `num_items`, become the
weighted mean of the whole, `num_items` of such a task is its sum of weights, in units of the smallest weight: then it
is never below the number of its labels. (The mean is the same in any unit.) Weights of a multi_label task multiply
the part of the positive labels, as `pos_weight` of `torch.nn.BCEWithLogitsLoss`; there every label is one item.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.contract import check_task_names, short_names
from hf_bilb.losses.masked import MISSING_INTEGER, valid_labels
from hf_bilb.losses.pixels import check_pixel_outputs, pixel_items, pixel_loss
from hf_bilb.losses.task_types import LABELS, TAG_LABELS, TaskType, pixel_tasks


class MixedLosses:
    """The losses of tasks of any types: of a model of ours, or as the Trainer's `task_loss_func`.

        losses = MixedLosses({"stars": TaskType("regression"), "topic": TaskType("classification", 5)})
        BilevelMTLTrainer(..., task_loss_func=losses, task_item_counts=losses.count)

    Args:
        tasks: name -> type, in the order of the tasks.

    Attributes:
        task_names: the K names.
        row_sizes, token_sizes: outputs of each task of rows, and of each task of tokens, in order.

    Raises:
        OptionError: no task, an empty name, a weight that is not above 0, or weights of a regression task; a task of
            pixels with the name of another column.

    Cost: some ten kernels per type, whatever K is. Classes are padded to the most that a task has, `[B, tasks, most
    classes]`, of tokens `[B T, tasks, most classes]`. Tasks of pixels are computed one by one: their tensors are large,
    and padding them would cost more than it saves. No device synchronisation, but that the first batch on a device
    copies some indices to it.
    """

    def __init__(self, tasks: Mapping[str, TaskType]) -> None:
        self.task_names = check_task_names(list(tasks), "tasks")
        for name, task in tasks.items():
            _check_weights(name, task)
        self._tasks = tuple(tasks.items())
        self.row_sizes = [task.size for task in tasks.values() if task.items == "rows"]
        self.token_sizes = [task.size for task in tasks.values() if task.items == "tokens"]
        self._pixels = tuple(pixel_tasks(tasks).items())
        self._pixel_numbers = [list(tasks).index(name) for name, _ in self._pixels]
        self._width = sum(task.label_width for task in tasks.values())

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Losses of a model's `logits`, with the labels of the batch.

        Args:
            outputs: with `logits`: `[B, K]` where every task has one output, else a tuple with one tensor per task.
            batch: with `labels [B, W]`, `tag_labels [B, T, M]` and a column for each task of pixels; labels of a column
                that is not there are missing.

        Returns:
            `losses [K]`, 0 with zero gradients for a task without labels, and `num_items [K]`.

        Raises:
            TaskLossError: shapes that do not fit; on a CPU, a label that is none (on a GPU, which is not waited for,
                the device's own error, or an infinite loss).
        """
        logits = outputs["logits"]
        parts = (logits,) if isinstance(logits, Tensor) else logits
        rows, tokens, pixels = ([part for part in parts if part.ndim == dimensions] for dimensions in (2, 3, 4))
        return self.of_joined(
            torch.cat(rows, dim=1) if rows else None,
            torch.cat(tokens, dim=2) if tokens else None,
            batch.get(LABELS),
            batch.get(TAG_LABELS),
            pixels,
            batch,
        )

    def of_joined(
        self,
        rows: Tensor | None,
        tokens: Tensor | None,
        labels: Tensor | None,
        tag_labels: Tensor | None,
        pixels: Sequence[Tensor] = (),
        pixel_labels: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same of outputs that are not split into tasks.

        Args:
            rows: `[B, sum of row_sizes]`; None where no task is of rows.
            tokens: `[B, T, sum of token_sizes]`; None where no task is of tokens.
            labels: `[B, W]`, NaN where missing; None: all are.
            tag_labels: `[B, T, M]`, -100 where missing; None: all are.
            pixels: for each task of pixels `[B, size, H, W]`.
            pixel_labels: their names -> labels; those of a name that is not there, or None, are missing.
        """
        _check_outputs(rows, self.row_sizes, 2)
        _check_outputs(tokens, self.token_sizes, 3)
        check_pixel_outputs(pixels, self._pixels)
        sums, counts, owners = [], [], []
        for outputs, labelled, of_tokens in ((rows, labels, False), (tokens, tag_labels, True)):
            if outputs is None:
                continue
            # At least float32: sums over a batch in half precision are wrong in the second digit.
            flat = outputs.flatten(0, -2).to(torch.promote_types(outputs.dtype, torch.float32))
            targets = self._targets(labelled, outputs.shape[:-1], of_tokens, outputs.device)
            for group in _groups(self._tasks, of_tokens, outputs.device):
                columns = group.columns(targets)
                valid = group.valid(columns)
                if columns.device.type == "cpu":
                    group.check(columns, valid)
                values = group.values(flat, columns, valid)
                sums.append(torch.where(valid, values, 0).sum(dim=0))
                counts.append(group.counts(columns, valid))
                owners.append(group.owners)
        for number, (name, task), part in zip(self._pixel_numbers, self._pixels, pixels, strict=True):
            total, count = pixel_loss(name, task, part, (pixel_labels or {}).get(name))
            sums.append(total[None])
            counts.append(count[None])
            owners.append(_owner(number, total.device))
        totals = self._by_task(sums, owners)
        num_items = self._by_task(counts, owners).to(totals.dtype)
        return totals / num_items.clamp(min=1), num_items

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """`[K]`: the `num_items` of a batch, before there are outputs; what accumulation is exact by.

        Raises:
            TaskLossError: shapes that do not fit, or a batch without labels.
        """
        counts, owners = [], []
        for name, of_tokens in ((LABELS, False), (TAG_LABELS, True)):
            labelled = batch.get(name)
            if labelled is None or not (self.token_sizes if of_tokens else self.row_sizes):
                continue
            targets = self._targets(labelled, labelled.shape[:-1], of_tokens, labelled.device)
            for group in _groups(self._tasks, of_tokens, labelled.device):
                columns = group.columns(targets)
                counts.append(group.counts(columns, group.valid(columns)))
                owners.append(group.owners)
        for number, (name, task) in zip(self._pixel_numbers, self._pixels, strict=True):
            if (labelled := batch.get(name)) is not None:
                counts.append(pixel_items(task, labelled)[None])
                owners.append(_owner(number, labelled.device))
        if not counts:
            raise TaskLossError(f"{LABELS}: the batch has no column of labels (it has {', '.join(batch)})")
        return self._by_task(counts, owners)

    def _targets(self, labels: Tensor | None, size: Sequence[int], of_tokens: bool, device: torch.device) -> Tensor:
        """The labels of all rows, or of all tokens: `[N, W]` or `[N, M]`."""
        name, width = (TAG_LABELS, len(self.token_sizes)) if of_tokens else (LABELS, self._width)
        expected = (*size, width)
        if labels is None:
            labels = torch.full(expected, MISSING_INTEGER if of_tokens else torch.nan, device=device)
        if labels.ndim != (3 if of_tokens else 2) or labels.shape != expected:
            raise TaskLossError(
                f"{name}: got shape {tuple(labels.shape)}, expected {'[B, T' if of_tokens else '[B'}, {width}] as the "
                f"outputs' {list(size)}, for the tasks {short_names(self.task_names)}"
            )
        return labels.flatten(0, -2)

    def _by_task(self, columns: Sequence[Tensor], owners: Sequence[Tensor]) -> Tensor:
        """`[K]`: the sum of the columns of each task."""
        values = torch.cat(list(columns))
        return values.new_zeros(len(self._tasks)).index_add(0, torch.cat(list(owners)), values)


def _check_weights(name: str, task: TaskType) -> None:
    if task.class_weights and task.type in ("regression", "dense_regression"):
        raise OptionError(f"tasks.{name}.class_weights: a regression task has no classes")
    for weight in task.class_weights:
        if not 0 < weight < float("inf"):
            raise OptionError(f"tasks.{name}.class_weights: {weight} is not valid, expected numbers above 0")


def _check_outputs(outputs: Tensor | None, sizes: Sequence[int], dimensions: int) -> None:
    if outputs is None and not sizes:
        return
    if outputs is None or not sizes or outputs.ndim != dimensions or outputs.shape[-1] != sum(sizes):
        got = "none" if outputs is None else f"shape {tuple(outputs.shape)}"
        leading = "[B, T" if dimensions == 3 else "[B"
        expected = f"{leading}, {sum(sizes)}], of {list(sizes)} outputs a task" if sizes else "none"
        raise TaskLossError(f"logits: got {got}, expected {expected}")


# --- one type of task ---------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """A task: its number, name and type, and where its columns of labels and its outputs begin among all of them."""

    number: int
    name: str
    task: TaskType
    label: int
    output: int


class _Group(ABC):
    """Tasks of one type: E columns of labels, and what the model says about each.

    Attributes:
        names: `[E]`, the name of each column's task.
        owners: `[E]`, its number.
    """

    def __init__(self, members: Sequence[_Member], width: int, device: torch.device) -> None:
        columns = [(member, column) for member in members for column in range(member.task.label_width or 1)]
        self.names = [member.name for member, _ in columns]
        self.owners = torch.tensor([member.number for member, _ in columns], device=device)
        self._labels = _selection([member.label + column for member, column in columns], width, device)

    def columns(self, labels: Tensor) -> Tensor:
        """`[N, E]` of the labels of all tasks."""
        return _selected(labels, self._labels)

    def valid(self, columns: Tensor) -> Tensor:
        """`[N, E]`: which labels are there."""
        return valid_labels(columns)

    def counts(self, columns: Tensor, valid: Tensor) -> Tensor:
        """`[E]`: items."""
        return valid.sum(dim=0)

    @abstractmethod
    def check(self, columns: Tensor, valid: Tensor) -> None:
        """Raise `TaskLossError` for a label that is none; waits for the device."""

    @abstractmethod
    def values(self, outputs: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
        """`[N, E]`: the loss of each label from the outputs of all tasks; whatever is finite where there is none."""

    def _refuse(self, wrong: Tensor, columns: Tensor, expected: Sequence[str]) -> None:
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            missing = "NaN" if columns.is_floating_point() else str(MISSING_INTEGER)
            raise TaskLossError(
                f"labels: {columns[row, column].item():g} of task {self.names[column]!r} is none, expected "
                f"{expected[column]}, or {missing} where it is missing"
            )


class _Numbers(_Group):
    """Regression."""

    def __init__(self, members: Sequence[_Member], width: int, num_outputs: int, device: torch.device) -> None:
        super().__init__(members, width, device)
        self._outputs = _selection(_outputs_of(members), num_outputs, device)

    def valid(self, columns: Tensor) -> Tensor:
        return ~columns.isnan()  # -100 is a number like any other

    def check(self, columns: Tensor, valid: Tensor) -> None:
        self._refuse(columns.isinf(), columns, ["a finite number"] * len(self.names))

    def values(self, outputs: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
        return (_selected(outputs, self._outputs) - torch.where(valid, columns, 0)).square()


class _Labels(_Group):
    """Multi-label."""

    def __init__(self, members: Sequence[_Member], width: int, num_outputs: int, device: torch.device) -> None:
        super().__init__(members, width, device)
        self._outputs = _selection(_outputs_of(members), num_outputs, device)
        weights = [weight for member in members for weight in member.task.class_weights or (1.0,) * member.task.size]
        self._weights = _weights(weights, device)

    def check(self, columns: Tensor, valid: Tensor) -> None:
        self._refuse(valid & ((columns < 0) | (columns > 1)), columns, ["0 to 1"] * len(self.names))

    def values(self, outputs: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
        logits = _selected(outputs, self._outputs)
        weights = None if self._weights is None else self._weights.to(logits.dtype)
        targets = torch.where(valid, columns, 0).to(logits.dtype)
        return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")


class _Classes(_Group):
    """Classification, of rows or of tokens: E tasks, C the most classes of one."""

    def __init__(self, members: Sequence[_Member], width: int, num_outputs: int, device: torch.device) -> None:
        super().__init__(members, width, device)
        sizes = [member.task.size for member in members]
        most = max(sizes)
        # A class that a task does not have reads some output, and is masked.
        outputs = [member.output + min(c, member.task.size - 1) for member in members for c in range(most)]
        self._outputs = _selection(outputs, num_outputs, device)
        self._sizes = torch.tensor(sizes, device=device)
        self._absent = torch.arange(most, device=device) >= self._sizes[:, None] if min(sizes) < most else None
        self._places = torch.arange(len(sizes), device=device)
        scaled = [_scaled_weights(member.task, most) for member in members]
        weights = _weights([weight for row in scaled for weight in row], device)
        self._weights = None if weights is None else weights.view(len(sizes), most)

    def counts(self, columns: Tensor, valid: Tensor) -> Tensor:
        weights = self._weights_of(columns, valid)
        return valid.sum(dim=0) if weights is None else torch.where(valid, weights, 0).sum(dim=0)

    def check(self, columns: Tensor, valid: Tensor) -> None:
        wrong = valid & ((columns < 0) | (columns >= self._sizes) | (columns != columns.floor()))
        self._refuse(wrong, columns, [f"a class from 0 to {size - 1}" for size in self._sizes.tolist()])

    def values(self, outputs: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
        num_tasks = len(self.names)
        logits = _selected(outputs, self._outputs).view(len(outputs), num_tasks, -1)
        if self._absent is not None:
            logits = logits.masked_fill(self._absent, -torch.inf)
        targets = torch.where(valid, columns, MISSING_INTEGER).long()
        values = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=MISSING_INTEGER, reduction="none"
        ).view_as(targets)
        weights = self._weights_of(columns, valid)
        return values if weights is None else values * weights.to(values.dtype)

    def _weights_of(self, columns: Tensor, valid: Tensor) -> Tensor | None:
        """`[N, E]`, the weight of each label; None: all are 1."""
        if self._weights is None:
            return None
        return self._weights[self._places, torch.where(valid, columns, 0).long()]


_TYPES: dict[str, type[_Numbers | _Labels | _Classes]] = {
    "regression": _Numbers,
    "multi_label": _Labels,
    "classification": _Classes,
    "token_classification": _Classes,
}


@functools.lru_cache(maxsize=64)
def _groups(
    tasks: tuple[tuple[str, TaskType], ...], of_tokens: bool, device: torch.device
) -> list[_Numbers | _Labels | _Classes]:
    """The groups of the tasks of rows, or of tokens, on a device. Kept, because a copy from the host waits for it."""
    members: dict[str, list[_Member]] = {}
    label = output = 0
    for number, (name, task) in enumerate(tasks):
        if task.items == ("tokens" if of_tokens else "rows"):
            members.setdefault(task.type, []).append(_Member(number, name, task, label, output))
            label, output = label + (task.label_width or 1), output + task.size
    with torch.inference_mode(False):  # what is made in inference mode cannot be used in training
        return [_TYPES[kind](of_kind, label, output, device) for kind, of_kind in members.items()]


@functools.lru_cache(maxsize=64)
def _owner(number: int, device: torch.device) -> Tensor:
    """`[1]`, a task's number on a device. Kept, because a copy from the host waits for it."""
    with torch.inference_mode(False):
        return torch.tensor([number], device=device)


def _outputs_of(members: Sequence[_Member]) -> list[int]:
    return [member.output + i for member in members for i in range(member.task.size)]


def _selection(columns: list[int], total: int, device: torch.device) -> Tensor | None:
    """The columns as an index; None for all of `total` in order."""
    return None if columns == list(range(total)) else torch.tensor(columns, device=device)


def _selected(values: Tensor, columns: Tensor | None) -> Tensor:
    return values if columns is None else values.index_select(1, columns)


def _weights(weights: list[float], device: torch.device) -> Tensor | None:
    """On the device, in the precision to sum in; None where all are 1."""
    if all(weight == 1.0 for weight in weights):
        return None
    return torch.tensor(weights, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _scaled_weights(task: TaskType, num_classes: int) -> list[float]:
    """In units of the smallest, filled up to the most classes."""
    given = task.class_weights or (1.0,) * task.size
    return [weight / min(given) for weight in given] + [1.0] * (num_classes - task.size)

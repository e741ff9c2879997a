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
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.contract import check_task_names, short_names
from hf_bilb.losses.masked import MISSING_INTEGER
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

    State: some indices for each device, made by its first batch.

    Cost: some twenty kernels, and five per type, whatever K is. Classes are padded to the most that a task has,
    `[B, tasks, most classes]`, of tokens `[B T, tasks, most classes]`. Tasks of pixels are computed one by one: their
    tensors are large, and padding them would cost more than it saves. No device synchronisation but by the first batch.
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
        self._kept: dict[tuple[bool, torch.device], _Columns] = {}

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
            columns = self._columns(of_tokens, outputs.device)
            of_columns, items = columns.losses(flat, targets)
            sums.append(of_columns)
            counts.append(items)
            owners += columns.owners
        for number, (name, task), part in zip(self._pixel_numbers, self._pixels, pixels, strict=True):
            total, count = pixel_loss(name, task, part, (pixel_labels or {}).get(name))
            sums.append(total[None])
            counts.append(count[None])
            owners.append(number)
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
            columns = self._columns(of_tokens, labelled.device)
            counts.append(columns.count(self._targets(labelled, labelled.shape[:-1], of_tokens, labelled.device)))
            owners += columns.owners
        for number, (name, task) in zip(self._pixel_numbers, self._pixels, strict=True):
            if (labelled := batch.get(name)) is not None:
                counts.append(pixel_items(task, labelled)[None])
                owners.append(number)
        if not counts:
            raise TaskLossError(f"{LABELS}: the batch has no column of labels (it has {', '.join(batch)})")
        return self._by_task(counts, owners)

    def _columns(self, of_tokens: bool, device: torch.device) -> _Columns:
        """Those of the tasks of rows, or of tokens. Kept, because a copy from the host waits for the device."""
        columns = self._kept.get((of_tokens, device))
        if columns is None:
            with torch.inference_mode(False):  # what is made in inference mode cannot be used in training
                columns = _Columns(self._tasks, of_tokens, device)
            self._kept[of_tokens, device] = columns
        return columns

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

    def _by_task(self, columns: Sequence[Tensor], owners: Sequence[int]) -> Tensor:
        """`[K]`: the sum of the columns of each task."""
        values = columns[0] if len(columns) == 1 else torch.cat(list(columns))
        places = _places(tuple(owners), len(self._tasks), values.device)
        return values if places is None else values.new_zeros(len(self._tasks)).index_add(0, places, values)


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


# --- columns of labels, and the losses of one type of task --------------------------------------------------------


class _Member(NamedTuple):
    """A task: its number, name and type, and where its columns of labels and its outputs begin among all of them."""

    number: int
    name: str
    task: TaskType
    label: int
    output: int


class _Columns:
    """The tasks of rows, or of tokens, on a device: E columns of labels, those of one type one after the other.

    Attributes:
        owners: the number of each column's task.
    """

    def __init__(self, tasks: Sequence[tuple[str, TaskType]], of_tokens: bool, device: torch.device) -> None:
        members: dict[str, list[_Member]] = {}
        label = output = 0
        for number, (name, task) in enumerate(tasks):
            if task.items == ("tokens" if of_tokens else "rows"):
                members.setdefault(task.type, []).append(_Member(number, name, task, label, output))
                label, output = label + (task.label_width or 1), output + task.size
        self._groups = [_TYPES[kind](of_kind, device) for kind, of_kind in members.items()]
        ordered = [member for of_kind in members.values() for member in of_kind]
        self._owned = [member for member in ordered for _ in range(member.task.label_width or 1)]
        self.owners = [member.number for member in self._owned]
        places = [member.label + column for member in ordered for column in range(member.task.label_width or 1)]
        self._labels = _selection(places, label, device)
        self._outputs = _selection([place for group in self._groups for place in group.outputs], output, device)
        self._label_sizes = [group.num_columns for group in self._groups]
        self._output_sizes = [len(group.outputs) for group in self._groups]
        self._weighted = any(group.weighted for group in self._groups)
        # -100 is a number like any other, and nothing equals NaN.
        missing = [torch.nan if member.task.type == "regression" else MISSING_INTEGER for member in self._owned]
        self._missing = torch.tensor(missing, device=device)
        if device.type == "cpu":
            bounds = [_bounds(member.task) for member in self._owned]
            self._lowest, self._highest = torch.tensor(bounds, dtype=torch.float64).T
            self._whole = torch.tensor([member.task.has_classes for member in self._owned])

    def losses(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`[E]` sums of losses and `[E]` items, from the outputs and the labels of all tasks.

        Raises:
            TaskLossError: on a CPU, a label that is none.
        """
        missing, targets = self._filled(labels)
        if targets.device.type == "cpu":
            self._check(targets)
        of_groups = zip(
            self._groups,
            _selected(outputs, self._outputs).split(self._output_sizes, dim=1),
            targets.split(self._label_sizes, dim=1),
            strict=True,
        )
        values = _joined([group.values(logits, columns) for group, logits, columns in of_groups])
        if not self._weighted:
            return values.masked_fill(missing, 0).sum(dim=0), (~missing).sum(dim=0)
        weights = self._item_weights(targets)
        weighted = (values * weights.to(values.dtype)).masked_fill(missing, 0)
        return weighted.sum(dim=0), weights.masked_fill(missing, 0).sum(dim=0)

    def count(self, labels: Tensor) -> Tensor:
        """`[E]`: the items alone."""
        missing, targets = self._filled(labels)
        return (self._item_weights(targets).masked_fill(missing, 0) if self._weighted else ~missing).sum(dim=0)

    def _filled(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, E]` each: which labels are missing, and the labels with 0 in their place."""
        columns = _selected(labels, self._labels)
        missing = columns.eq(self._missing)
        if columns.is_floating_point():
            missing = missing | columns.isnan()
        return missing, columns.masked_fill(missing, 0)

    def _item_weights(self, targets: Tensor) -> Tensor:
        """`[N, E]`, the weight of each label."""
        parts = zip(self._groups, targets.split(self._label_sizes, dim=1), strict=True)
        return _joined([group.item_weights(columns) for group, columns in parts])

    def _check(self, targets: Tensor) -> None:
        wrong = targets.clamp(self._lowest, self._highest).ne(targets)
        wrong = wrong | (self._whole & targets.floor().ne(targets))
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            owner = self._owned[column]
            raise TaskLossError(
                f"labels: {targets[row, column].item():g} of task {owner.name!r} is none, expected "
                f"{_expected(owner.task)}, or {'NaN' if targets.is_floating_point() else MISSING_INTEGER} where it is "
                "missing"
            )


def _bounds(task: TaskType) -> tuple[float, float]:
    """The lowest and the highest label."""
    if task.type == "regression":
        return -sys.float_info.max, sys.float_info.max
    return 0, task.size - 1 if task.has_classes else 1


def _expected(task: TaskType) -> str:
    if task.type == "regression":
        return "a finite number"
    return f"a class from 0 to {task.size - 1}" if task.has_classes else "0 to 1"


class _Group(ABC):
    """Tasks of one type: n of the columns of labels.

    Attributes:
        outputs: which of all outputs they read, those of a column together.
        num_columns: n.
        weighted: whether some label is not one item.
    """

    weighted = False

    def __init__(self, members: Sequence[_Member], device: torch.device) -> None:
        self.outputs = [member.output + i for member in members for i in range(member.task.size)]
        self.num_columns = sum(member.task.label_width or 1 for member in members)

    @abstractmethod
    def values(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """`[N, n]`: the loss of each label, without the weight of its class."""

    def item_weights(self, labels: Tensor) -> Tensor:
        """`[N, n]`: how many items each label is, in the precision to sum in."""
        return torch.ones_like(labels, dtype=_wide(labels.device))


class _Numbers(_Group):
    """Regression."""

    def values(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels).square()


class _Labels(_Group):
    """Multi-label."""

    def __init__(self, members: Sequence[_Member], device: torch.device) -> None:
        super().__init__(members, device)
        weights = [weight for member in members for weight in member.task.class_weights or (1.0,) * member.task.size]
        self._weights = _weights(weights, device)

    def values(self, outputs: Tensor, labels: Tensor) -> Tensor:
        weights = None if self._weights is None else self._weights.to(outputs.dtype)
        return functional.binary_cross_entropy_with_logits(
            outputs, labels.to(outputs.dtype), pos_weight=weights, reduction="none"
        )


class _Classes(_Group):
    """Classification, of rows or of tokens: n tasks, C the most classes of one."""

    def __init__(self, members: Sequence[_Member], device: torch.device) -> None:
        super().__init__(members, device)
        sizes = [member.task.size for member in members]
        most = max(sizes)
        # A class that a task does not have reads some output, and is masked.
        self.outputs = [member.output + min(c, member.task.size - 1) for member in members for c in range(most)]
        self._absent = None
        if min(sizes) < most:
            self._absent = torch.arange(most, device=device) >= torch.tensor(sizes, device=device)[:, None]
        self._places = torch.arange(len(sizes), device=device)
        scaled = [_scaled_weights(member.task, most) for member in members]
        weights = _weights([weight for row in scaled for weight in row], device)
        self._weights = None if weights is None else weights.view(len(sizes), most)
        self.weighted = weights is not None

    def values(self, outputs: Tensor, labels: Tensor) -> Tensor:
        logits = outputs.view(len(outputs), self.num_columns, -1)
        if self._absent is not None:
            logits = logits.masked_fill(self._absent, -torch.inf)
        targets = labels.long()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def item_weights(self, labels: Tensor) -> Tensor:
        if self._weights is None:
            return super().item_weights(labels)
        return self._weights[self._places, labels.long()]


_TYPES: dict[str, type[_Numbers | _Labels | _Classes]] = {
    "regression": _Numbers,
    "multi_label": _Labels,
    "classification": _Classes,
    "token_classification": _Classes,
}


def _selection(columns: list[int], total: int, device: torch.device) -> Tensor | None:
    """The columns as an index; None for all of `total` in order."""
    return None if columns == list(range(total)) else torch.tensor(columns, device=device)


def _selected(values: Tensor, columns: Tensor | None) -> Tensor:
    return values if columns is None else values.index_select(1, columns)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


@functools.lru_cache(maxsize=64)
def _places(owners: tuple[int, ...], num_tasks: int, device: torch.device) -> Tensor | None:
    """The numbers of the columns' tasks; None for one column of each task in order.

    Kept, because a copy from the host waits for the device.
    """
    with torch.inference_mode(False):  # what is made in inference mode cannot be used in training
        return None if owners == tuple(range(num_tasks)) else torch.tensor(owners, device=device)


def _weights(weights: list[float], device: torch.device) -> Tensor | None:
    """On the device, in the precision to sum in; None where all are 1."""
    if all(weight == 1.0 for weight in weights):
        return None
    return torch.tensor(weights, dtype=_wide(device), device=device)


def _wide(device: torch.device) -> torch.dtype:
    """The precision to sum weights in."""
    return torch.float32 if device.type == "mps" else torch.float64


def _scaled_weights(task: TaskType, num_classes: int) -> list[float]:
    """In units of the smallest, filled up to the most classes."""
    given = task.class_weights or (1.0,) * task.size
    return [weight / min(given) for weight in given] + [1.0] * (num_classes - task.size)

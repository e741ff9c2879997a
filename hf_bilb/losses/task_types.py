"""What a task predicts, and where its labels lie in a batch of tasks of different types.

Row labels of all tasks are one column `labels [B, W]` of float32, NaN where missing. W is the sum of the tasks' label
widths, in the order of the tasks:

| type | outputs of the model | label columns | a label |
|---|---|---|---|
| regression | D numbers | D | the number, standardised where the data do so |
| classification | C logits | 1 | number of the class, 0 to C - 1 |
| multi_label | M logits | M | 0 or 1 |

So tasks that have one output each (K numbers, or K binary tasks) have `labels [B, K]`. Labels of tokens are a column of
their own, `tag_labels [B, T, M]` of int64, -100 where missing or no token: M tasks of type `token_classification`, in
the order of the tasks. Such a task has no column in `labels`.

Labels of pixels are one column for each task, and its name is the task's:

| type | outputs of the model | column of the task's name |
|---|---|---|
| segmentation | logits `[B, C, H, W]` | int64 `[B, H, W]`, number of the class, -100 (or any below 0) where missing |
| dense_regression | numbers `[B, D, H, W]` | float32 `[B, D, H, W]`, as of regression, NaN where missing |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_bilb.config.options import unknown_name
from hf_bilb.errors import OptionError

Kind = Literal[
    "regression", "classification", "multi_label", "token_classification", "segmentation", "dense_regression"
]
KINDS: tuple[str, ...] = get_args(Kind)
#: Types whose items are pixels, and those that have their labels in the column `labels`.
PIXEL_TYPES = ("segmentation", "dense_regression")
ROW_TYPES = ("regression", "classification", "multi_label")

#: The columns of a batch.
LABELS, TAG_LABELS = "labels", "tag_labels"
#: Names of columns, and of arguments of models, that no task of pixels can have.
RESERVED_COLUMNS = (LABELS, TAG_LABELS, "image_labels", "pixel_values", "return_dict", "task_ids")


@dataclass(frozen=True)
class TaskType:
    """What one task predicts. It is in a model's config, so that a saved model can name what it says.

    Attributes:
        type: `regression`, `classification`, `multi_label`, `token_classification`, `segmentation` or
            `dense_regression`.
        size: numbers (of pixels: channels) D, classes C, or labels M; 1 or more, of classes 2 or more.
        names: of the D numbers, the C classes or the M labels; empty: they have none.
        class_weights: factors of the losses, above 0, by class `[C]`; of `multi_label`, of the positive labels `[M]`.
            Empty: 1. The loss is the weighted mean, as that of `torch.nn.CrossEntropyLoss`.
        unit: of the labels of a (dense) regression task, one for all D numbers: metrics are means over them.
        means, stds: `[D]`, what was taken off the labels of a (dense) regression task, and what they were divided by
            after it: `output * std + mean` is in the unit. Empty: the labels are as they were.

    Raises:
        OptionError: an unknown type, a size below what it needs, or lists of another length.
    """

    type: Kind
    size: int = 1
    names: tuple[str, ...] = ()
    class_weights: tuple[float, ...] = ()
    unit: str = ""
    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.type not in KINDS:
            raise unknown_name("type", self.type, KINDS)
        least = 2 if self.has_classes else 1
        if self.size < least:
            raise OptionError(f"size: {self.size} is not valid for {self.type}, expected {least} or more")
        for key in ("names", "class_weights", "means", "stds"):
            values = getattr(self, key)
            object.__setattr__(self, key, tuple(values))
            if values and len(values) != self.size:
                raise OptionError(f"{key}: got {len(values)} values, expected {self.size}")

    @property
    def has_classes(self) -> bool:
        """Whether one of several classes is predicted."""
        return self.type in ("classification", "token_classification", "segmentation")

    @property
    def items(self) -> Literal["rows", "tokens", "pixels"]:
        """What it predicts something about."""
        return "pixels" if self.type in PIXEL_TYPES else "rows" if self.type in ROW_TYPES else "tokens"

    @property
    def label_width(self) -> int:
        """How many columns of `labels` are the task's."""
        return 0 if self.items != "rows" else 1 if self.has_classes else self.size

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, those that are not the default."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskType:
        """What `to_dict` gave."""
        return cls(**values)


def label_slices(tasks: Mapping[str, TaskType]) -> dict[str, slice]:
    """Task -> its columns in `labels`; an empty slice for a task whose labels lie elsewhere."""
    slices, start = {}, 0
    for name, task in tasks.items():
        slices[name] = slice(start, start + task.label_width)
        start += task.label_width
    return slices


def have_one_output(tasks: Mapping[str, TaskType]) -> bool:
    """Whether each task has one output a row, so that all are one tensor `[B, K]`."""
    return all(task.size == 1 and task.items == "rows" for task in tasks.values())


def pixel_tasks(tasks: Mapping[str, TaskType]) -> dict[str, TaskType]:
    """Those whose items are pixels, in order.

    Raises:
        OptionError: one has the name of another column, so that its labels could have no column.
    """
    found = {name: task for name, task in tasks.items() if task.items == "pixels"}
    for name in found:
        if name in RESERVED_COLUMNS:
            raise OptionError(f"tasks: {name!r} is the name of another column of a batch, expected another one")
    return found

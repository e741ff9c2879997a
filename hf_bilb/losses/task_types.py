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
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_bilb.config.options import unknown_name
from hf_bilb.errors import OptionError

Kind = Literal["regression", "classification", "multi_label", "token_classification"]
KINDS: tuple[str, ...] = get_args(Kind)

#: The columns of a batch.
LABELS, TAG_LABELS = "labels", "tag_labels"


@dataclass(frozen=True)
class TaskType:
    """What one task predicts. It is in a model's config, so that a saved model can name what it says.

    Attributes:
        type: `regression`, `classification`, `multi_label` or `token_classification`.
        size: numbers D, classes C, or labels M; 1 or more, of classes 2 or more.
        names: of the D numbers, the C classes or the M labels; empty: they have none.
        class_weights: factors of the losses, above 0, by class `[C]`; of `multi_label`, of the positive labels `[M]`.
            Empty: 1. The loss is the weighted mean, as that of `torch.nn.CrossEntropyLoss`.
        unit: of a regression task's labels.
        means, stds: `[D]`, what was taken off the labels of a regression task, and what they were divided by after it:
            `output * std + mean` is in the unit. Empty: the labels are as they were.

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
        return self.type in ("classification", "token_classification")

    @property
    def label_width(self) -> int:
        """How many columns of `labels` are the task's."""
        return {"classification": 1, "token_classification": 0}.get(self.type, self.size)

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

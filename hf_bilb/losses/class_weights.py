"""Weights of classes, for losses of classes that are not equally frequent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_bilb.errors import OptionError
from hf_bilb.losses.masked import valid_labels


def balanced_class_weights(labels: Any, num_classes: int, names: Sequence[str] = ()) -> tuple[float, ...]:
    """n / (C n_c) of each class c, which gives every class the same weight in the sum: `class_weight="balanced"` of
    scikit-learn.

    Args:
        labels: numbers of classes, of any shape; a tensor, an array or a list; NaN or -100 where missing.
        num_classes: C.
        names: of the classes, for the error; empty: their numbers.

    Returns:
        `[C]`, for `TaskType.class_weights`; 1 for each of equally frequent classes.

    Raises:
        OptionError: a label that is no class, or a class without a label, which can have no weight.
    """
    given = torch.as_tensor(labels).flatten()
    classes = given[valid_labels(given)]
    wrong = classes[(classes < 0) | (classes >= num_classes) | (classes != classes.floor())]
    if wrong.numel():
        raise OptionError(f"class_weights: label {wrong[0]:g} is no class, expected 0 to {num_classes - 1}")
    return balanced_weights_of_counts(classes.long().bincount(minlength=num_classes).tolist(), names)


def balanced_weights_of_counts(counts: Sequence[int], names: Sequence[str] = ()) -> tuple[float, ...]:
    """The same from the number of labels of each class `[C]`.

    Raises:
        OptionError: a class without a label.
    """
    for number, count in enumerate(counts):
        if not count:
            name = repr(names[number]) if names else number
            raise OptionError(f"class_weights: class {name} has no label, so there is no balanced weight for it")
    return tuple(sum(counts) / (len(counts) * count) for count in counts)

"""Whether the graph computes what torch computes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hf_bilb.errors import ExportError
from hf_bilb.inference.batches import by_task
from hf_bilb.losses.task_types import TaskType

Batch = Mapping[str, Tensor]


def can_be_compared() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def outputs_of(model: nn.Module, tasks: Mapping[str, TaskType], batch: Batch) -> list[Tensor]:
    """What torch computes, one tensor for each task."""
    with torch.no_grad():
        return list(by_task(tasks, model(**batch)["logits"]).values())


def differences(file: Path, tasks: Sequence[str], pairs: Sequence[tuple[Batch, Sequence[Tensor]]]) -> dict[str, float]:
    """Task -> the largest difference between onnxruntime on the CPU and torch.

    Where a task's outputs are above 1, differences are related to the largest of them, since float32 is so exact and
    no more; a NaN on one side alone is infinitely far off.

    Args:
        file: the exported model.
        tasks: names, in the order of its outputs.
        pairs: batches, and what torch computes of them.

    Raises:
        ExportError: onnxruntime cannot run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        computed = [session.run(None, {name: batch[name].numpy() for name in names}) for batch, _ in pairs]
    except Exception as error:  # of onnxruntime's own kinds, which have no base but this
        raise ExportError(f"onnxruntime cannot run the exported model: {' '.join(str(error).split())}") from error
    found = dict.fromkeys(tasks, 0.0)
    for outputs, (_, expected) in zip(computed, pairs, strict=True):
        for task, got, right in zip(tasks, outputs, expected, strict=True):
            found[task] = max(found[task], _difference(got, right.double().numpy()))
    return found


def _difference(got: np.ndarray, right: np.ndarray) -> float:
    if got.shape != right.shape or not np.array_equal(np.isnan(got), np.isnan(right)):
        return float("inf")
    scale = max(1.0, float(np.nanmax(np.abs(right), initial=0.0)))
    return float(np.nanmax(np.abs(got - right), initial=0.0)) / scale

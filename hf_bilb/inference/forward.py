"""The forward passes of a trained model over rows, and what they measure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_bilb.data.inputs.encoded import Encoded
from hf_bilb.inference.batches import batches_of, device_of, forward_columns, to_device, with_progress
from hf_bilb.metrics.trainer_metrics import StreamingMetrics


def num_batches(encoded: Encoded, batch_size: int) -> int:
    """Of all rows; the last one may be smaller."""
    return math.ceil(len(encoded) / batch_size)


def outputs_of(
    model: nn.Module, encoded: Encoded, batch_size: int, progress: bool | None, withheld: Collection[str]
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each batch, on the model's device, with the model's logits.

    Args:
        encoded: the rows.
        progress: as of `with_progress`.
        withheld: columns of a batch that the model does not get, such as labels.
    """
    columns, device = forward_columns(model), device_of(model)
    work = batches_of(encoded, batch_size)
    model.eval()
    for batch in with_progress(work, num_batches(encoded, batch_size), progress):
        batch = to_device(batch, device)
        taken = {
            name: value
            for name, value in batch.items()
            if name not in withheld and (columns is None or name in columns)
        }
        with torch.inference_mode():
            logits = model(**taken)["logits"]
        yield batch, logits  # outside: whoever takes it would be in that mode, too


def measured(
    metrics: StreamingMetrics,
    outputs: Iterable[tuple[dict[str, Any], Any]],
    label_names: Sequence[str],
    total: int,
) -> dict[str, float]:
    """The metrics of batches, as the Trainer hands them over.

    Args:
        outputs: of `outputs_of`.
        label_names: columns of a batch.
        total: number of batches.
    """
    from transformers import EvalPrediction

    found: dict[str, float] = {}
    for number, (batch, logits) in enumerate(outputs, 1):
        labels = tuple(batch[name] for name in label_names)
        prediction = EvalPrediction(predictions=logits, label_ids=labels if len(labels) > 1 else labels[0])
        found = metrics(prediction, compute_result=number == total)
    return found

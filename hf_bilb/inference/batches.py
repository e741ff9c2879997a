"""From rows to batches on the model's device, with a progress bar."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_bilb.config.options import shown
from hf_bilb.data.inputs.encoded import Encoded
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.losses.task_types import TaskType

T = TypeVar("T")


def check_batch_size(batch_size: int) -> None:
    """Raise `OptionError` unless it is 1 or more."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError(f"batch_size: {shown(batch_size)} is not valid, expected 1 or more")


def batches_of(encoded: Encoded, batch_size: int) -> Iterator[dict[str, Any]]:
    """The rows in their order, as a `DataLoader` of an evaluation has them."""
    rows: Any = encoded.rows
    get_many = getattr(rows, "__getitems__", None)
    for start in range(0, len(encoded), batch_size):
        places = list(range(start, min(start + batch_size, len(encoded))))
        fetched = [rows[place] for place in places] if get_many is None else get_many(places)
        yield encoded.collator(fetched)


def with_progress(work: Iterable[T], total: int, progress: bool | None, unit: str = "batch") -> Iterator[T]:
    """`work` with a bar: None: on a terminal, where it takes more than a second; True, False: always, never."""
    from tqdm.auto import tqdm

    settings: dict[str, Any] = {"disable": None, "delay": 1.0} if progress is None else {"disable": not progress}
    yield from tqdm(work, total=total, unit=unit, desc="predicting", leave=False, **settings)


def forward_columns(model: Any) -> frozenset[str] | None:
    """The columns that the model's forward takes, as the Trainer looks at them; None: any."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(bare.forward).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return None
    return frozenset(parameters)


def by_task(
    tasks: Mapping[str, TaskType], logits: Tensor | tuple[Tensor, ...], name: object = "the model"
) -> dict[str, Tensor]:
    """Each task's outputs, `[B, size]`, of tokens `[B, T, C]`, from one tensor with those of all or one for each.

    Raises:
        CheckpointError: the model, which messages call `name`, has another number of outputs.
    """
    if not isinstance(logits, Tensor):
        return dict(zip(tasks, logits, strict=True))
    sizes = [task.size for task in tasks.values()]
    if logits.shape[-1] != sum(sizes):
        raise CheckpointError(f"{name}: gives {logits.shape[-1]} outputs, its tasks have {sum(sizes)}")
    return dict(zip(tasks, logits.split(sizes, dim=-1), strict=True))


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors on the device; others as they are."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """That of its parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

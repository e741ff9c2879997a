"""Tensors in files and in memory: reading them, which ones share memory, and what does not match between two sets."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    check_torch_load_is_safe,
)

from hf_bilb.errors import CheckpointError

_SHOWN = 3  # names of each kind in a message


# --- files --------------------------------------------------------------------------------------------------------


def weight_files(folder: str | Path) -> list[Path]:
    """The files in `folder` that hold a whole model, in the order in which `Trainer` looks for them; may be empty.

    Raises:
        CheckpointError: an index of shards that cannot be read.
    """
    path = Path(folder)
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (path / name).is_file():
            return [path / name]
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (path / name).is_file():
            try:
                shards = set(json.loads((path / name).read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(f"{path / name}: is damaged") from None
            return [path / shard for shard in sorted(shards)]
    return []


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor in `files`, on the CPU.

    Raises:
        CheckpointError: one of them is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                tensors.update(load_file(path, device="cpu"))
            else:
                check_torch_load_is_safe()
                tensors.update(torch.load(path, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing") from None
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            first = str(error).partition("\n")[0]
            raise CheckpointError(f"{path}: cannot be read as tensors ({first})") from None
    return tensors


# --- memory -------------------------------------------------------------------------------------------------------


def storage(tensor: Any) -> tuple[str, int] | None:
    """What tells the memory of one tensor from another's; None where it has none of its own (empty, on no device)."""
    # Tensors of other types (quantized, distributed, not yet initialized) keep theirs in ways of their own.
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return None
    return (str(tensor.device), tensor.untyped_storage().data_ptr()) if tensor.numel() else None


def shared(tensors: Mapping[str, Any]) -> list[list[str]]:
    """Names whose tensors lie in the same storage, as lists of two or more, in the order of `tensors`."""
    found: dict[tuple[str, int], list[str]] = {}
    for name, tensor in tensors.items():
        place = storage(tensor)
        if place is not None:
            found.setdefault(place, []).append(name)
    return [names for names in found.values() if len(names) > 1]


def is_same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in one storage are the same one: each element of one is the same element of the other."""
    return (a.storage_offset(), a.shape, a.stride(), a.dtype) == (b.storage_offset(), b.shape, b.stride(), b.dtype)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the stretches of memory from the first to the last element of two tensors have a byte in common."""
    (a_begin, a_end), (b_begin, b_end) = _stretch(a), _stretch(b)
    return a_begin < b_end and b_begin < a_end


def _stretch(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes; NaN equals NaN here, and 0 is not -0."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b = (x.detach().to(a.device).contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


# --- what does not match ------------------------------------------------------------------------------------------


@dataclass
class Differences:
    """What a file holds in addition to what a model has.

    Attributes:
        missing: names that no file holds.
        unexpected: names that the model does not have.
        other_shape: names with both shapes.
        other_values: names under which the model, loaded already, has something else.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    other_shape: list[str] = field(default_factory=list)
    other_values: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.other_shape) + len(self.other_values)

    def compare(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Add what does not match between two sets of named tensors."""
        self.missing += [name for name in expected if name not in found]
        self.unexpected += [name for name in found if name not in expected]
        for name in expected:
            if name in found and found[name].shape != expected[name].shape:
                shapes = f"{tuple(found[name].shape)} where {tuple(expected[name].shape)} is expected"
                self.other_shape.append(f"{name}: {shapes}")

    def __str__(self) -> str:
        kinds = {
            "missing": self.missing,
            "not of this model": self.unexpected,
            "of another shape": self.other_shape,
            "of another value": self.other_values,
        }
        return "; ".join(
            f"{len(names)} {'is' if len(names) == 1 else 'are'} {kind} ({_some(names)})"
            for kind, names in kinds.items()
            if names
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")

"""Scalars that are at hand on a device: of a Python number torch makes a new tensor, in an operation of its own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def zero(like: Tensor) -> Tensor:
    """A scalar 0 where `like` is, and of its type. It is the same one every time: nobody may write into it."""
    return _constant(0.0, like.dtype, like.device)


def one(like: Tensor) -> Tensor:
    """A scalar 1, likewise."""
    return _constant(1.0, like.dtype, like.device)


def lowest(like: Tensor) -> Tensor:
    """The lowest finite scalar of the type of `like`, likewise."""
    return _constant(torch.finfo(like.dtype).min, like.dtype, like.device)


def infinity(like: Tensor) -> Tensor:
    """A scalar beyond all, likewise."""
    return _constant(float("inf"), like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # one that is made in it could take no part in training
        return torch.full((), value, dtype=dtype, device=device)

"""Scalars that are at hand on a device: of a Python number torch makes a new tensor, in an operation of its own.

They are the same ones every time: nobody may write into them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # one that is made in it could take no part in training
        return torch.full((), value, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    """0."""
    return _constant(0.0, dtype, device)


@functools.lru_cache(maxsize=64)
def one(dtype: torch.dtype, device: torch.device) -> Tensor:
    """1."""
    return _constant(1.0, dtype, device)


@functools.lru_cache(maxsize=64)
def lowest(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The lowest finite number of the type."""
    return _constant(torch.finfo(dtype).min, dtype, device)


@functools.lru_cache(maxsize=64)
def infinity(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is above every number."""
    return _constant(float("inf"), dtype, device)

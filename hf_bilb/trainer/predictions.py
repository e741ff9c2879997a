"""What a model's output gives to predictions: fields that can be joined over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class NotJoinedError(Exception):
    """Some output fields differ in size between batches or ranks; for `evaluation_loop`, which goes without them."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class PredictedFields:
    """Finds the output fields that `Trainer` cannot join in one evaluation.

    It joins batches along the examples and fills the second dimension up. Attentions `[B, heads, T, T]` of texts of
    different lengths differ in the third and fourth.

    Args:
        gather: all ranks' values of a tensor `[n]`, one after the other.
        over_batches: batches are joined, too, not only ranks.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor], device: torch.device, over_batches: bool) -> None:
        self._gather = gather
        self._device = device
        self._over_batches = over_batches
        self._names: list[str] = []
        self._first: list[int] | None = None

    @contextmanager
    def named_by(self, model: nn.Module) -> Iterator[None]:
        """While it holds, the model's calls tell the names of its output fields."""

        def keep(_: nn.Module, __: Any, outputs: Any) -> None:
            self._names = list(outputs) if isinstance(outputs, Mapping) else []

        handle = model.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def check(self, predicted: Any, ignored: list[str]) -> None:
        """Raise `NotJoinedError` on every rank when this batch's fields, less the `ignored` ones, do not fit the rest.

        Cost: one gather of some integers, where a field has more than two dimensions.
        """
        names = [name for name in self._names if name not in ignored and name != "loss"]
        values = predicted if len(names) > 1 else (predicted,)
        if not names or len(names) != len(values):
            return
        sizes = {name: _further_sizes(value) for name, value in zip(names, values, strict=True)}
        here = [size for of_field in sizes.values() for size in of_field]
        if not here:
            return
        rows = self._gather(torch.tensor(here, device=self._device)).view(-1, len(here)).tolist()
        # The first batch of rank 0, on every rank.
        if self._first is None or not self._over_batches:
            self._first = rows[0]
        owners = [name for name, of_field in sizes.items() for _ in of_field]
        wrong = {name: None for row in rows for name, a, b in zip(owners, row, self._first, strict=True) if a != b}
        if wrong and len(wrong) < len(names):  # of the only one, Trainer says so
            raise NotJoinedError(list(wrong))


def _further_sizes(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return list(value.shape[2:])
    if isinstance(value, Mapping):
        return [size for part in value.values() for size in _further_sizes(part)]
    return [size for part in value for size in _further_sizes(part)] if isinstance(value, (list, tuple)) else []

"""Random numbers of a method: their own, the same on all ranks, repeated by an update that is repeated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_64_BITS = 2**64 - 1


class NormalDraws(nn.Module):
    """K standard normal numbers for each update, a function of (seed, number of the update): no other random number
    changes them, and all micro-batches of an update share them.

    State: the number of updates, on the host.
    """

    def __init__(self, num_tasks: int, seed: int) -> None:
        super().__init__()
        self._num_tasks = num_tasks
        self._seed = seed
        self._generator = torch.Generator()
        self._updates = 0

    def forward(self, like: Tensor) -> Tensor:
        """The numbers `[K]` of this update, where and in which precision `like` is. Does not wait for the device."""
        self._generator.manual_seed(_mixed(self._seed, self._updates))
        drawn = torch.randn(self._num_tasks, generator=self._generator, dtype=torch.float64)
        # From ordinary memory a copy of this size is staged at once; a blocking one would wait for the device.
        return drawn.to(like.dtype).to(like.device, non_blocking=True)

    def end_step(self) -> None:
        """The next update draws again."""
        self._updates += 1

    def get_extra_state(self) -> Tensor:
        """The number of updates, as a part of the state."""
        return torch.tensor(self._updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the number of updates."""
        self._updates = int(state)


def _mixed(seed: int, count: int) -> int:
    """A seed from two numbers (splitmix64): the generator takes neighbouring seeds to similar first draws."""
    mixed = (seed * 0xD1342543DE82EF95 + (count + 1) * 0x9E3779B97F4A7C15) & _64_BITS
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return mixed ^ (mixed >> 31)

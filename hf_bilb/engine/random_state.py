"""The random generators that a model's forward pass may draw from, to run it again with the same dropout masks."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """States of torch's (CPU and the run's device), Python's and numpy's default generators."""

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any
    on: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """The present state; about 30 microseconds, no device synchronisation."""
        # The run's device is its process's current one. Without an index: not every kind of device takes it.
        of_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
        numpy = sys.modules.get("numpy")  # where nobody has imported it, nobody draws from it
        of_numpy = None if numpy is None else numpy.random.get_state()
        return cls(torch.get_rng_state(), of_device, random.getstate(), of_numpy, device)

    def restore(self) -> None:
        """Bring it back."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(self.on).set_rng_state(self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

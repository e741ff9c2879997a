"""The state of a loss balancer: complete, explicit, flat tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_bilb.engine.double_loop import LowerLevel
from hf_bilb.engine.inner_loop import InnerLoop
from hf_bilb.engine.optimizer import OwnOptimizer
from hf_bilb.errors import TaskLossError

#: Prefix of z's entries.
LOWER_LEVEL = "lower_level."


class BalancerState:
    """Saving and restoring; `LossBalancer` is its only subclass.

    The subclass sets `_parts`, the modules whose parameters and buffers are state; `_optimizer`, whose moments are;
    `_inner`, whose `level` is z of a double loop or None; `_epoch`.
    """

    _parts: nn.ModuleDict
    _optimizer: OwnOptimizer
    _inner: InnerLoop | None
    _epoch: int

    @property
    def _lower_level(self) -> LowerLevel | None:
        return None if self._inner is None else self._inner.level

    def snapshot(self) -> dict[str, Tensor]:
        """`state_dict()` without z, which only `step` changes: what an update that is dropped has to bring back."""
        state = {name: tensor.detach().clone() for name, tensor in self._parts.state_dict().items()}
        state.update({f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()})
        state["epoch"] = torch.tensor(self._epoch)
        return state

    def rollback(self, snapshot: Mapping[str, Tensor]) -> None:
        """Restore a `snapshot()`."""
        _check_entries(snapshot, self.snapshot())
        self._epoch = int(snapshot["epoch"])
        prefix = "optimizer."
        own = {name: tensor for name, tensor in snapshot.items() if name != "epoch" and not name.startswith(prefix)}
        self._parts.load_state_dict(own)
        self._optimizer.load_state_dict(_below(snapshot, prefix))

    def restart(self, snapshot: Mapping[str, Tensor]) -> None:
        """`rollback` at the start of a run; z will start at the model's parameters."""
        self.rollback(snapshot)
        if self._lower_level is not None:
            self._lower_level.started = False

    def state_dict(self) -> dict[str, Tensor]:
        """All state as a flat dict of tensors (detached copies), between two updates. A double loop's z is in it once
        a model is bound."""
        z = {} if self._lower_level is None else self._lower_level.state_dict()
        return {**self.snapshot(), **{f"{LOWER_LEVEL}{name}": tensor for name, tensor in z.items()}}

    def check_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raise `TaskLossError` when `load_state_dict(state)` would: entries missing, unknown or of another shape."""
        _check_entries(state, self.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`.

        Raises:
            TaskLossError: entries that are missing, unknown or of another shape; nothing is changed then.
        """
        self.check_state_dict(state)
        if self._lower_level is not None:
            self._lower_level.load_state_dict(_below(state, LOWER_LEVEL))
        self.rollback({name: tensor for name, tensor in state.items() if not name.startswith(LOWER_LEVEL)})

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Begin with what another run has learned: parameters, moments, references and last losses; the epoch and the
        guards' counters start anew, and so does what belonged to another model: z, and losses to compare the next with.

        Raises:
            TaskLossError: as `load_state_dict`.
        """
        now = self.snapshot()
        fresh = {name: now[name] for name in now if name == "epoch" or name.startswith(("guards.", "progress."))}
        learned = {name: tensor for name, tensor in state.items() if not name.startswith(LOWER_LEVEL)}
        self.restart({**learned, **fresh})


def _check_entries(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            what = "is missing" if name not in state else "is unknown"
            raise TaskLossError(
                f"balancer state: entry {name!r} {what}; was it saved by another method or version, or with other "
                "options?"
            )
        if state[name].shape != expected[name].shape:
            got, want = tuple(state[name].shape), tuple(expected[name].shape)
            tasks = len(expected["memory.last_losses"])
            raise TaskLossError(f"balancer state: entry {name!r} has shape {got}, expected {want} for {tasks} tasks")


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

"""Where in its training data a run is: which pass, how many updates of it, and how its random generators began it.

`Trainer` works the position out of the number of steps, which fails where the length of a pass is not known or was cut
short. It is counted here instead, and lies in every checkpoint as `data_position_<rank>.json`.
"""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerState

from hf_bilb.errors import CheckpointError

_FORMAT = 1


@dataclass(frozen=True)
class PassRandomness:
    """The generators that a data set may draw its order from, as they were before a pass began.

    Torch's (CPU), Python's and numpy's default ones, and the data set's own, where it has a `torch.Generator` as its
    attribute `generator` (the convention of accelerate).
    """

    torch: bytes
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    of_dataset: bytes | None

    @classmethod
    def capture(cls, dataset: Any) -> PassRandomness:
        """The present state; some 20 microseconds."""
        own = _generator_of(dataset)
        return cls(
            _as_bytes(torch.get_rng_state()),
            random.getstate(),
            np.random.get_state(),  # type: ignore[arg-type]
            None if own is None else _as_bytes(own.get_state()),
        )

    def restore(self, dataset: Any) -> None:
        """Bring it back."""
        torch.set_rng_state(_as_tensor(self.torch))
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        own = _generator_of(dataset)
        if own is not None and self.of_dataset is not None:
            own.set_state(_as_tensor(self.of_dataset))

    def as_json(self) -> dict[str, Any]:
        """About 20 kB of text."""
        version, numbers, gauss = self.python
        kind, keys, *rest = self.numpy
        return {
            "torch": base64.b64encode(self.torch).decode(),
            "python": [version, list(numbers), gauss],
            "numpy": [kind, [int(key) for key in keys], *rest],
            "dataset": None if self.of_dataset is None else base64.b64encode(self.of_dataset).decode(),
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> PassRandomness:
        """The inverse of `as_json`."""
        version, numbers, gauss = found["python"]
        kind, keys, *rest = found["numpy"]
        return cls(
            base64.b64decode(found["torch"]),
            (version, tuple(numbers), gauss),
            (kind, np.array(keys, dtype=np.uint32), *rest),
            None if found["dataset"] is None else base64.b64decode(found["dataset"]),
        )


def _generator_of(dataset: Any) -> torch.Generator | None:
    own = getattr(dataset, "generator", None) if isinstance(dataset, IterableDataset) else None
    return own if isinstance(own, torch.Generator) else None


def _as_bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _as_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


@dataclass(frozen=True)
class SavedPosition:
    """What a checkpoint says of the data: the next update is number `updates` (from 0) of pass `epoch` (from 0).

    Args:
        global_step: updates of the whole run.
        rows_per_update: of all ranks together; None = not known.
        lost_batches: batches at the end of the pass whose gradients were waiting for the next pass, and are lost.
        randomness: None = not known, or a pass that is yet to begin.
    """

    epoch: int
    updates: int
    global_step: int = 0
    rows_per_update: int | None = None
    lost_batches: int = 0
    randomness: PassRandomness | None = None

    def in_updates_of(self, rows: int) -> tuple[int, bool]:
        """How many updates of `rows` rows the part of the pass that is done makes, and whether it is a whole number."""
        if self.rows_per_update in (None, rows):
            return self.updates, True
        done, rest = divmod(self.updates * self.rows_per_update, rows)
        return done, rest == 0


class DataPosition:
    """The position of a run under way.

    Attributes:
        epoch: the pass that is under way, or about to begin; counted from 0 over all parts of a resumed run.
        skipped_updates: how many updates of it were done before this process came to it.
        given: whether it has given a batch to this process.
    """

    def __init__(self) -> None:
        self.start(SavedPosition(0, 0))

    def start(self, where: SavedPosition) -> None:
        """A run begins, or goes on, at `where`."""
        self.epoch = where.epoch
        self.skipped_updates = where.updates
        self._randomness = where.randomness
        self._first_step = where.global_step
        self.given = self._ended = False
        self._waiting = 0

    def begin_pass(self, epoch: int, global_step: int, dataset: Any) -> None:
        """Before the iterator of pass `epoch` is made: a pass that goes on begins with the generators it had."""
        if epoch != self.epoch:
            self.start(SavedPosition(epoch, 0, global_step))
        if self.skipped_updates > 0 and self._randomness is not None:
            self._randomness.restore(dataset)
        else:
            self._randomness = PassRandomness.capture(dataset)

    def end_pass(self, global_step: int) -> None:
        """The loop over the pass is left."""
        self.start(SavedPosition(self.epoch + 1, 0, global_step))

    def took(self, batches: int) -> None:
        """The pass gave `batches` batches for an update."""
        self._ended = batches == 0
        if batches:
            self.given, self._waiting = True, 0

    def wait(self, batches: int) -> None:
        """The last `batches` batches of the pass are too few for an update: their gradients wait for the next pass."""
        self._waiting = batches

    def updates_done(self, global_step: int) -> int:
        """Updates of the pass so far."""
        return self.skipped_updates + global_step - self._first_step

    def saved(self, global_step: int, rows_per_update: int, cut_short: bool) -> SavedPosition:
        """What a checkpoint saved now says; `cut_short`: the pass ends here."""
        if self._ended or cut_short:
            return SavedPosition(self.epoch + 1, 0, global_step, rows_per_update, lost_batches=self._waiting)
        done = self.updates_done(global_step)
        return SavedPosition(self.epoch, done, global_step, rows_per_update, randomness=self._randomness)


# --- the file -------------------------------------------------------------------------------------------------------


def position_file(rank: int) -> str:
    """Its name."""
    return f"data_position_{rank}.json"


def _file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / position_file(rank)


def write_position(folder: str | Path, rank: int, position: SavedPosition) -> None:
    """Write `data_position_<rank>.json` into `folder`, which is created if need be."""
    path = _file(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "format": _FORMAT,
        "epoch": position.epoch,
        "updates": position.updates,
        "global_step": position.global_step,
        "rows_per_update": position.rows_per_update,
        "lost_batches": position.lost_batches,
        "randomness": None if position.randomness is None else position.randomness.as_json(),
    }
    path.write_text(json.dumps(found), encoding="utf-8")


def read_position(folder: str | Path, rank: int) -> SavedPosition | None:
    """The position in `folder`, with the generators of rank `rank` where it was saved with that many; None: no file.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = next((path for path in (_file(folder, rank), _file(folder, 0)) if path.is_file()), None)
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise CheckpointError(f"{path}: has format {found['format']}, this version of hf_bilb reads {_FORMAT}")
        own = found["randomness"] is not None and path == _file(folder, rank)
        position = SavedPosition(
            int(found["epoch"]),
            int(found["updates"]),
            int(found["global_step"]),
            int(found["rows_per_update"]),
            int(found["lost_batches"]),
            PassRandomness.from_json(found["randomness"]) if own else None,
        )
        if min(position.epoch, position.updates) < 0 or position.rows_per_update == 0:
            raise ValueError
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: is damaged or was not written by hf_bilb") from None
    return position


def position_of_state(state: TrainerState) -> SavedPosition | None:
    """The position in data of unknown length, out of a checkpoint's `trainer_state.json` alone; None: it cannot be.

    `Trainer` counts such data as `epoch = pass + updates in it / max_steps`.
    """
    if state.epoch is None or state.max_steps < 1:
        return None
    if state.epoch == 1 and state.global_step == state.max_steps:
        return SavedPosition(0, state.global_step, state.global_step)  # all in one pass, which may go on
    epoch = int(state.epoch)
    updates = (state.epoch - epoch) * state.max_steps
    whole = round(updates)
    if abs(updates - whole) > 1e-3 or not 0 < whole <= state.global_step - epoch:
        return None
    return SavedPosition(epoch, whole, state.global_step)

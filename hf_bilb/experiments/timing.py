"""How long the updates of a run take, apart from its evaluations and checkpoints, and how much memory they need."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

LOG_KEY = "training_seconds"
WARM_UP_UPDATES = 5  # of each process; compiling, filling caches and starting workers are no part of a mean update


class StepClock(TrainerCallback, ExportableState):
    """Wall-clock spent in updates: loading of batches, forward, backward, balancer and logging, without evaluations and
    checkpoints. Every evaluation's entry in the log history gets `training_seconds`, the seconds so far.

    CUDA is waited for only where the clock is started, paused or read, so that updates stay asynchronous. The first
    batch after a pause is loaded before the clock goes on.

    State: stands in `trainer_state.json` (`stateful_callbacks`) and is taken up on a resume, whatever
    `restore_callback_states_from_checkpoint` says. Each process has its own clock; the log has that of the first.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._seconds = 0.0  # of finished stretches
        self._timed_seconds = 0.0  # the same without warm-up
        self._timed_updates = 0
        self._process_updates = 0
        self._started: float | None = None
        self._cuda = False
        self._peak_memory: int | None = None

    # ------------------------------------------------------------------------------------------------ figures

    @property
    def training_seconds(self) -> float:
        """Seconds in updates up to the last pause, of all processes that the run has been resumed in."""
        return self._seconds

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds of an update, without each process's first `WARM_UP_UPDATES`; None when there were no others."""
        return self._timed_seconds / self._timed_updates if self._timed_updates else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """CUDA: the most that tensors took during updates, in this process; CPU: the most the process took by then.

        None where the system does not tell (Windows without CUDA).
        """
        return self._peak_memory

    def facts(self) -> dict[str, Any]:
        """The three figures, for `results.json`."""
        return {
            "training_seconds": round(self.training_seconds, 3),
            "step_seconds": self.step_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in the form `ExportableState` asks for."""
        attributes = {
            "seconds": self._seconds,
            "timed_seconds": self._timed_seconds,
            "timed_updates": self._timed_updates,
            "peak_memory": self._peak_memory,
        }
        return {"args": {}, "attributes": attributes}

    # ------------------------------------------------------------------------------------------------ events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reset()
        self._cuda = args.device.type == "cuda"
        if state.global_step > 0:
            # A checkpoint of a run that had no clock has no entry, and the next save asks for one.
            before = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
            self._seconds = before["seconds"]
            self._timed_seconds = before["timed_seconds"]
            self._timed_updates = before["timed_updates"]
            self._peak_memory = before["peak_memory"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._started is None:
            self._start(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._process_updates += 1
        if self._process_updates > WARM_UP_UPDATES:
            self._timed_updates += 1
        elif self._process_updates == WARM_UP_UPDATES:
            self._pause(args)  # what follows counts as timed
            self._start(args)
        self._pause_if_asked(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pause_if_asked(args, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.log_history:
            state.log_history[-1][LOG_KEY] = round(self._seconds, 3)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pause(args)

    # ------------------------------------------------------------------------------------------------ clock

    def _pause_if_asked(self, args: TrainingArguments, control: TrainerControl) -> None:
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._pause(args)

    def _start(self, args: TrainingArguments) -> None:
        if self._cuda:
            torch.cuda.synchronize(args.device)
            torch.cuda.reset_peak_memory_stats(args.device)
        self._started = time.perf_counter()

    def _pause(self, args: TrainingArguments) -> None:
        if self._started is None:
            return
        if self._cuda:
            torch.cuda.synchronize(args.device)
        elapsed = time.perf_counter() - self._started
        self._started = None
        self._seconds += elapsed
        if self._process_updates > WARM_UP_UPDATES:
            self._timed_seconds += elapsed
        peak = torch.cuda.max_memory_allocated(args.device) if self._cuda else _peak_process_memory()
        if peak is not None:
            self._peak_memory = max(self._peak_memory or 0, peak)


def _peak_process_memory() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes on Linux

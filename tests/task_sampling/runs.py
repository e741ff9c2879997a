"""Runs with `task_sampling` that are killed in the middle of an epoch and resumed by a fresh interpreter.

    python -m tests.task_sampling.runs kill FOLDER
    python -m tests.task_sampling.runs resume FOLDER

As `tests.checkpoints.runs`, whose results it writes, plus the examples that rank r saw: `whole-seen<r>.pt`, ...
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.runs import KillAt, finish, in_processes
from tests.products import ALL_CASES
from tests.synthetic import build_model
from tests.task_sampling.training import NotingTrainer, TaskData, build_trainer, sets_of_tasks

BATCH = 4
LOGGING_STEPS, SAVE_STEPS = 7, 5
EPOCHS = 3


@dataclass(frozen=True)
class Run:
    """A run that kills itself after step `kill_at`; the last checkpoint lies in the middle of the second epoch."""

    sampling: dict[str, Any]
    num_ranks: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    several_sets: bool = False

    @property
    def accumulation(self) -> int:
        return self.settings.get("gradient_accumulation_steps", 1)

    @property
    def kill_at(self) -> int:
        return 38 if self.num_ranks == 1 else 23

    @property
    def resumes_from(self) -> int:
        return self.kill_at // SAVE_STEPS * SAVE_STEPS


SINGLE_TASK = {"strategy": "temperature", "temperature": 2.0}
MIXED = {"strategy": "uniform", "batches": "mixed"}
WORKERS = {"dataloader_num_workers": 2}
#: Of batches, ranks and worker processes every pair.
RUNS = {
    "single_task-workers": Run(SINGLE_TASK, settings=WORKERS),
    "mixed": Run(MIXED),
    "single_task-two_ranks": Run(SINGLE_TASK, 2),
    "mixed-two_ranks-workers": Run(MIXED, 2, WORKERS),
    "same-two_ranks": Run({**SINGLE_TASK, "ranks": "same"}, 2),
    "dispatched-two_ranks": Run(SINGLE_TASK, 2, {"accelerator_config": {"dispatch_batches": True}}),
    "split-two_ranks": Run(
        SINGLE_TASK, 2, {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 2 * BATCH}
    ),
    "accumulated-two_ranks": Run(
        SINGLE_TASK, 2, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2}
    ),
    "sets": Run({}, several_sets=True),
    "sets-two_ranks-workers": Run(SINGLE_TASK, 2, WORKERS, several_sets=True),
}
if ALL_CASES:
    RUNS |= {
        "single_task": Run(SINGLE_TASK),
        "mixed-workers": Run(MIXED, settings=WORKERS),
        "single_task-two_ranks-workers": Run(SINGLE_TASK, 2, WORKERS),
        "mixed-two_ranks": Run(MIXED, 2),
    }


def trainer_of(run: Run, output_dir: Path) -> NotingTrainer:
    settings = {
        "balancer": {"name": "bilb", "learning_rate": 0.05},
        "output_dir": str(output_dir),
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "logging_steps": LOGGING_STEPS,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "ddp_backend": "gloo" if run.num_ranks > 1 else None,
        **run.settings,
    }
    return build_trainer(
        build_model(dropout=0.1), sets_of_tasks() if run.several_sets else TaskData(), run.sampling, **settings
    )


def run_to_end(run: Run, folder: Path, output: str, result: str, resume: bool) -> None:
    """In as many processes as the run has ranks."""

    def target() -> None:
        trainer = trainer_of(run, folder / output)
        finish(trainer, folder / f"{result}.pt", resume=resume)
        assert trainer.args.world_size == run.num_ranks
        torch.save(trainer.seen, folder / f"{result}-seen{trainer.args.process_index}.pt")

    assert in_processes(target, run.num_ranks) == [0] * run.num_ranks, folder.name


def kill(run: Run, folder: Path) -> None:
    def target() -> None:
        trainer = trainer_of(run, folder / "killed")
        trainer.add_callback(KillAt(run.kill_at))
        trainer.train()

    assert in_processes(target, run.num_ranks) == [-signal.SIGKILL] * run.num_ranks, folder.name


def main(mode: str, folder: Path, *names: str) -> None:
    gc.freeze()  # as in `tests.checkpoints.runs`
    for name, run in RUNS.items():
        if names and name not in names:
            continue
        part = folder / name
        part.mkdir(exist_ok=True)
        if mode == "kill":
            run_to_end(run, part, "whole", "whole", resume=False)
            kill(run, part)
        else:
            # Nothing that a run draws may come from what the interpreter happens to have drawn before.
            torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
            run_to_end(run, part, "killed", "resumed", resume=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

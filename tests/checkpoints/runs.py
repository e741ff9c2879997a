"""Training runs that are killed and resumed: each in an operating-system process of its own, forked after the imports.

    python -m tests.checkpoints.runs kill FOLDER     every run without a kill, and every run up to its kill
    python -m tests.checkpoints.runs resume FOLDER   a fresh interpreter resumes the killed ones

Results lie in FOLDER/<run>/whole.pt and FOLDER/<run>/resumed.pt; the run's own folders are `whole` and `killed`.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.storage import folder_lock
from hf_bilb.trainer import checkpoint_trainer, checkpointing
from hf_bilb.trainer.running_log import VECTORS_FILE
from tests.synthetic import build_data, build_model, flat_parameters
from tests.trainer.models import FeatureModel, build

fork = multiprocessing.get_context("fork")
NOT_COMPARED = ("runtime", "per_second", "model_preparation_time")
LOGGING_STEPS, SAVE_STEPS = 7, 5


@dataclass(frozen=True)
class Run:
    """One run of 33 steps, 11 in an epoch: shuffled data, dropout, partial labels.

    Attributes:
        kill_at: step after which the process kills itself; no logging step and no save step.
        resumes_from: the checkpoint that is then the last.
        rows, batch, accumulation: of the data and of one rank's micro-batch.
        num_ranks: operating-system processes.
        dropout: of the model; its random stream has to go on, too.
        poisoned: row whose features are infinite, so that its losses are not finite.
        features: the model returns router features.
        begins_from: the run in this table whose balancer it begins with.
        settings: further training arguments.
    """

    kill_at: int
    resumes_from: int
    settings: dict[str, Any]
    rows: int = 88
    batch: int = 8
    accumulation: int = 1
    num_ranks: int = 1
    dropout: float = 0.1
    poisoned: int | None = None
    task_names: list[str] | None = field(default=None)
    features: bool = False
    begins_from: str | None = None


BILB = {"name": "bilb", "learning_rate": 0.05}
QM9 = {"name": "bilb", "preset": "qm9", "learning_rate": 0.05}
DOUBLE = {**BILB, "lower_level": {"inner_steps": 2, "inner_learning_rate": 0.02}}
FEATURES = {**BILB, "router": "features", "initial_logits": None, "num_features": 8}
FAMO = {"name": "famo", "reevaluate": "next_batch", "learning_rate": 0.2}
STCH = {"name": "stch", "mu": 0.3, "warmup_epochs": 1}
MARIGOLD = {"name": "marigold", "mode": "exact", "learning_rate": 0.1, "perturbation": 0.1}
#: Three micro-batches of four rows; 32 of them in an epoch: its last window holds two.
WINDOW: dict[str, Any] = {"rows": 128, "batch": 4, "accumulation": 3, "dropout": 0.3}
RUNS = {
    "bilb": Run(13, 10, {"balancer": BILB, "absent_tasks": "hold"}),
    # Mid-epoch after new references were taken in step 12: they must not be taken again.
    "qm9": Run(18, 15, {"balancer": QM9}),
    # Between two epochs: references must be taken now, once.
    "qm9_epoch_end": Run(13, 11, {"balancer": QM9, "save_steps": 11}),
    # The router's rate is the model's, which decays.
    "uw": Run(13, 10, {"balancer": {"name": "uw", "learning_rate": "follow_model"}, "optim": "sgd"}),
    # Resumed while the references are still being formed.
    "mean_of": Run(13, 10, {"balancer": {**BILB, "reference": {"mean_of": 12}}}),
    # One step in every epoch is dropped.
    "dropped": Run(18, 15, {"balancer": QM9, "nonfinite_loss": "skip"}, poisoned=3),
    # 21 micro-batches in an epoch: the last window holds one.
    "accumulated": Run(18, 15, {"balancer": QM9}, rows=84, batch=4, accumulation=2),
    # A line of the vectors is written after the last save, and once more.
    "many_tasks": Run(29, 25, {"balancer": BILB}, task_names=[f"task_{k}" for k in range(40)]),
    "best_model": Run(
        18,
        15,
        {
            "balancer": BILB,
            "eval_strategy": "steps",
            "eval_steps": SAVE_STEPS,
            "load_best_model_at_end": True,
            "save_total_limit": 2,
            "learning_rate": 0.1,
        },
    ),
    "two_ranks": Run(18, 15, {"balancer": QM9}, batch=4, num_ranks=2),
    # Stopped in the warm-up, which goes on; and soon after it, when the references have been taken.
    "in_warm_up": Run(13, 10, {"balancer": QM9, "balancer_warmup_steps": 12}),
    "after_warm_up": Run(13, 10, {"balancer": BILB, "balancer_warmup_steps": 8}),
    "before_freezing": Run(13, 10, {"balancer": BILB, "balancer_freeze_after": 12}),
    # A new epoch begins after the freeze: its references are not taken.
    "frozen": Run(18, 15, {"balancer": QM9, "balancer_freeze_after": 12}),
    # Resumed before anything of its own would be missed, and begun from another run.
    "begun_from_another": Run(13, 10, {"balancer": BILB}, begins_from="bilb"),
    "window": Run(18, 15, {"balancer": QM9, "balance_over": "window"}, **WINDOW),
    "window_features": Run(18, 15, {"balancer": FEATURES, "balance_over": "window"}, **WINDOW, features=True),
    "double_loop": Run(13, 10, {"balancer": DOUBLE, "balancer_warmup_steps": 4}, dropout=0.3),
    "double_loop_window": Run(18, 15, {"balancer": DOUBLE, "balance_over": "window"}, **WINDOW),
    "diagnostics": Run(
        13, 10, {"balancer": BILB, "diagnostics": {"every_n_steps": 3, "inner_steps": 2, "inner_learning_rate": 0.02}}
    ),
    "double_loop_two_ranks": Run(13, 10, {"balancer": DOUBLE}, batch=4, num_ranks=2, dropout=0.3),
    # Of the other methods a few; `make campaign` kills all. The losses of the last update before the checkpoint:
    "famo_next_batch": Run(13, 10, {"balancer": FAMO}),
    # In the epoch whose losses are the nadir, on which the next one is built.
    "stch_schedule": Run(18, 15, {"balancer": STCH}),
    # A trial step and its undoing before every update, with dropout.
    "marigold_exact": Run(13, 10, {"balancer": MARIGOLD, "balance_over": "window"}, **WINDOW),
}


def build_trainer(run: Run, output_dir: Path, **overrides: Any) -> BilevelMTLTrainer:
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": LOGGING_STEPS,
        "save_steps": SAVE_STEPS,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": run.batch,
        "gradient_accumulation_steps": run.accumulation,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if run.num_ranks > 1 else None,
        "seed": 5,
        **run.settings,
        **overrides,
    }
    if run.begins_from is not None:
        settings["balancer_init_from"] = str(output_dir.parent.parent / run.begins_from / "whole")
    num_tasks = len(run.task_names or []) or 4
    train_data = build_data(run.rows, num_tasks=num_tasks, missing=0.3)
    if run.poisoned is not None:
        train_data.features[run.poisoned] = torch.inf
    config: dict[str, Any] = {"dropout": run.dropout, "task_names": run.task_names}
    return BilevelMTLTrainer(
        model=build(FeatureModel, torch.float32, **config) if run.features else build_model(**config),
        args=BilevelMTLTrainingArguments(**settings),
        train_dataset=train_data,
        eval_dataset=build_data(24, num_tasks=num_tasks, missing=0.3, seed=7),
    )


class KillAt(TrainerCallback):
    """SIGKILL of this very process after `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            kill_myself()


class Begin(TrainerCallback):
    """Notes the step that a run begins at."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


class Messages(logging.Handler):
    """Collects the warnings of the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("hf_bilb").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def kill_myself() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def finish(trainer: BilevelMTLTrainer, result: Path, resume: bool | str) -> None:
    """Train to the end and save all that must not depend on whether the run was killed."""
    messages, begin = Messages(), Begin()
    trainer.add_callback(begin)
    output = trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        vectors = Path(trainer.args.output_dir) / VECTORS_FILE
        history = [
            {key: value for key, value in entry.items() if not any(word in key for word in NOT_COMPARED)}
            for entry in trainer.state.log_history
        ]
        found = {
            "began_at": begin.step,
            "steps": trainer.state.global_step,
            "world_size": trainer.args.world_size,
            "parameters": flat_parameters(trainer.model),
            "balancer": trainer.balancer.state_dict(),
            "logs": history,
            "training_loss": output.training_loss,
            "vectors": vectors.read_text() if vectors.is_file() else None,
            "best": trainer.state.best_model_checkpoint,
            "messages": messages.texts,
        }
        torch.save(found, result)


def in_processes(target: Callable[[], None], num_ranks: int = 1) -> list[int]:
    """Run `target` in forked processes, as ranks of one launch when there are several; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def main(rank: int) -> None:
        torch.set_num_threads(1)
        if num_ranks > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(num_ranks))
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        target()

    processes = [fork.Process(target=main, args=(rank,)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def kill_and_finish(folder: Path, name: str, run: Run) -> None:
    def whole() -> None:
        finish(build_trainer(run, folder / "whole"), folder / "whole.pt", resume=False)

    def killed() -> None:
        trainer = build_trainer(run, folder / "killed")
        trainer.add_callback(KillAt(run.kill_at))
        trainer.train()

    assert in_processes(whole, run.num_ranks) == [0] * run.num_ranks, name
    assert in_processes(killed, run.num_ranks) == [-signal.SIGKILL] * run.num_ranks, name


def resume(folder: Path, name: str, run: Run) -> None:
    def target() -> None:
        finish(build_trainer(run, folder / "killed"), folder / "resumed.pt", resume=True)

    assert in_processes(target, run.num_ranks) == [0] * run.num_ranks, name


# --- killed from outside, at any moment ---------------------------------------------------------------------------

#: A save at every step: most kills hit one.
OUTSIDE = Run(0, 0, {"balancer": QM9, "save_steps": 1, "num_train_epochs": 6})
OUTSIDE_KILLS = 4


def kill_from_outside(folder: Path) -> None:
    """Kill the run `OUTSIDE_KILLS` times from its parent, each time some milliseconds after two more checkpoints."""

    def train(resume: bool) -> None:
        torch.set_num_threads(1)
        build_trainer(OUTSIDE, folder / "killed").train(resume_from_checkpoint=resume)

    def last() -> int:
        found = [int(p.name.split("-")[1]) for p in (folder / "killed").glob("checkpoint-*")]
        return max(found, default=0)

    def whole() -> None:
        finish(build_trainer(OUTSIDE, folder / "whole"), folder / "whole.pt", resume=False)

    assert in_processes(whole) == [0]
    delays = random.Random(0)
    for kill in range(OUTSIDE_KILLS):
        before = last()
        process = fork.Process(target=train, args=(kill > 0,))
        process.start()
        while last() < before + 2 and process.is_alive():
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"


# --- killed while a checkpoint is written -------------------------------------------------------------------------

SAVING = Run(0, 0, {"balancer": BILB, "num_train_epochs": 2})
KILLED_SAVE = 10


def kill_when_saving(point: str, trainer: BilevelMTLTrainer) -> None:
    """Arrange that the process kills itself at `point` of the save of step `KILLED_SAVE`."""
    places = {
        "weights_written": (trainer, "_save_optimizer_and_scheduler", "before"),
        "balancer_written": (trainer, "_save_optimizer_and_scheduler", "after"),
        "before_marker": (checkpoint_trainer.checkpointing, "publish", "before"),
        "before_rename": (checkpointing.os, "rename", "before"),
        "before_rotation": (checkpoint_trainer, "rotate_checkpoints", "before"),
    }
    owner, attribute, when = places[point]
    original = getattr(owner, attribute)

    def killing(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step != KILLED_SAVE:
            return original(*args, **kwargs)
        if when == "after":
            original(*args, **kwargs)
        return kill_myself()

    setattr(owner, attribute, killing)


POINTS = ["weights_written", "balancer_written", "before_marker", "before_rename", "before_rotation"]


def kill_in_save(folder: Path, point: str) -> None:
    def whole() -> None:
        finish(build_trainer(SAVING, folder / "whole"), folder / "whole.pt", resume=False)

    def killed() -> None:
        trainer = build_trainer(SAVING, folder / "killed")
        kill_when_saving(point, trainer)
        trainer.train()

    if point == POINTS[0]:
        assert in_processes(whole) == [0]
    assert in_processes(killed) == [-signal.SIGKILL], point
    # The lock's file stays behind, its lock died with the process.
    left = {path.name for path in (folder / "killed").iterdir()} - {folder_lock.LOCK_FILE}
    torch.save(sorted(left), folder / "left.pt")


def resume_after_killed_save(folder: Path, point: str) -> None:
    def target() -> None:
        # Saves at other steps than before: nothing will be written where the half checkpoint lies. (Trainer takes
        # `save_steps` from the checkpoint, whatever the arguments say.)
        trainer = build_trainer(SAVING, folder / "killed", save_strategy="epoch")
        finish(trainer, folder / "resumed.pt", resume=True)

    assert in_processes(target) == [0], point


def main(mode: str, folder: Path) -> None:
    gc.freeze()  # Trainer collects garbage when it begins: not what the imports have left, in every process
    for name, run in RUNS.items():
        (folder / name).mkdir(exist_ok=True)
        (kill_and_finish if mode == "kill" else resume)(folder / name, name, run)
    outside = folder / "outside"
    outside.mkdir(exist_ok=True)
    if mode == "kill":
        kill_from_outside(outside)
    else:
        resume(outside, "outside", OUTSIDE)
    for point in POINTS:
        (folder / point).mkdir(exist_ok=True)
        (kill_in_save if mode == "kill" else resume_after_killed_save)(folder / point, point)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""One process of a launch: runs the scenarios and saves what they return.

python -m tests.task_sampling.worker FOLDER 1
python -m torch.distributed.run --nproc_per_node 2 -m tests.task_sampling.worker FOLDER 2
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.checkpoints.runs import NOT_COMPARED
from tests.synthetic import build_model, flat_parameters
from tests.task_sampling.training import TaskData, build_trainer, rank, sets_of_tasks, world_size

#: Examples of a rank's micro-batch; one process takes those of both ranks at once.
BATCH = 4
EPOCHS = 3
SAMPLINGS: dict[str, dict[str, Any]] = {
    "proportional-different": {},
    "uniform-different": {"strategy": "uniform", "ranks": "different"},
    "temperature-same": {"strategy": "temperature", "temperature": 2.0, "ranks": "same"},
    "round_robin-same": {"strategy": "round_robin", "ranks": "same"},
    "round_robin-different": {"strategy": "round_robin"},
    "proportional-mixed": {"batches": "mixed"},
    "uniform-mixed": {"strategy": "uniform", "batches": "mixed"},
}
BALANCERS: dict[str, dict[str, Any]] = {"ls": {"name": "ls"}, "bilb": {"name": "bilb", "learning_rate": 0.05}}
LOADERS: dict[str, dict[str, Any]] = {
    "workers": {"dataloader_num_workers": 2},
    "dispatched": {"accelerator_config": {"dispatch_batches": True}},
    "dispatched-workers": {"accelerator_config": {"dispatch_batches": True}, "dataloader_num_workers": 2},
    "split": {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 2 * BATCH},
    "dispatched-split": {
        "accelerator_config": {"split_batches": True, "dispatch_batches": True},
        "per_device_train_batch_size": 2 * BATCH,
    },
    "drop_last": {"dataloader_drop_last": True},
    "uneven": {"accelerator_config": {"even_batches": False}},
}


#: A data set for each task; None = as nobody has said anything.
SETS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "temperature-same": SAMPLINGS["temperature-same"],
    "uniform-mixed": SAMPLINGS["uniform-mixed"],
}


def train(sampling: dict[str, Any] | None, several_sets: bool = False, **settings: Any) -> dict[str, Any]:
    """In float64 with Adam; one process takes the batches of two ranks as one."""
    apart = 2 // world_size()
    given = {
        "balancer": "ls",
        "optim": "adamw_torch",
        "num_train_epochs": EPOCHS,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH * apart,
        **settings,
    }
    data: Any = sets_of_tasks(torch.float64) if several_sets else TaskData(dtype=torch.float64)
    trainer = build_trainer(build_model(torch.float64), data, sampling, loader_ranks=apart, **given)
    assert trainer.args.world_size == world_size()
    trainer.train()
    wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert wrapped == (world_size() > 1), "two ranks without DistributedDataParallel would train apart"
    logs = [
        {key: value for key, value in entry.items() if not any(word in key for word in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]
    return {
        "world_size": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "seen": trainer.seen,
        "parameters": flat_parameters(trainer.model),
        "balancer": trainer.balancer.state_dict(),
        "logs": logs,
        "evaluation": trainer.evaluate() if several_sets else None,
    }


def all_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for balancer, options in BALANCERS.items():
        for name, sampling in SAMPLINGS.items():
            found[f"{balancer}/{name}"] = partial(train, sampling, balancer=options)
        for name in ("uniform-different", "temperature-same", "uniform-mixed"):
            found[f"{balancer}/{name}/accumulated"] = partial(
                train, SAMPLINGS[name], balancer=options, gradient_accumulation_steps=3
            )
    for name, given in SETS.items():
        found[f"sets/{name}"] = partial(train, given, several_sets=True, balancer=BALANCERS["bilb"])
    if world_size() == 2:
        workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
        found["sets/default/workers"] = partial(train, None, several_sets=True, **workers)
        found["sets/default/dispatched"] = partial(train, None, several_sets=True, **LOADERS["dispatched"])
        for loader, settings in LOADERS.items():
            for name in ("proportional-different", "uniform-mixed"):
                found[f"{loader}/{name}"] = partial(train, SAMPLINGS[name], **settings)
    return found


def main(folder: str, expected_world_size: int, *prefixes: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as in `tests.distributed.worker`
    if expected_world_size > 1:
        dist.init_process_group("gloo")
    # Launchers that silently start one process exist (`accelerate launch --cpu`).
    assert world_size() == expected_world_size == int(os.environ.get("WORLD_SIZE", "1"))
    scenarios = all_scenarios()
    results = {name: run() for name, run in scenarios.items() if not prefixes or name.startswith(prefixes)}
    torch.save(results, Path(folder) / f"world{expected_world_size}-rank{rank()}.pt")
    if expected_world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])

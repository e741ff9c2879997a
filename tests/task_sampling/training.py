"""Runs with `task_sampling`, whose Trainer notes which examples each micro-batch of this rank holds."""

from __future__ import annotations

import tempfile
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.trainer.checks import sampling_options
from hf_bilb.trainer.sampling import TaskSampler, TaskSamplingOptions, build_task_sampler
from tests.synthetic import TASK_NAMES, SyntheticData, build_data

#: Of the four tasks; the third is smaller than a batch.
SIZES = (57, 31, 3, 14)


class TaskData(SyntheticData):
    """Rows of one task each, the tasks in no order: `labels [K]` is NaN but for the row's own task."""

    def __init__(self, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float32) -> None:
        data = build_data(sum(sizes), num_tasks=len(sizes), dtype=dtype)
        ordered = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.task_ids = ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(2))]
        own = torch.nn.functional.one_hot(self.task_ids, len(sizes)).bool()
        super().__init__(data.features, data.labels.masked_fill(~own, torch.nan))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "index": torch.tensor(index)}


def sets_of_tasks(dtype: torch.dtype = torch.float32) -> dict[str, list[dict[str, Tensor]]]:
    """The rows of `TaskData` as a data set for each task; `index` is the place among all of them, one set after the
    other."""
    data = TaskData(dtype=dtype)
    rows = [data[int(i)] for i in torch.argsort(data.task_ids, stable=True)]
    rows = [{**row, "index": torch.tensor(place)} for place, row in enumerate(rows)]
    ends = list(accumulate(SIZES, initial=0))
    return {task: rows[a:b] for task, (a, b) in zip(TASK_NAMES, pairwise(ends), strict=True)}


#: The task of each row of these sets.
TASKS_OF_SETS = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))


class NotingTrainer(BilevelMTLTrainer):
    """Notes the example indices of its micro-batches in `seen`.

    `loader_ranks`: the ranks whose batches are one batch of this loader, for one process that stands for several.
    """

    def __init__(self, *args: Any, loader_ranks: int = 1, **kwargs: Any) -> None:
        self.loader_ranks = loader_ranks
        self.seen: list[list[int]] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.loader_ranks == 1:
            return super()._get_train_sampler(train_dataset)
        options = sampling_options(self)
        size = self._train_batch_size // self.loader_ranks
        return build_task_sampler(
            self.train_dataset, options, self.task_names, size, self.loader_ranks, seed=self.args.seed
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.seen.append(inputs["index"].tolist() if "index" in inputs else [])
        return super().training_step(model, inputs, num_items_in_batch)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def build_trainer(
    model: nn.Module,
    data: TaskData | dict[str, list[dict[str, Tensor]]],
    sampling: dict[str, Any] | None,
    loader_ranks: int = 1,
    **settings: Any,
) -> NotingTrainer:
    defaults: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp() if "output_dir" not in settings else None,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 5,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "absent_tasks": "hold",
        "ddp_backend": "gloo" if world_size() > 1 else None,
        "seed": 5,
    }
    args = BilevelMTLTrainingArguments(**{**defaults, **settings}, task_sampling=sampling)
    held_out = {task: rows[:5] for task, rows in data.items()} if isinstance(data, dict) else None
    return NotingTrainer(model=model, args=args, train_dataset=data, eval_dataset=held_out, loader_ranks=loader_ranks)


def expected_batches(
    data: TaskData | Tensor,
    sampling: dict[str, Any],
    epochs: int,
    batch_size: int,
    num_ranks: int,
    rank: int,
    seed: int = 5,
) -> list[list[int]]:
    """What rank `rank` is to see of `data` (or of rows of these tasks): batch i R + r is its i-th."""
    options = TaskSamplingOptions(**sampling)
    tasks = data if isinstance(data, Tensor) else data.task_ids
    sampler = TaskSampler(tasks, options, TASK_NAMES, batch_size, num_ranks, seed)
    batches = torch.cat([sampler.order(epoch) for epoch in range(epochs)]).view(-1, num_ranks, batch_size)
    return batches[:, rank].tolist()

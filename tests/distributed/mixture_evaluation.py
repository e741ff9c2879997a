"""Scenarios: evaluation of a mixture with one task per row, metrics batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hf_bilb import BilevelMTLTrainer
from tests.distributed.training import GLOBAL_BATCH, NOT_COMPARED, arguments, rank, world_size
from tests.metrics.mixture import LABEL_NAMES, TASKS, MixtureData, build_mixture, build_mixture_model, task_metrics

#: 3: rank 1 has no row of its own; 43, 61: its last batch is filled up, with 0 and 1 rows of its own; 64: none is.
ROWS = (3, 43, 61, 64)

UNEQUAL = (*NOT_COMPARED, "epoch", "preparation_time")


class Stream(IterableDataset):
    """The rows of a data set, without its length."""

    def __init__(self, data: MixtureData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.data[i] for i in range(len(self.data)))


def trainer_for(dataset: Dataset) -> BilevelMTLTrainer:
    args = arguments(
        per_device_eval_batch_size=GLOBAL_BATCH // world_size(),
        balancer="ls",
        label_names=LABEL_NAMES,
        batch_eval_metrics=True,
    )
    assert args.world_size == world_size()
    return BilevelMTLTrainer(
        model=build_mixture_model(), args=args, eval_dataset=dataset, compute_metrics=task_metrics()
    )


def evaluated(rows: int, stream: bool) -> dict[str, Any]:
    data = build_mixture(rows)
    here = torch.arange(rows) % GLOBAL_BATCH // (GLOBAL_BATCH // world_size()) == rank()
    of_mrpc = data.task_ids[here] == TASKS.index("mrpc")
    assert bool(of_mrpc.any()) == (rank() == 0), "rank 1 is to have no label of mrpc"
    trainer = trainer_for(Stream(data) if stream else data)
    # Twice: the second does not see what the first left.
    found = [trainer.evaluate(), trainer.evaluate()][1]
    compared = {key: value for key, value in found.items() if not any(word in key for word in UNEQUAL)}
    return {"metrics": compared}


def predicted(rows: int) -> dict[str, Any]:
    data = build_mixture(rows)
    output = trainer_for(data).predict(data.without_labels())
    assert output.label_ids is None
    metrics = {key for key in output.metrics if not any(word in key for word in UNEQUAL)}
    return {"predictions": torch.from_numpy(output.predictions), "metrics": metrics}


def mixture_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for rows in ROWS:
        found[f"mixture/{rows}"] = partial(evaluated, rows, stream=False)
        found[f"mixture_stream/{rows}"] = partial(evaluated, rows, stream=True)
    found["mixture_predicted/43"] = partial(predicted, 43)
    return found

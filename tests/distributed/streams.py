"""Scenarios: data without a length on one and two ranks: every row is evaluated once, training resumes where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer
from tests.distributed.training import (
    GLOBAL_BATCH,
    arguments,
    logged,
    optimizer_settings,
    rank,
    shared_folder,
    whole_parameters,
    world_size,
)
from tests.synthetic import SyntheticData, build_data, build_model

#: 1: rank 1 has no row of its own; 16: whole batches; 5, 21, 33: a last batch that is filled up.
ROWS = (1, 5, 16, 21, 33)
#: Accelerator's settings, and the Trainer's.
LOADING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "everywhere": ({"dispatch_batches": False}, {}),
    "everywhere_split": ({"dispatch_batches": False, "split_batches": True}, {}),
    "dispatched_split": ({"split_batches": True}, {}),
    "uneven": ({"even_batches": False}, {}),
    "workers": ({}, {"dataloader_num_workers": 2}),
    "everywhere_workers": ({"dispatch_batches": False}, {"dataloader_num_workers": 2}),
    "drop_last": ({}, {"dataloader_drop_last": True}),
}
#: Kinds of data, and what they are read with.
CASES: dict[str, tuple[str, ...]] = {
    "map": ("uneven", "drop_last"),
    "stream": ("default", "everywhere", "everywhere_split", "dispatched_split"),
    "shards": ("default", "everywhere", "workers", "everywhere_workers"),
}


def sizes(loading: str) -> tuple[int, ...]:
    """How many rows a way of loading is tried with. Few with worker processes: each is a fork, and one can hang in
    CPython 3.11 when another thread of the process begins or ends in that moment (in `_PyThreadState_DeleteExcept`)."""
    return (5, 21) if "workers" in loading else ROWS


class Stream(IterableDataset):
    """The rows of a data set, without its length; a function of the pass where it is `shuffled`."""

    def __init__(self, data: SyntheticData, shuffled: bool = False) -> None:
        self.data = data
        self.shuffled = shuffled
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        size = len(self.data)
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(size, generator=generator).tolist() if self.shuffled else range(size)
        return (self.data[i] for i in order)


def rows_of(kind: str, size: int) -> Any:
    data = build_data(size, dtype=torch.float64, missing=0.3)
    if kind == "map":
        return data
    if kind == "stream":
        return Stream(data)
    columns = {"features": data.features.tolist(), "labels": data.labels.tolist()}
    return datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=min(size, 3))


def in_float64(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name], dtype=torch.float64) for row in rows]) for name in rows[0]}


def count_rows(prediction: Any) -> dict[str, float]:
    predicted, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    assert predicted.shape == labels.shape
    return {"rows": float(len(labels)), "sum": float(predicted.double().sum())}


def evaluated(kind: str, size: int, loading: str) -> dict[str, Any]:
    accelerator, settings = LOADING[loading]
    split = accelerator.get("split_batches", False)
    args = arguments(
        per_device_eval_batch_size=GLOBAL_BATCH if split else GLOBAL_BATCH // world_size(),
        balancer="ls",
        accelerator_config=accelerator,
        **settings,
    )
    model = build_model(torch.float64)
    data = rows_of(kind, size)
    trainer = BilevelMTLTrainer(
        model=model, args=args, eval_dataset=data, compute_metrics=count_rows, data_collator=in_float64
    )
    assert trainer.accelerator.dispatch_batches == accelerator.get("dispatch_batches")
    # Twice: the second does not see what the first left.
    found = [trainer.evaluate(), trainer.evaluate()][1]
    predicted = trainer.predict(data)
    return {
        "metrics": {k: v for k, v in found.items() if "loss" in k or k in ("eval_rows", "eval_sum")},
        "predictions": torch.as_tensor(predicted.predictions),
    }


class SaveAt(TrainerCallback):
    """Saves after the given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


def resumed(dispatch: bool, accumulation: int) -> dict[str, Any]:
    """36 rows in batches of 8 without a length: passes of 4 1/2 batches; saved in the second and third."""
    folder = shared_folder()
    per_rank = GLOBAL_BATCH // world_size()
    runs = []
    for start in (None, 7, 9):
        args = arguments(
            output_dir=str(folder if start is None else folder / str(start)),
            per_device_train_batch_size=per_rank // accumulation,
            gradient_accumulation_steps=accumulation,
            balancer="bilb",
            max_steps=14,
            logging_steps=1,
            save_strategy="no",
            accelerator_config={"dispatch_batches": dispatch},
            **optimizer_settings(torch.float64),
        )
        stream = Stream(build_data(36, dtype=torch.float64, missing=0.2), shuffled=True)
        model = build_model(torch.float64, dropout=0.2)
        trainer = BilevelMTLTrainer(model=model, args=args, train_dataset=stream, callbacks=[SaveAt(7, 9)])
        trainer.train(resume_from_checkpoint=None if start is None else str(folder / f"checkpoint-{start}"))
        runs.append({"parameters": whole_parameters(model), "logs": logged(trainer)})
    files = sorted(path.name for path in Path(folder, "checkpoint-7").glob("data_position_*"))
    return {"runs": runs, "files": files, "rank": rank()}


def empty_stream() -> dict[str, Any]:
    args = arguments(max_steps=2, balancer="ls")
    trainer = BilevelMTLTrainer(
        model=build_model(torch.float64), args=args, train_dataset=Stream(build_data(4)), eval_dataset=None
    )
    trainer.train_dataset.data = []
    try:
        trainer.train()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def stream_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for kind, loadings in CASES.items():
        for loading in loadings:
            for size in sizes(loading):
                found[f"streams/{kind}/{loading}/{size}"] = partial(evaluated, kind, size, loading)
    for dispatch in (True, False):
        for accumulation in (1, 2) if dispatch else (1,):
            found[f"stream_resumed/{dispatch}/{accumulation}"] = partial(resumed, dispatch, accumulation)
    found["stream_empty"] = empty_stream
    return found

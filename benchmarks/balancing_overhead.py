"""What balancing adds to a training step: `BilevelMTLTrainer` with `ls` and `bilb` against the plain `Trainer`.

    python benchmarks/balancing_overhead.py [--output benchmarks/results] [--quick]

The plain Trainer trains the same model on the vectorised sum of the same K losses. Runs alternate (plain, ls, bilb,
plain, ls, bilb, ...), so that a machine that slows down slows all of them; what is compared are pairs of neighbours.
Times are CPU times of this process on one thread, whole steps from one `on_step_end` to the next, logging included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_bilb
from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.task_losses import masked_mse

BATCH, FEATURES = 64, 64
METHODS = ("plain", "ls", "bilb")


@dataclass(frozen=True)
class Size:
    """A model: its name, the width and depth of its trunk, and how long a run is measured."""

    name: str
    width: int
    depth: int
    steps: int
    repeats: int


SIZES = (Size("small", 192, 3, steps=40, repeats=18), Size("wide", 1024, 4, steps=10, repeats=13))
TASKS = (2, 40, 1000)


class Network(nn.Module):
    """An MLP with K regression heads as one layer; returns the losses as a vector, and their sum for `Trainer`."""

    def __init__(self, size: Size, num_tasks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [FEATURES] + [size.width] * size.depth
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(size.width, num_tasks))
        self.plain = False

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        losses, num_items = masked_mse(self.layers(features), labels)
        return {"loss": losses.sum()} if self.plain else {"losses": losses, "num_items": num_items}


class Stopwatch(TrainerCallback):
    """CPU time per step of the last run; the first steps warm caches up and do not count."""

    WARM_UP = 5

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time())

    def milliseconds(self) -> float:
        counted = self.times[self.WARM_UP :]
        return 1e3 * (counted[-1] - counted[0]) / (len(counted) - 1)


def build(method: str, size: Size, num_tasks: int, folder: str) -> Callable[[], float]:
    """A function that trains for one block of steps and returns the milliseconds of a step."""
    steps = size.steps + Stopwatch.WARM_UP
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 20,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-4,
    }
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(steps * BATCH, FEATURES, generator=generator),
        torch.randn(steps * BATCH, num_tasks, generator=generator),
    )
    watch, model = Stopwatch(), Network(size, num_tasks)
    # One slice of a tensor per batch: the work of a collator is none of the Trainer's.
    common: dict[str, Any] = {"model": model, "train_dataset": data, "data_collator": collate, "callbacks": [watch]}
    if method == "plain":
        model.plain = True
        trainer = Trainer(args=TrainingArguments(**settings), **common)
    else:
        names = [f"task_{k}" for k in range(num_tasks)]
        args = BilevelMTLTrainingArguments(**settings, balancer=method, task_names=names)
        trainer = BilevelMTLTrainer(args=args, **common)
    for callback in (transformers.PrinterCallback, transformers.trainer_callback.ProgressCallback):
        trainer.remove_callback(callback)

    def block() -> float:
        trainer.train()
        return watch.milliseconds()

    return block


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"features": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}


@dataclass(frozen=True)
class Result:
    """Milliseconds of CPU time a step: medians over the pairs, and what the fastest blocks say."""

    size: str
    num_tasks: int
    method: str
    plain_ms: float
    step_ms: float
    added_ms: float
    fastest_plain_ms: float
    fastest_added_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int


def measure(size: Size, num_tasks: int, folder: str) -> list[Result]:
    """Alternate the methods and compare each block with the mean of the plain blocks before and after it."""
    blocks = {method: build(method, size, num_tasks, folder) for method in METHODS}
    for block in blocks.values():
        block()
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(size.repeats):
        for method, block in blocks.items():
            times[method].append(block())
    times["plain"].append(blocks["plain"]())
    around = [(a + b) / 2 for a, b in itertools.pairwise(times["plain"])]
    results = []
    for method in METHODS[1:]:
        ratios = sorted(ours / plain for ours, plain in zip(times[method], around, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        added = statistics.median(ours - plain for ours, plain in zip(times[method], around, strict=True))
        fastest = min(times["plain"])
        results.append(
            Result(
                size=size.name,
                num_tasks=num_tasks,
                method=method,
                plain_ms=statistics.median(around),
                step_ms=statistics.median(times[method]),
                added_ms=added,
                fastest_plain_ms=fastest,
                fastest_added_ms=min(times[method]) - fastest,
                ratio=statistics.median(ratios),
                ratio_low=low,
                ratio_high=high,
                pairs=len(ratios),
            )
        )
    return results


HEADER = (
    "| model | K | balancer | plain Trainer (ms) | added (ms) | ratio | middle half of the ratios "
    "| fastest plain block (ms) | fastest block's added (ms) |"
)


def as_markdown(results: list[Result]) -> str:
    lines = [HEADER, "|---" * 9 + "|"]
    lines += [
        f"| {r.size} | {r.num_tasks} | {r.method} | {r.plain_ms:.2f} | {r.added_ms:+.2f} | {r.ratio:.2f} "
        f"| {r.ratio_low:.2f} - {r.ratio_high:.2f} | {r.fastest_plain_ms:.2f} | {r.fastest_added_ms:+.2f} |"
        for r in results
    ]
    return "\n".join(lines)


def notes() -> str:
    processor = platform.processor() or platform.machine()
    return (
        f"CPU time on one thread ({processor}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"hf_bilb {hf_bilb.__version__}); batch {BATCH}; AdamW, clipping, a log every 20 steps. Plain: the same model "
        "on the vectorised sum of the same losses. Medians over interleaved pairs; differences below the spread of the "
        "ratios mean nothing, and where other processes share the cores, the fastest blocks are the better guide. One "
        "process: no communication. On an accelerator the added operations are launched beside the model's; their "
        "number, not their size, is what counts there."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="folder for balancing_overhead.json and .md")
    parser.add_argument("--sizes", nargs="+", choices=[s.name for s in SIZES], default=[s.name for s in SIZES])
    parser.add_argument("--tasks", nargs="+", type=int, default=list(TASKS), metavar="K")
    parser.add_argument("--quick", action="store_true", help="a fifth of the repeats: to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results: list[Result] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for size in (size for size in SIZES if size.name in arguments.sizes):
            chosen = Size(**{**asdict(size), "repeats": max(2, size.repeats // 5)}) if arguments.quick else size
            for num_tasks in arguments.tasks:
                results += measure(chosen, num_tasks, folder)
                for result in results[-2:]:
                    print(as_markdown([result]).split("\n")[-1], flush=True)
    table = as_markdown(results)
    print(f"\n{table}\n\n{notes()}\n{time.perf_counter() - started:.0f} s")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        content = {"notes": notes(), "results": [asdict(result) for result in results]}
        (arguments.output / "balancing_overhead.json").write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        )
        text = f"# What balancing adds to a step\n\n{table}\n\n{notes()}\n"
        (arguments.output / "balancing_overhead.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

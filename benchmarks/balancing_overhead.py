"""What balancing adds to a training step: `BilevelMTLTrainer` with `ls` and `bilb` against the plain `Trainer`.

    python benchmarks/balancing_overhead.py [--output benchmarks/results] [--quick]

The plain Trainer trains the same model on the vectorised sum of the same K losses. Runs alternate (plain, ls, bilb,
plain, ls, bilb, ...), so that a machine that slows down slows all of them; what is compared are pairs of neighbours.
Times are CPU times of this process on one thread, whole steps from one `on_step_end` to the next, logging included.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from alternating import Block, Network, alternate, random_rows, training_block
from output import write_results
from torch import Tensor

import hf_bilb

BATCH = 64
WARM_UP = 5  # the first steps of a block warm caches up and do not count
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


def build(method: str, size: Size, num_tasks: int, folder: str) -> Block:
    """A block of the method, `plain` for the plain Trainer on the sum of the losses."""
    rows = (size.steps + WARM_UP) * BATCH
    return training_block(
        Network(size.width, size.depth, num_tasks, plain=method == "plain"),
        torch.utils.data.TensorDataset(*random_rows(rows, num_tasks)),
        collate,
        folder=folder,
        batch_size=BATCH,
        steps=size.steps,
        warm_up=WARM_UP,
        balancer=None if method == "plain" else method,
        num_tasks=num_tasks,
    )


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
    pairs, plain = alternate(blocks, METHODS, size.repeats)
    results = []
    for method, pair in pairs.items():
        ratio, low, high = pair.ratio()
        results.append(
            Result(
                size=size.name,
                num_tasks=num_tasks,
                method=method,
                plain_ms=statistics.median(pair.base),
                step_ms=statistics.median(pair.own),
                added_ms=pair.added,
                fastest_plain_ms=min(plain),
                fastest_added_ms=min(pair.own) - min(plain),
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                pairs=len(pair.own),
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
    content = {"notes": notes(), "results": [asdict(result) for result in results]}
    page = f"# What balancing adds to a step\n\n{table}\n\n{notes()}\n"
    write_results(arguments.output, "balancing_overhead", page, content)


if __name__ == "__main__":
    main()

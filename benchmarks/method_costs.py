"""What a training step costs under each registered method, against `ls`, in one run through `BilevelMTLTrainer`.

    python benchmarks/method_costs.py [--output benchmarks/results] [--quick]

Every method, with the options that change its cost. Blocks alternate with blocks of `ls` (ls, si, ls, uw, ls, ...), and
each is compared with its two neighbours; CPU time of this process on one thread, whole steps, logging included. Beside
the times the passes of the model are counted, forward (with and without gradients) and backward; taken as 1 and 2 units
they predict a ratio. On the large model the passes dominate, the small one shows what a method adds around them.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
import yaml
from alternating import Block, Network, Pairs, alternate, random_rows, training_block
from output import write_results
from torch import Tensor, nn
from torch.utils.data import Dataset

import hf_bilb
from hf_bilb import list_balancers
from hf_bilb.balancers import get_balancer_spec
from hf_bilb.balancers.registry import Cost

TASKS = (3, 11, 40)
BASE = "ls"

#: Options that change a method's cost, by how they are called: the `when` of its registered `costs`, or the options as
#: in a recipe. A method without an entry is measured with its defaults.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bilb": {
        "lower_level: single_loop": {},
        "lower_level: {inner_steps: N, ...}": {"lower_level": {"inner_steps": 1, "inner_learning_rate": 1e-3}},
    },
    "dwa": {"window: epoch": {"window": "epoch"}, "window: 25": {}},
    "famo": {
        "reevaluate: same_batch": {"reevaluate": "same_batch"},
        "reevaluate: next_batch": {"reevaluate": "next_batch"},
    },
    "go4align": {"num_groups: 1": {}, "num_groups: 3": {"num_groups": 3}},
    "marigold": {
        "mode: commit": {"mode": "commit"},
        "mode: lagged": {"mode": "lagged"},
        "mode: exact": {"mode": "exact"},
        "mode: exact, estimator: two_point": {"mode": "exact", "estimator": "two_point"},
    },
    "stch": {"warmup_epochs: null": {}, "warmup_epochs: 4": {"warmup_epochs": 4}},
}


@dataclass(frozen=True)
class Size:
    """A model, its batch, and how long it is measured."""

    name: str
    width: int
    depth: int
    batch: int
    steps: int
    warm_up: int
    repeats: int


LARGE = Size("large", 512, 4, batch=512, steps=6, warm_up=2, repeats=11)
SMALL = Size("small", 192, 3, batch=64, steps=30, warm_up=5, repeats=7)


class WholeBatches(Dataset):
    """Rows that are taken a batch at a time, with one copy: loading is no part of what is compared."""

    def __init__(self, rows: int, num_tasks: int) -> None:
        self.features, self.labels = random_rows(rows, num_tasks)

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        return [{"features": self.features[indices], "labels": self.labels[indices]}]


def only(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    (batch,) = batches
    return batch


class PassCounter:
    """Counts the passes through a module, forward and backward, however often a step makes them."""

    def __init__(self, module: nn.Module) -> None:
        self.forwards = self.backwards = 0
        module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.forwards += 1
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += 1


@dataclass(frozen=True)
class Variant:
    """A method with options, and how these are called."""

    method: str
    when: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.method} ({self.when})" if self.when else self.method

    @property
    def cost(self) -> Cost | None:
        """The registered cost with these options, None where there is none."""
        costs = get_balancer_spec(self.method).costs
        same = [cost for cost in costs if cost.when == self.when]
        fitting = same or [c for c in costs if yaml.safe_load(f"{{{c.when}}}").items() <= self.options.items()]
        return max(fitting, key=lambda cost: len(cost.when), default=None)


def variants() -> list[Variant]:
    """Every registered method, in the variants above; `ls` first."""
    names = [BASE, *(name for name in list_balancers() if name != BASE)]
    return [Variant(name, when, options) for name in names for when, options in VARIANTS.get(name, {"": {}}).items()]


def build(variant: Variant, size: Size, num_tasks: int, data: Dataset, folder: str) -> tuple[Block, PassCounter]:
    model = Network(size.width, size.depth, num_tasks)
    block = training_block(
        model,
        data,
        only,
        folder=folder,
        batch_size=size.batch,
        steps=size.steps,
        warm_up=size.warm_up,
        balancer={"name": variant.method, **variant.options},
        num_tasks=num_tasks,
    )
    return block, PassCounter(model.layers)


@dataclass(frozen=True)
class Result:
    """A method's step on one model with K tasks, against `ls` (milliseconds of CPU time, medians over the pairs).

    `forwards` and `backwards` are counted passes a step, `predicted` the ratio if these were all (1 and 2 units);
    `registered` is the method's own `costs`, `differs` whether these are other numbers (formulas are not evaluated).
    """

    method: str
    when: str
    registered: str
    differs: bool
    size: str
    num_tasks: int
    forwards: float
    backwards: float
    predicted: float
    base_ms: float
    added_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int


def measure(size: Size, num_tasks: int, folder: str) -> list[Result]:
    """All methods with K tasks; the first block of each, in which passes are counted, is not timed."""
    steps = size.steps + size.warm_up
    data, blocks, passes = WholeBatches(steps * size.batch, num_tasks), {}, {}
    everyone = variants()
    for variant in everyone:
        block, counter = build(variant, size, num_tasks, data, folder)
        block()
        blocks[str(variant)], passes[str(variant)] = block, (counter.forwards / steps, counter.backwards / steps)
    order = [name for variant in everyone[1:] for name in (BASE, str(variant))]
    pairs, _ = alternate(blocks, order, size.repeats)
    return [result(one, size, num_tasks, passes[str(one)], pairs[str(one)]) for one in everyone[1:]]


def result(variant: Variant, size: Size, num_tasks: int, passes: tuple[float, float], pairs: Pairs) -> Result:
    forwards, backwards = passes
    cost = variant.cost
    numbers = [] if cost is None else [cost.forwards, cost.backwards]
    ratio, low, high = pairs.ratio()
    return Result(
        method=variant.method,
        when=variant.when,
        registered="none" if cost is None else str(cost),
        differs=any(isinstance(said, int) and said != counted for said, counted in zip(numbers, passes, strict=False)),
        size=size.name,
        num_tasks=num_tasks,
        forwards=forwards,
        backwards=backwards,
        predicted=(forwards + 2 * backwards) / 3,
        base_ms=statistics.median(pairs.base),
        added_ms=pairs.added,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        pairs=len(pairs.own),
    )


def by_method(results: Sequence[Result], size: Size) -> dict[str, dict[int, Result]]:
    """Title of a method -> K -> its result on the model."""
    found: dict[str, dict[int, Result]] = {}
    for one in results:
        if one.size == size.name:
            found.setdefault(str(Variant(one.method, one.when, {})), {})[one.num_tasks] = one
    return found


def passes_table(results: Sequence[Result], tasks: Sequence[int]) -> str:
    """The ratios on the large model."""
    head = "".join(f" K = {num_tasks} |" for num_tasks in tasks)
    lines = [f"| method | registered | counted | predicted |{head}", "|---" * (4 + len(tasks)) + "|"]
    for title, of in by_method(results, LARGE).items():
        first = of[tasks[0]]
        ratios = "".join(f" {of[k].ratio:.2f} ({of[k].ratio_low:.2f} - {of[k].ratio_high:.2f}) |" for k in tasks)
        counted = f"{first.forwards:g}F + {first.backwards:g}B{' (differs)' if first.differs else ''}"
        lines.append(f"| {title} | {first.registered} | {counted} | {first.predicted:.2f} |{ratios}")
    return "\n".join(lines)


def overhead_table(results: Sequence[Result], tasks: Sequence[int]) -> str:
    """What is added on the small model, in milliseconds."""
    head = "".join(f" K = {num_tasks} |" for num_tasks in tasks)
    lines = [f"| method |{head}", "|---" * (1 + len(tasks)) + "|"]
    for title, of in by_method(results, SMALL).items():
        lines.append(f"| {title} |" + "".join(f" {of[k].added_ms:+.2f} |" for k in tasks))
    return "\n".join(lines)


def base_times(results: Sequence[Result], size: Size) -> str:
    times: dict[int, float] = {one.num_tasks: one.base_ms for one in results if one.size == size.name}
    return ", ".join(f"{milliseconds:.1f} ms for K = {k}" for k, milliseconds in times.items())


def page(results: Sequence[Result], tasks: Sequence[int], seconds: float) -> str:
    processor = platform.processor() or platform.machine()
    return f"""# What a step costs under each method

CPU time on one thread ({processor}, torch {torch.__version__}, transformers {transformers.__version__}, hf_bilb
{hf_bilb.__version__}), in one run of {seconds:.0f} s; AdamW, clipping; the middle half of the ratios in brackets, over
{min(one.pairs for one in results)} to {max(one.pairs for one in results)} pairs.

## Against ls, where the passes of the model dominate

An MLP of {LARGE.depth} layers x {LARGE.width}, batch {LARGE.batch}; a step of ls: {base_times(results, LARGE)}.
Passes of the model in a step: as registered, and as counted here (N = 1). Predicted: (F + 2 B) / 3, if a backward pass
cost two forward passes and nothing else cost anything; a forward pass without gradients costs less than one with them,
and the optimizer's step, clipping and loading are in every method's time once.

{passes_table(results, tasks)}

## What is added around them

An MLP of {SMALL.depth} layers x {SMALL.width}, batch {SMALL.batch}; a step of ls: {base_times(results, SMALL)}.
Added, in ms (of which the passes beyond 1F + 1B are a part):

{overhead_table(results, tasks)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="folder for method_costs.json and .md")
    parser.add_argument("--tasks", nargs="+", type=int, default=list(TASKS), metavar="K")
    parser.add_argument("--quick", action="store_true", help="one short pair of each: to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # Every `Trainer.train()` collects garbage, a quarter of a second over the imported libraries' objects.
    gc.collect()
    gc.freeze()
    results: list[Result] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for size in (LARGE, SMALL):
            chosen = replace(size, steps=3, repeats=1) if arguments.quick else size
            for num_tasks in arguments.tasks:
                results += measure(chosen, num_tasks, folder)
                print(f"{size.name}, K = {num_tasks}: {time.perf_counter() - started:.0f} s", flush=True)
    text = page(results, arguments.tasks, time.perf_counter() - started)
    print(f"\n{text}")
    write_results(arguments.output, "method_costs", text, [asdict(one) for one in results])


if __name__ == "__main__":
    main()

"""What one matrix product for the heads of all tasks saves against a loop over heads, and one loss per type likewise.

    python benchmarks/task_heads.py [--output benchmarks/results] [--quick]

Forward and backward, each in turns with the loop in the same run:

* heads: `hf_bilb.models.heads.joined_outputs` against `torch.cat([head(features) for head in heads])`, of tasks of rows
  and of tasks of tokens;
* heads and losses of a mixture (a quarter regression, a half classification with 2 to 5 classes, a quarter multi-label
  with 4 labels): `MixedLosses` after one product, against torch's own loss of each task after its own head.

Times are CPU times of this process on one thread; on a GPU wall clock times after a synchronisation.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from output import write_results
from torch import Tensor, nn
from torch.nn import functional

import hf_bilb
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import TaskType, label_slices
from hf_bilb.models.heads import joined_outputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEATURES = 384
TASKS = (3, 10, 40)
ROWS, TOKENS = 32, 64
_CALLS = 20  # in one measurement


@dataclass(frozen=True)
class Result:
    """One row: milliseconds of a forward and a backward pass, and the median ratio of the loop to the product."""

    what: str
    num_tasks: int
    together_ms: float
    loop_ms: float
    ratio: float


def seconds(run: Callable[[], object]) -> float:
    """CPU time of some calls, or on a GPU the time until they are done."""
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(_CALLS):
        run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / _CALLS


def compare(
    what: str, num_tasks: int, together: Callable[[], Tensor], loop: Callable[[], Tensor], turns: int
) -> Result:
    """In turns, after one of each that also sees that they agree."""
    torch.testing.assert_close(together(), loop(), rtol=1e-4, atol=1e-4)
    runs = [lambda of=of: of().backward() for of in (together, loop)]
    times = [[seconds(run) for run in runs] for _ in range(turns + 1)][1:]
    milliseconds = [1e3 * statistics.median(time) for time in zip(*times, strict=True)]
    return Result(what, num_tasks, *milliseconds, statistics.median(loop / one for one, loop in times))


def measure_heads(num_tasks: int, of_tokens: bool, turns: int) -> Result:
    """Heads of three outputs each."""
    heads = [nn.Linear(FEATURES, 3).to(DEVICE) for _ in range(num_tasks)]
    shape = (ROWS, TOKENS, FEATURES) if of_tokens else (ROWS, FEATURES)
    features = torch.randn(shape, device=DEVICE, requires_grad=True)
    return compare(
        f"heads of {'tokens' if of_tokens else 'rows'}",
        num_tasks,
        lambda: joined_outputs(heads, features).square().mean(),
        lambda: torch.cat([head(features) for head in heads], dim=-1).square().mean(),
        turns,
    )


def mixture(num_tasks: int) -> dict[str, TaskType]:
    """Task -> type, in turns."""
    kinds = [
        lambda k: TaskType("regression"),
        lambda k: TaskType("classification", 2 + k % 4),
        lambda k: TaskType("multi_label", 4),
        lambda k: TaskType("classification", 2 + k % 4),
    ]
    return {f"task_{k}": kinds[k % 4](k) for k in range(num_tasks)}


def labels_of(tasks: dict[str, TaskType]) -> Tensor:
    """`[B, W]`, a tenth missing."""
    columns = []
    for task in tasks.values():
        shape = (ROWS, task.label_width)
        most = {"regression": 1, "multi_label": 2, "classification": task.size}[task.type]
        columns.append(torch.randn(shape) if task.type == "regression" else torch.randint(most, shape).float())
    labels = torch.cat(columns, dim=1)
    return labels.masked_fill(torch.rand(labels.shape) < 0.1, torch.nan).to(DEVICE)


def plain_loss(task: TaskType, outputs: Tensor, labels: Tensor) -> Tensor:
    """One task's loss as one would write it, without waiting for the device."""
    there = ~labels.isnan()
    filled = torch.where(there, labels, 0)
    if task.type == "classification":
        classes = torch.where(there, labels, -100).long()[:, 0]
        values, there = functional.cross_entropy(outputs, classes, reduction="none"), there[:, 0]
    elif task.type == "regression":
        values = (outputs - filled).square()
    else:
        values = functional.binary_cross_entropy_with_logits(outputs, filled, reduction="none")
    return torch.where(there, values, 0).sum() / there.sum().clamp(min=1)


def measure_losses(num_tasks: int, turns: int) -> Result:
    """Heads and losses of a mixture."""
    tasks = mixture(num_tasks)
    heads = [nn.Linear(FEATURES, task.size).to(DEVICE) for task in tasks.values()]
    features = torch.randn(ROWS, FEATURES, device=DEVICE, requires_grad=True)
    labels, losses, slices = labels_of(tasks), MixedLosses(tasks), label_slices(tasks)

    def loop() -> Tensor:
        parts = zip(tasks.items(), heads, strict=True)
        each = [plain_loss(task, head(features), labels[:, slices[name]]) for (name, task), head in parts]
        return torch.stack(each).sum()

    def together() -> Tensor:
        return losses.of_joined(joined_outputs(heads, features), None, labels, None)[0].sum()

    return compare("heads and losses of a mixture", num_tasks, together, loop, turns)


def as_markdown(results: list[Result]) -> str:
    lines = ["| what | K | together (ms) | loop (ms) | loop / together |", "|---" * 5 + "|"]
    lines += [f"| {r.what} | {r.num_tasks} | {r.together_ms:.3f} | {r.loop_ms:.3f} | {r.ratio:.2f} |" for r in results]
    return "\n".join(lines)


def notes() -> str:
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    return (
        f"Forward and backward, {ROWS} rows (of {TOKENS} tokens), {FEATURES} features, heads of 3 outputs; {where}, "
        f"torch {torch.__version__}, hf_bilb {hf_bilb.__version__}. Medians over turns, on cores that other processes "
        "may share: differences of a few percent mean nothing."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for task_heads.json and task_heads.md")
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    turns = 3 if options.quick else 15
    results = [measure_heads(num_tasks, False, turns) for num_tasks in TASKS]
    results += [measure_heads(num_tasks, True, max(3, turns // 5)) for num_tasks in TASKS]
    results += [measure_losses(num_tasks, turns) for num_tasks in TASKS]
    print(f"{as_markdown(results)}\n\n{notes()}")
    content = {"notes": notes(), "results": [asdict(result) for result in results]}
    page = f"# Heads of K tasks in one matrix product\n\n{as_markdown(results)}\n\n{notes()}\n"
    write_results(options.output, "task_heads", page, content)


if __name__ == "__main__":
    main()

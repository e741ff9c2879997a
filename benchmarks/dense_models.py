"""MTAN and SegNet with the tasks in grouped convolutions against a loop over the tasks: equal numbers, and their cost.

    python benchmarks/dense_models.py [--output benchmarks/results] [--quick]

The loop is that of the tests (`tests/models/looped_dense.py`): modules of every task's own, one after the other, as the
papers' code has it. Both have the same weights. A step is forward, losses and backward, in training mode, float32,
batch of 2. Steps alternate (ours, loop, ours, loop, ...); what is compared are the two of a pair. CPU: one thread, CPU
time. On a GPU: wall time between synchronisations, and the largest memory of a step. `operations` of a step are those
that compute something (no views), about the kernels that a GPU is sent.

On a CPU the arithmetic is the same and so is the time, where memory is kept: glibc gives maps of some megabytes back to
the system and pays for them again at every use, which the larger maps of all tasks together feel more. With
MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 it keeps them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the loop over tasks is that of the tests

import torch
from output import write_results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bilb.losses.dense import DENSE_TASKS, dense_task_losses
from hf_bilb.models import MtanConfig, MtanModel, SegNetConfig, SegNetModel
from hf_bilb.models.dense.layers import finished
from tests.models.looped_dense import LoopedSegNet, with_weights_of

BATCH = 2
#: name -> model, config, tasks, classes, width, height and width of the frame
CPU_CASES = {
    "mtan, nyuv2's tasks, W = 16, 96 x 128": (MtanModel, MtanConfig, DENSE_TASKS, 13, 16, (96, 128)),
    "mtan, cityscapes' tasks, W = 16, 96 x 128": (MtanModel, MtanConfig, DENSE_TASKS[:2], 7, 16, (96, 128)),
    "segnet, nyuv2's tasks, W = 16, 96 x 128": (SegNetModel, SegNetConfig, DENSE_TASKS, 13, 16, (96, 128)),
}
GPU_CASES = {
    "mtan, nyuv2, W = 64, 288 x 384": (MtanModel, MtanConfig, DENSE_TASKS, 13, 64, (288, 384)),
    "mtan, cityscapes, W = 64, 128 x 256": (MtanModel, MtanConfig, DENSE_TASKS[:2], 7, 64, (128, 256)),
    "mtan, nyuv2's tasks, W = 16, 96 x 128": (MtanModel, MtanConfig, DENSE_TASKS, 13, 16, (96, 128)),
    "segnet, nyuv2, W = 64, 288 x 384": (SegNetModel, SegNetConfig, DENSE_TASKS, 13, 64, (288, 384)),
}


@dataclass(frozen=True)
class Result:
    """Seconds of a step, medians over the pairs; the ratio loop / ours with its middle half; how far the losses of the
    first step are apart (relative); operations of a step; on a GPU the largest memory of a step, MiB."""

    what: str
    ours: float
    loop: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    deviation: float
    our_operations: int
    loop_operations: int
    our_memory: float | None
    loop_memory: float | None


def batch(height: int, width: int, classes: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of made-up frames with labels of all tasks."""
    frame = (BATCH, height, width)
    columns = {
        "pixel_values": torch.rand(BATCH, 3, height, width),
        "segmentation": torch.randint(-1, classes, frame),
        "depth": torch.rand(frame) + 0.5,
        "normals": torch.nn.functional.normalize(torch.randn(BATCH, 3, height, width), dim=1),
    }
    return {name: column.to(device) for name, column in columns.items()}


def our_losses(model: MtanModel | SegNetModel, inputs: dict[str, Tensor]) -> Tensor:
    losses: Tensor = model(**inputs).losses
    return losses


def loop_losses(looped: LoopedSegNet, inputs: dict[str, Tensor], tasks: list[str]) -> Tensor:
    outputs, _ = looped(inputs["pixel_values"])
    predictions = {name: finished(name, out) for name, out in zip(tasks, outputs, strict=True)}
    return dense_task_losses(predictions, inputs, tasks)[0]


def timed(losses: Callable[[], Tensor], parameters: list[Tensor], device: torch.device) -> tuple[float, float | None]:
    """Seconds (and MiB on a GPU) of forward, losses and backward."""
    for parameter in parameters:
        parameter.grad = None
    if device.type == "cpu":
        started = time.process_time()
        losses().sum().backward()
        return time.process_time() - started, None
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    losses().sum().backward()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) / 2**20


class Operations(TorchDispatchMode):
    """Counts what is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(losses: Callable[[], Tensor]) -> int:
    """Of forward, losses and backward."""
    with Operations() as counted:
        losses().sum().backward()
    return counted.count


def measure(what: str, case: tuple, pairs: int, device: torch.device) -> Result:
    """Alternate both; the first pair warms up and does not count."""
    model_class, config_class, tasks, classes, width, frame = case
    torch.manual_seed(0)
    model = model_class(config_class(task_names=tasks, num_classes=classes, width=width)).to(device)
    looped = with_weights_of(model).to(device)
    columns = batch(*frame, classes, device)
    inputs = {name: columns[name] for name in ("pixel_values", *tasks)}
    own, other = our_losses(model, inputs), loop_losses(looped, inputs, list(tasks))
    deviation = ((own - other).abs() / other).max().item()
    del own, other
    counts = [
        operations(lambda: our_losses(model, inputs)),
        operations(lambda: loop_losses(looped, inputs, list(tasks))),
    ]
    found = []
    for _ in range(pairs + 1):
        ours = timed(lambda: our_losses(model, inputs), list(model.parameters()), device)
        loop = timed(lambda: loop_losses(looped, inputs, list(tasks)), list(looped.parameters()), device)
        found.append((ours, loop))
    found = found[1:]
    ratios = sorted(loop[0] / ours[0] for ours, loop in found)
    memories = [max(pair[i][1] for pair in found) if device.type != "cpu" else None for i in (0, 1)]
    return Result(
        what=what,
        ours=statistics.median(pair[0][0] for pair in found),
        loop=statistics.median(pair[1][0] for pair in found),
        ratio=statistics.median(ratios),
        ratio_low=ratios[len(ratios) // 4],
        ratio_high=ratios[-1 - len(ratios) // 4],
        pairs=len(found),
        deviation=deviation,
        our_operations=counts[0],
        loop_operations=counts[1],
        our_memory=memories[0],
        loop_memory=memories[1],
    )


def as_markdown(results: list[Result]) -> str:
    heading = "| a step | ours (s) | loop (s) | ratio | middle half of the ratios | pairs | operations, ours / loop"
    lines = [f"{heading} | losses apart |", "|---" * 8 + "|"]
    for r in results:
        lines.append(
            f"| {r.what} | {r.ours:.4f} | {r.loop:.4f} | {r.ratio:.2f} | {r.ratio_low:.2f} - {r.ratio_high:.2f} "
            f"| {r.pairs} | {r.our_operations} / {r.loop_operations} | {r.deviation:.0e} |"
        )
    lines += [f"\n{r.what}: {r.our_memory:.0f} MiB, the loop {r.loop_memory:.0f} MiB." for r in results if r.our_memory]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="folder for dense_models.json and .md")
    parser.add_argument("--quick", action="store_true", help="three pairs: to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = CPU_CASES if device.type == "cpu" else GPU_CASES
    pairs = 3 if arguments.quick else 15
    results = [measure(what, case, pairs, device) for what, case in cases.items()]
    where = (
        f"CPU time on one thread ({platform.processor() or platform.machine()})"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device)
    )
    notes = (
        f"{where}, torch {torch.__version__}, batches of {BATCH}, float32, training mode; forward, losses, backward."
    )
    table = as_markdown(results)
    print(f"{table}\n\n{notes}")
    content = {"notes": notes, "results": [asdict(result) for result in results]}
    page = f"# Dense models: grouped convolutions against a loop over the tasks\n\n{table}\n\n{notes}\n"
    write_results(arguments.output, "dense_models", page, content)


if __name__ == "__main__":
    main()

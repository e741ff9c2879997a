"""What the losses of K tasks over tokens cost beside the one loss of transformers: peak memory and time.

    python benchmarks/token_losses.py [--output benchmarks/results] [--quick]

Two measurements, each in turns with the plain one in the same run:

* the loss alone, forward and backward, on given logits: `ForCausalLMLoss` of transformers, `token_task_losses`, and
  what one would write first, that loss once for each task, with the other tasks' labels masked;
* whole training steps of a small Llama: `Trainer` with labels, and `BilevelMTLTrainer` with `TokenLosses`.

Peak memory is that of all tensors alive at once: on a CPU summed from the allocator's own events (exact, whatever else
runs), on a GPU `max_memory_allocated`. Times are CPU times of this process on one thread; on a GPU wall clock times
after a synchronisation.
"""

from __future__ import annotations

import argparse
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
from output import write_results
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

import hf_bilb
from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.losses.tokens import TokenLosses, token_task_losses

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARIES = (32_000, 50_257)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TASKS = (8, 64)
MOST_COPIES = 8  # of the logits, in what is compared with
ROWS, LENGTH = 4, 256


@dataclass(frozen=True)
class Result:
    """One row: peak memory in MiB and milliseconds, and both as ratios to the plain loss or Trainer."""

    what: str
    vocabulary: int
    dtype: str
    num_tasks: int
    peak_mib: float
    peak_ratio: float
    milliseconds: float
    time_ratio: float


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at once in `run`, beside those that were before."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def seconds(run: Callable[[], object]) -> float:
    """CPU time, or on a GPU the time until it is done."""
    if DEVICE.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(kinds: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Milliseconds, and the median ratio to the first kind in the same turn."""
    for run in kinds.values():
        run()
    turns = [{name: seconds(run) for name, run in kinds.items()} for _ in range(repeats)]
    first = next(iter(kinds))
    return {
        name: (
            1e3 * statistics.median(turn[name] for turn in turns),
            statistics.median(turn[name] / turn[first] for turn in turns),
        )
        for name in kinds
    }


# --- the loss alone -----------------------------------------------------------------------------------------------


def one_by_one(logits: Tensor, labels: Tensor, task_ids: Tensor, num_tasks: int) -> Tensor:
    """The loss of transformers for each task, the other tasks' labels masked."""
    own = (labels.where(task_ids[:, None] == task, -100) for task in range(num_tasks))
    return torch.stack([ForCausalLMLoss(logits, masked, logits.shape[-1]) for masked in own])


def measure_losses(vocabulary: int, dtype: str, num_tasks: int, repeats: int) -> list[Result]:
    """Forward and backward of the loss, on logits that are there."""
    generator = torch.Generator().manual_seed(0)
    rows = max(ROWS, num_tasks)
    shape = (rows, ROWS * LENGTH // rows)
    logits = torch.randn(*shape, vocabulary, generator=generator).to(DEVICE, DTYPES[dtype]).requires_grad_()
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    labels[:, : shape[1] // 3] = -100
    labels, task_ids = labels.to(DEVICE), torch.arange(rows, device=DEVICE) % num_tasks
    kinds = {
        "loss of transformers": lambda: ForCausalLMLoss(logits, labels, vocabulary),
        "token_task_losses": lambda: token_task_losses(logits, labels, task_ids, num_tasks)[0].sum(),
    }
    if num_tasks <= MOST_COPIES:
        kinds["loss of transformers, once a task"] = lambda: one_by_one(logits, labels, task_ids, num_tasks).sum()
    runs = {name: lambda loss=loss: torch.autograd.grad(loss(), logits) for name, loss in kinds.items()}
    times = in_turns(runs, repeats)
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    return as_results(peaks, times, vocabulary, dtype, num_tasks)


# --- training steps -----------------------------------------------------------------------------------------------


class StepTimes(TrainerCallback):
    """When each step of a training ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.process_time() if DEVICE.type == "cpu" else time.perf_counter())


def trainer_of(kind: str, vocabulary: int, num_tasks: int, folder: str, watch: StepTimes) -> Trainer:
    """A Trainer for four steps of a Llama that is small but for its vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    settings: dict[str, Any] = {
        "output_dir": folder, "use_cpu": DEVICE.type == "cpu", "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "no", "max_steps": 4, "per_device_train_batch_size": ROWS,
        "dataloader_pin_memory": False, "optim": "sgd",
    }  # fmt: skip
    labels = "labels" if kind == "Trainer" else "token_labels"
    rows = []
    for i in range(4 * ROWS):
        tokens = torch.randint(0, vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(i))
        extra = {} if kind == "Trainer" else {"task_ids": torch.tensor(i % num_tasks)}
        rows.append({"input_ids": tokens, labels: tokens, **extra})
    if kind == "Trainer":
        return Trainer(LlamaForCausalLM(config), TrainingArguments(**settings), train_dataset=rows, callbacks=[watch])
    losses = TokenLosses(num_tasks)
    args = BilevelMTLTrainingArguments(
        **settings,
        balancer=kind,
        task_names=[f"task_{k}" for k in range(num_tasks)],
        label_names=["token_labels", "task_ids"],
    )
    return BilevelMTLTrainer(
        LlamaForCausalLM(config), args, train_dataset=rows, callbacks=[watch], task_loss_func=losses,
        task_item_counts=losses.count,
    )  # fmt: skip


def measure_training(vocabulary: int, num_tasks: int, repeats: int) -> list[Result]:
    """Whole trainings of four steps: their peak, and the time of a step."""
    kinds = {"Trainer": "Trainer", "BilevelMTLTrainer, ls": "ls", "BilevelMTLTrainer, bilb": "bilb"}
    turns: list[dict[str, float]] = []
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats + 1):
            took: dict[str, float] = {}
            for name, kind in kinds.items():
                watch = StepTimes()
                trainer = trainer_of(kind, vocabulary, num_tasks, folder, watch)
                trainer.remove_callback(transformers.PrinterCallback)
                if turn == 0:
                    peaks[name] = peak_bytes(trainer.train)
                    continue
                trainer.train()
                took[name] = (watch.times[-1] - watch.times[0]) / (len(watch.times) - 1)
            turns += [took] if took else []
    times = {
        name: (
            1e3 * statistics.median(took[name] for took in turns),
            statistics.median(took[name] / took["Trainer"] for took in turns),
        )
        for name in kinds
    }
    return as_results(peaks, times, vocabulary, "float32", num_tasks)


# --- results ------------------------------------------------------------------------------------------------------


def as_results(
    peaks: dict[str, int], times: dict[str, tuple[float, float]], vocabulary: int, dtype: str, num_tasks: int
) -> list[Result]:
    first = next(iter(peaks.values()))
    return [
        Result(name, vocabulary, dtype, num_tasks, peak / 2**20, peak / first, *times[name])
        for name, peak in peaks.items()
    ]


def as_markdown(results: list[Result]) -> str:
    header = "| what | vocabulary | dtype | K | peak (MiB) | ratio | ms | ratio |"
    lines = [header, "|---" * 8 + "|"]
    lines += [
        f"| {r.what} | {r.vocabulary:,} | {r.dtype} | {r.num_tasks} | {r.peak_mib:.1f} | {r.peak_ratio:.4f} "
        f"| {r.milliseconds:.0f} | {r.time_ratio:.2f} |"
        for r in results
    ]
    return "\n".join(lines)


def notes() -> str:
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    return (
        f"{ROWS * LENGTH} tokens; {where}, torch {torch.__version__}, transformers {transformers.__version__}, hf_bilb "
        f"{hf_bilb.__version__}. Ratios are to the first row of each group. Memory is exact (tensors alive at once, "
        "beside the logits themselves for the loss, beside the model for training); times are medians over turns on "
        "cores that other processes may share: differences of a few percent mean nothing."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for token_losses.json and token_losses.md")
    parser.add_argument("--quick", action="store_true", help="one vocabulary, fewer turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    vocabularies, repeats = (VOCABULARIES[:1], 1) if options.quick else (VOCABULARIES, 3)
    results: list[Result] = []
    for vocabulary in vocabularies:
        for dtype in DTYPES:
            for num_tasks in TASKS:
                results += measure_losses(vocabulary, dtype, num_tasks, repeats)
        results += measure_training(vocabulary, 8, repeats)
    print(f"{as_markdown(results)}\n\n{notes()}")
    content = {"notes": notes(), "results": [asdict(result) for result in results]}
    page = f"# Losses of K tasks over tokens\n\n{as_markdown(results)}\n\n{notes()}\n"
    write_results(options.output, "token_losses", page, content)


if __name__ == "__main__":
    main()

"""What the exact and the optional parts of BiLB cost an update, against `balance_over: micro_batch` in the same run.

    python benchmarks/exactness_cost.py [--output benchmarks/results] [--quick]

    window        F once per update, on the losses of all micro-batches together: one more forward pass of each
    diagnostics   the lower level's gradients at every update (in use: every 100 or so), N inner steps
    gradients     norms and cosines of the K tasks' gradients at every update (in use: likewise), with `ls`
    double loop   the penalty form with N inner steps, over the window

Four micro-batches an update. Runs alternate, and each is compared with its neighbours of `micro_batch`; CPU time of
this process on one thread, whole updates.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from alternating import Stopwatch, alternate
from output import write_results
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import hf_bilb
from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.losses.masked import masked_mse

BATCH, MICRO_BATCHES, LENGTH, TASKS, INNER_STEPS = 8, 4, 64, 8, 5
DOUBLE_LOOP = {"inner_steps": INNER_STEPS, "inner_learning_rate": 1e-3}
MODES: dict[str, dict[str, Any]] = {
    "micro_batch": {},
    "window": {"balance_over": "window"},
    "diagnostics": {"diagnostics": {"every_n_steps": 1, **DOUBLE_LOOP}},
    "gradients": {"balancer": "ls", "diagnostics": {"gradients": {"every_n_steps": 1}}},
    "double_loop": {"balance_over": "window", "balancer": {"name": "bilb", "lower_level": DOUBLE_LOOP}},
}


class Encoder(nn.Module):
    """A small BERT with K regression heads as one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=1000
        )
        self.bert = BertModel(config)
        self.heads = nn.Linear(256, TASKS)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        pooled = self.bert(input_ids).last_hidden_state.mean(dim=1)
        losses, num_items = masked_mse(self.heads(pooled), labels)
        return {"losses": losses, "num_items": num_items}


def build(mode: str, steps: int, folder: str) -> Callable[[], float]:
    """A function that trains for one block of updates and returns the milliseconds of one."""
    rows = (steps + 1) * BATCH * MICRO_BATCHES
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 1000, (rows, LENGTH), generator=generator)
    labels = torch.randn(rows, TASKS, generator=generator)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 20,
        "max_steps": steps + 1,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-5,
        "task_names": [f"task_{k}" for k in range(TASKS)],
        "balancer": "bilb",
    }
    watch = Stopwatch(warm_up=0)  # from the end of the first update on
    trainer = BilevelMTLTrainer(
        model=Encoder(),
        args=BilevelMTLTrainingArguments(**{**settings, **MODES[mode]}),
        train_dataset=[{"input_ids": x, "labels": y} for x, y in zip(inputs, labels, strict=True)],
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def block() -> float:
        trainer.train()
        return watch.milliseconds()

    return block


@dataclass(frozen=True)
class Result:
    """Milliseconds of CPU time an update, and the ratio to `micro_batch` over the pairs."""

    mode: str
    update_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    passes: str


PASSES = {
    "micro_batch": "4 forward, 4 backward",
    "window": "8 forward, 4 backward",
    "diagnostics": f"4 + 8 + {INNER_STEPS} x 8 forward, 4 + {INNER_STEPS} x 4 backward",
    "gradients": f"8 forward, 4 + {TASKS} x 4 backward",
    "double_loop": f"8 + 4 + {INNER_STEPS} x 8 forward, 4 + {INNER_STEPS} x 4 backward",
}


def measure(steps: int, repeats: int, folder: str) -> list[Result]:
    blocks = {mode: build(mode, steps, folder) for mode in MODES}
    pairs, base = alternate(blocks, list(MODES), repeats)
    results = []
    for mode in MODES:
        times, ratio = (pairs[mode].own, pairs[mode].ratio()) if mode in pairs else (base, (1.0, 1.0, 1.0))
        results.append(Result(mode, statistics.median(times), *ratio, PASSES[mode]))
    return results


def as_markdown(results: list[Result]) -> str:
    lines = [
        "| mode | passes of micro-batches | update (ms) | ratio | middle half of the ratios |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.mode} | {r.passes} | {r.update_ms:.0f} | {r.ratio:.2f} | {r.ratio_low:.2f} - {r.ratio_high:.2f} |"
        for r in results
    ]
    return "\n".join(lines)


def notes() -> str:
    return (
        f"CPU time on one thread (torch {torch.__version__}, transformers {transformers.__version__}, hf_bilb "
        f"{hf_bilb.__version__}): BERT of 4 layers x 256, {MICRO_BATCHES} micro-batches of {BATCH} x {LENGTH} tokens "
        f"an update, {TASKS} tasks, bilb. Diagnostics here at EVERY update; every n updates cost the n-th part of it."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="folder for exactness_cost.json and .md")
    parser.add_argument("--quick", action="store_true", help="two short repeats: to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(*((1, 2) if arguments.quick else (3, 7)), folder)
    print(f"{as_markdown(results)}\n\n{notes()}")
    content = {"notes": notes(), "results": [asdict(result) for result in results]}
    page = f"# What exact accumulation, diagnostics and the double loop cost\n\n{as_markdown(results)}\n\n{notes()}\n"
    write_results(arguments.output, "exactness_cost", page, content)


if __name__ == "__main__":
    main()

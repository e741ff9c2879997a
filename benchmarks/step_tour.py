"""How far a training step travels through the library, and how many torch operations balancing adds to it.

    python benchmarks/step_tour.py                                                   this checkout
    python benchmarks/step_tour.py --before 09cd3ab --output benchmarks/results      two checkouts, beside each other

The way: every function of hf_bilb that a steady step enters, from `training_step` to the event `on_step_end`, seen by
`sys.setprofile`. A call is an entry into a function (a generator counts once, however often it is resumed); a change of
file is where two calls that follow each other lie in different files. Comprehensions and generator expressions count as
calls, since Python 3.11 enters them, but not as functions, since nobody reads them as such.

The operations: what a `TorchDispatchMode` sees between two events `on_step_end`, forward, backward, clipping, optimizer
and router, of a 3-layer MLP with K = 40 tasks that returns `losses` and `num_items`; plain is `transformers.Trainer` on
the sum of the same losses.

Only public names of the library are used, so that it runs on any state of it.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from checkouts import ROOT, checkout, described, run_in
from output import write_results

NUM_FEATURES, WIDTH, BATCH = 64, 64, 32
STEADY = 6  # the step that is looked at; earlier ones take references and fill caches
WINDOW = {"gradient_accumulation_steps": 2}
#: Row of the table -> (balancer, training arguments).
TOURS: dict[str, tuple[str, dict[str, Any]]] = {
    "`ls`": ("ls", {}),
    "`bilb`": ("bilb", {}),
    "`famo`": ("famo", {}),
    "`bilb`, two micro-batches, `window`": ("bilb", {**WINDOW, "balance_over": "window"}),
    "`bilb`, two micro-batches, `micro_batch`": ("bilb", {**WINDOW, "balance_over": "micro_batch"}),
}
TOUR_TASKS, COUNTED_TASKS = 3, 40
COUNTED = ("ls", "uw", "bilb", "famo")
MEASURES = ("calls", "functions", "files", "changes of file")
EXPRESSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")


# --- one checkout, in a process of its own ---------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """Of the library that this process imports: the ways of `TOURS`, and the operations of a step."""
    import hf_bilb

    library = str(Path(hf_bilb.__file__).parent) + "/"
    plain = len(operations(None))
    return {
        "tours": {row: tour(library, balancer, own) for row, (balancer, own) in TOURS.items()},
        "operations": {"plain": plain, **{name: len(operations(name)) - plain for name in COUNTED}},
    }


def tour(library: str, balancer: str, own: dict[str, Any]) -> dict[str, int]:
    """The figures of one steady step."""
    entered: list[tuple[str, str]] = []  # file and function of each call
    generators: set[FrameType] = set()  # held, so that no other frame gets the identity of one that is gone
    begun = ended = False

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal begun, ended
        if event != "call" or ended:
            return
        code = frame.f_code
        if code.co_name == "on_step_end":  # Trainer's own handler: the step is over
            ended = begun
        if ended or not code.co_filename.startswith(library):
            return
        begun = begun or code.co_name == "training_step"
        if begun and frame not in generators:
            if code.co_flags & inspect.CO_GENERATOR:
                generators.add(frame)
            entered.append((code.co_filename, getattr(code, "co_qualname", code.co_name)))

    _train(balancer, TOUR_TASKS, own, begin=lambda: sys.setprofile(note), end=lambda: sys.setprofile(None))
    files = [file for file, _ in entered]
    return {
        "calls": len(entered),
        "functions": len({call for call in entered if not call[1].endswith(EXPRESSIONS)}),
        "files": len(set(files)),
        "changes of file": sum(one != other for one, other in itertools.pairwise(files)),
    }


def operations(balancer: str | None) -> list[str]:
    """The torch operations of one steady step; without a balancer those of the plain Trainer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    counting = Counting()
    stop = partial(counting.__exit__, None, None, None)
    _train(balancer, COUNTED_TASKS, {}, begin=counting.__enter__, end=stop, says_items=True)
    return counting.seen


def _train(
    balancer: str | None,
    num_tasks: int,
    own: dict[str, Any],
    begin: Callable[[], Any],
    end: Callable[[], Any],
    says_items: bool = False,
) -> None:
    """Train for some steps; `begin` is called when step `STEADY` begins, `end` when it has ended.

    With `says_items` the model returns how many items its losses have; else the library counts labels.
    """
    import torch
    from torch import Tensor, nn
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments

    class Network(nn.Module):
        """A 3-layer MLP; its losses as a vector, or as their sum."""

        num_items: Tensor

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("num_items", torch.full((num_tasks,), float(BATCH)))
            self.layers = nn.Sequential(
                *(nn.Linear(NUM_FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()),
                nn.Linear(WIDTH, num_tasks),
            )

        def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
            losses = (self.layers(features) - labels).square().mean(0)
            if balancer is None:
                return {"loss": losses.sum()}
            return {"losses": losses, "num_items": self.num_items} if says_items else {"losses": losses}

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEADY - 1:
                begin()
            elif state.global_step == STEADY:
                end()

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"features": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}

    generator = torch.Generator().manual_seed(0)
    rows = (STEADY + 3) * 2 * BATCH
    features = torch.randn(
        rows, NUM_FEATURES, generator=generator
    ).unbind()  # rows, so that fetching one is no operation
    labels = torch.randn(rows, num_tasks, generator=generator).unbind()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 100,
            "max_steps": STEADY + 1,
            "per_device_train_batch_size": BATCH,
            "dataloader_pin_memory": False,
            **own,
        }
        common: dict[str, Any] = {
            "model": Network(),
            "train_dataset": list(zip(features, labels, strict=True)),
            "data_collator": collate,
            "callbacks": [Marks()],
        }
        if balancer is None:
            trainer = Trainer(args=TrainingArguments(**settings), **common)
        else:
            names = [f"task_{k}" for k in range(num_tasks)]
            args = BilevelMTLTrainingArguments(**settings, balancer=balancer, task_names=names)
            trainer = BilevelMTLTrainer(args=args, **common)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


# --- both ------------------------------------------------------------------------------------------------------------


def measured_in(which: str) -> dict[str, Any]:
    with checkout(which) as folder, tempfile.TemporaryDirectory() as empty:
        return json.loads(run_in(folder, [str(Path(__file__).resolve()), "--measure"], Path(empty)).splitlines()[-1])


def tables(states: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each tour and measure, a column for each state; likewise the operations."""
    names = list(states)
    ratio = len(names) == 2
    head = ["one steady step of", "", *names, *(["ratio"] if ratio else [])]
    lines = [_row(head), "|---" * len(head) + "|"]
    for row in TOURS:
        for measure in MEASURES:
            values = [states[name]["tours"][row][measure] for name in names]
            shown = [str(value) for value in values] + ([f"{values[1] / values[0]:.2f}"] if ratio else [])
            lines.append(_row([row if measure == MEASURES[0] else "", measure, *shown]))
    lines += ["", _row(["torch operations of one step, K = 40", *names]), "|---" * (1 + len(names)) + "|"]
    lines.append(_row(["plain `Trainer`", *(str(states[name]["operations"]["plain"]) for name in names)]))
    for balancer in COUNTED:
        added = [f"+{states[name]['operations'][balancer]}" for name in names]
        lines.append(_row([f"`{balancer}` adds", *added]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--before", help="folder or git revision to compare with")
    parser.add_argument("--after", default=str(ROOT), help="folder or git revision (default: this checkout)")
    parser.add_argument("--output", type=Path, help="folder for step_tour.json and .md")
    parser.add_argument("--measure", action="store_true", help="figures of the library that is imported, as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure()))
        return
    sides = {"before": arguments.before, "after": arguments.after} if arguments.before else {"now": arguments.after}
    states = {f"{name} ({described(which)})": measured_in(which) for name, which in sides.items()}
    page = f"# The way of a training step\n\n{tables(states)}\n\n{notes()}\n"
    print(page)
    write_results(arguments.output, "step_tour", page, states)


def notes() -> str:
    from importlib.metadata import version

    text = (__doc__ or "").split("\n\n")
    return "\n\n".join(
        [
            f"`python benchmarks/step_tour.py` (Python {platform.python_version()}, torch {version('torch')}, "
            f"transformers {version('transformers')}).",
            *(paragraph for paragraph in text if paragraph.startswith(("The way:", "The operations:"))),
        ]
    )


if __name__ == "__main__":
    main()

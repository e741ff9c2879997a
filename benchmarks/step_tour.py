"""How far a training step travels through the library, and how many torch operations balancing adds to it.

    python benchmarks/step_tour.py                                                   this checkout
    python benchmarks/step_tour.py --before 09cd3ab --output benchmarks/results      two checkouts, beside each other

The way: every function of hf_bilb that a steady step enters, from `training_step` to the event `on_step_end`, seen by
`sys.setprofile`. A call is an entry into a function (a generator counts once, however often it is resumed); a change of
file is where two calls that follow each other lie in different files. Comprehensions and generator expressions count as
calls, since Python 3.11 enters them, but not as functions, since nobody reads them as such.

The operations: what a `TorchDispatchMode` sees between two events `on_step_end`, forward, backward, clipping, optimizer
and router, of a 3-layer MLP with K = 40 tasks that returns `losses` and `num_items`; plain is `transformers.Trainer` on
the sum of the same losses. In brackets what is added on average over 64 steps, in which the logs and the guards of all
of them are put together once.

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
from pathlib import Path
from types import FrameType
from typing import Any

from checkouts import ROOT, checkout, described, run_in
from output import write_results

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
COUNTED = ("ls", "uw", "dwa", "imtl_l", "rlw", "gls", "si", "stch", "go4align", "bilb", "famo", "marigold")
#: Steps over which the average is taken.
MANY = 64
MEASURES = ("calls", "functions", "files", "changes of file")
EXPRESSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")


# --- one checkout, in a process of its own ---------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """Of the library that this process imports: the ways of `TOURS`, and the operations of a step."""
    from steady_step import operations

    import hf_bilb

    library = str(Path(hf_bilb.__file__).parent) + "/"
    counts = {name: len(operations(name, COUNTED_TASKS)) for name in (None, *COUNTED)}
    many = {name: len(operations(name, COUNTED_TASKS, MANY)) for name in (None, *COUNTED)}
    return {
        "tours": {row: tour(library, balancer, own) for row, (balancer, own) in TOURS.items()},
        "operations": {"plain": counts[None], **{name: counts[name] - counts[None] for name in COUNTED}},
        "on average": {name: (many[name] - many[None]) / MANY for name in COUNTED},
    }


def tour(library: str, balancer: str, own: dict[str, Any]) -> dict[str, int]:
    """The figures of one steady step."""
    from steady_step import train

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

    train(balancer, TOUR_TASKS, lambda: sys.setprofile(note), lambda: sys.setprofile(None), own)
    files = [file for file, _ in entered]
    return {
        "calls": len(entered),
        "functions": len({call for call in entered if not call[1].endswith(EXPRESSIONS)}),
        "files": len(set(files)),
        "changes of file": sum(one != other for one, other in itertools.pairwise(files)),
    }


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
        added = [_added(states[name], balancer) for name in names]
        lines.append(_row([f"`{balancer}` adds", *added]))
    return "\n".join(lines)


def _added(state: dict[str, Any], balancer: str) -> str:
    return f"+{state['operations'][balancer]} ({state['on average'][balancer]:.1f})"


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

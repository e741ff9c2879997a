"""What it costs to import the library, to build a balancer, and to be told of a mistake in a recipe: CPU seconds.

    python benchmarks/import_costs.py                                                  this checkout
    python benchmarks/import_costs.py --before 09cd3ab --output benchmarks/results     two checkouts, beside each other

Each figure is the CPU time of a whole Python process, user and system, on one thread: the least of some repeats, which
take turns between the checkouts, after one that leaves bytecode behind. What is imported before anyhow (torch,
transformers) is measured alone, and is the base that the other figures are above.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from checkouts import ROOT, checkout, described, environment
from output import write_results

RECIPE = "recipes/qm9/bilb_small.yaml"
#: Row of the table -> (arguments of python, row that is its base, exit status that is expected).
ROWS: dict[str, tuple[list[str], str | None, int]] = {
    "Python alone": (["-c", "pass"], None, 0),
    "`import torch`": (["-c", "import torch"], None, 0),
    "`from transformers import Trainer`": (["-c", "from transformers import Trainer"], None, 0),
    "`import hf_bilb`": (["-c", "import hf_bilb"], "Python alone", 0),
    "`import torch, hf_bilb`": (["-c", "import torch, hf_bilb"], "`import torch`", 0),
    "`build_balancer('bilb', num_tasks=3)`": (
        ["-c", "import torch, hf_bilb; hf_bilb.build_balancer('bilb', num_tasks=3)"],
        "`import torch`",
        0,
    ),
    "`from hf_bilb import BilevelMTLTrainer`": (
        ["-c", "from hf_bilb import BilevelMTLTrainer"],
        "`from transformers import Trainer`",
        0,
    ),
    "`hf-bilb --help`": (["-m", "hf_bilb", "--help"], "Python alone", 0),
    "a recipe's error": (["-m", "hf_bilb", "train", RECIPE, "balancer.name=blib"], "Python alone", 2),
}


def cpu_seconds(library: Path, row: str) -> float:
    """User and system time of one process."""
    arguments, _, expected = ROWS[row]
    started = os.times()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=library,
        env=environment(library, {"PYTHONDONTWRITEBYTECODE": ""}),
        capture_output=True,
        text=True,
    )
    ended = os.times()
    if done.returncode != expected:
        raise SystemExit(f"{row} ended with {done.returncode}, expected {expected}: {done.stderr[-2000:]}")
    return ended.children_user + ended.children_system - started.children_user - started.children_system


def measure(libraries: dict[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """Side -> row -> the least CPU seconds."""
    seconds: dict[str, dict[str, list[float]]] = {side: {row: [] for row in ROWS} for side in libraries}
    for row in ROWS:
        for library in libraries.values():
            cpu_seconds(library, row)
        for _ in range(repeats):
            for side, library in libraries.items():
                seconds[side][row].append(cpu_seconds(library, row))
    return {side: {row: min(found) for row, found in rows.items()} for side, rows in seconds.items()}


def table(seconds: dict[str, dict[str, float]]) -> str:
    head = ["CPU seconds", "above", *(text for side in seconds for text in (side, "above the base"))]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row, (_, base, _) in ROWS.items():
        cells = [row, base or ""]
        for found in seconds.values():
            cells += [f"{found[row]:.2f}", "" if base is None else f"{found[row] - found[base]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--before", help="folder or git revision to compare with")
    parser.add_argument("--after", default=str(ROOT), help="folder or git revision (default: this checkout)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for import_costs.json and .md")
    arguments = parser.parse_args()
    sides = {"before": arguments.before, "after": arguments.after} if arguments.before else {"now": arguments.after}
    with ExitStack() as stack:
        libraries = {
            f"{side} ({described(which)})": stack.enter_context(checkout(which)) for side, which in sides.items()
        }
        seconds = measure(libraries, arguments.repeats)
    versions = f"torch {version('torch')}, transformers {version('transformers')}, Python {platform.python_version()}"
    explained = (__doc__ or "").strip().split("\n\n")[-1]
    page = f"# Import costs\n\n{table(seconds)}\n\n`python benchmarks/import_costs.py` ({versions}).\n\n{explained}\n"
    print(page)
    write_results(arguments.output, "import_costs", page, seconds)


if __name__ == "__main__":
    main()

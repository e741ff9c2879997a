"""How far our methods are from the reference implementations: every parity file of a loss method, and torchjd.

    python benchmarks/parity.py [--output benchmarks/results]

Runs `tests/balancers/test_parity.py` and writes down what its `compare` is given, so that the table has the tests' own
cases; the toy trajectories are replayed with `examples/toy.py`, torchjd's scalarizers as in
`tests/balancers/test_torchjd.py`. Ends with 1 where something deviates too far or a file is compared with nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the replays are those of the tests

import numpy as np
import pytest
import torch
from output import write_results

import hf_bilb
from examples import toy
from tests.balancers.reference import FOLDER, load
from tests.balancers.torchjd_reference import DEVIATIONS, PAIRS, TASKS, compare_with_torchjd

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "balancers" / "test_parity.py"
TOY_TOLERANCE, TOY_STEPS = 1e-9, 20
#: What either side has and the other has not.
NO_COUNTERPART = (
    "Without a counterpart in torchjd: si, go4align, bilb, marigold, dwa with a window of n updates, stch with the "
    "official schedule, famo with next_batch, normalization, coefficient_floor. Without one here: PBI, COSMOS."
)


@dataclass(frozen=True)
class Comparison:
    """One kind of number of one file: the largest deviation, and what is allowed.

    Both are absolute, or shares of the largest number of the kind (`relative`).
    """

    file: str
    kind: str
    deviation: float
    tolerance: float
    relative: bool = False

    @property
    def passes(self) -> bool:
        return self.deviation <= self.tolerance


class Recorder:
    """A pytest plugin that notes what `compare` of a test module is given, and which tests fail."""

    def __init__(self) -> None:
        self.comparisons: list[Comparison] = []
        self.failures: list[str] = []

    @pytest.fixture(autouse=True)
    def note_comparisons(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        module = request.module
        compare = module.compare

        def noting(name: str, ours: dict[str, Any], reference: dict[str, Any]) -> None:
            self.comparisons += compared(module, name, ours, reference)
            compare(name, ours, reference)

        monkeypatch.setattr(module, "compare", noting)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longrepr}")


def compared(module: ModuleType, name: str, ours: dict[str, Any], reference: dict[str, Any]) -> list[Comparison]:
    """The deviations behind a call of the tests' `compare`, by its tolerances."""
    share = module.RELATIVE.get(module.method_of(name))
    tolerance = module.TOLERANCE if share is None else share
    return [
        Comparison(
            name,
            kind,
            float(np.abs(ours[kind] - expected).max()) / (1.0 if share is None else float(np.abs(expected).max())),
            tolerance,
            share is not None,
        )
        for kind, expected in reference.items()
    ]


def trajectories() -> Recorder:
    """Run the parity tests."""
    recorder = Recorder()
    with contextlib.redirect_stdout(io.StringIO()):  # failures are printed later, by themselves
        pytest.main([str(TESTS), "-p", "no:cacheprovider", "--rootdir", str(ROOT)], plugins=[recorder])
    return recorder


def toys() -> list[Comparison]:
    """The first steps of the toy problem from its five starts, for every method of the example that has a file."""
    found = []
    for file in sorted(path.stem for path in FOLDER.glob("toy_*.npz")):
        method = toy.METHODS.get(file.removeprefix("toy_"))
        if method is not None:
            expected = load(file)["x_first20"]
            with contextlib.redirect_stdout(io.StringIO()):  # a progress bar
                path = toy.descend(method, toy.STARTS, TOY_STEPS, record_every=1).points[:TOY_STEPS]
            deviation = float(np.abs(path.swapaxes(0, 1) - expected).max())
            found.append(Comparison(file, "x_first20", deviation, TOY_TOLERANCE))
    return found


def loss_method_files() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem != "metrics")


def number(deviation: float, kind: str) -> str:
    return f"{deviation:.1e} ({kind})" if deviation else "0"


def files_table(comparisons: list[Comparison]) -> tuple[str, bool]:
    """A row for each file: the kind of number that comes closest to its tolerance. And whether all pass."""
    rows, fine = [], True
    for file in loss_method_files():
        own = [comparison for comparison in comparisons if comparison.file == file]
        if not own:
            rows.append(f"| {file} | - | - | - | not compared |")
            fine = False
            continue
        worst = max(own, key=lambda comparison: comparison.deviation / comparison.tolerance)
        kinds = ", ".join(dict.fromkeys(comparison.kind for comparison in own))
        passes, unit = all(comparison.passes for comparison in own), " of the largest" if worst.relative else ""
        rows.append(
            f"| {file} | {kinds} | {number(worst.deviation, worst.kind)} | {worst.tolerance:.0e}{unit} "
            f"| {'pass' if passes else 'FAIL'} |"
        )
        fine = fine and passes
    return "\n".join(["| file | compared | largest deviation | tolerance | result |", "|---" * 5 + "|", *rows]), fine


def torchjd_table() -> tuple[str, bool]:
    """A row for each scalarizer: the largest deviation over all K and kinds of numbers. And whether all pass."""
    rows, fine = [], True
    for pair in PAIRS:
        deviations = [compare_with_torchjd(pair, num_tasks) for num_tasks in TASKS]
        largest, kind = max((value, key) for found in deviations for key, value in found.items())
        passes = largest <= pair.tolerance
        rows.append(
            f"| {pair.name} | {pair.relation} | {', '.join(deviations[0])} | {number(largest, kind)} "
            f"| {pair.tolerance:.0e} | {'pass' if passes else 'FAIL'} |"
        )
        fine = fine and passes
    head = "| scalarizer | what holds | compared | largest deviation | tolerance | result |"
    return "\n".join([head, "|---" * 6 + "|", *rows]), fine


def deviations_table() -> str:
    rows = [f"| {d.scalarizers} | {d.theirs} | {d.ours} | `{d.test}` |" for d in DEVIATIONS]
    return "\n".join(["| torchjd's | does | ours | shown by |", "|---" * 4 + "|", *rows])


def report() -> tuple[str, bool]:
    """The page, and whether everything passes."""
    recorder = trajectories()
    files, files_fine = files_table(recorder.comparisons + toys())
    scalarizers, scalarizers_fine = torchjd_table()
    for failure in recorder.failures:
        print(failure, file=sys.stderr)
    versions = (
        f"torch {torch.__version__}, torchjd {version('torchjd')}, hf_bilb {hf_bilb.__version__}, "
        f"{platform.processor() or platform.machine()}, float64"
    )
    count = ", ".join(str(num_tasks) for num_tasks in TASKS)
    page = f"""# Parity

`python benchmarks/parity.py --output benchmarks/results` ({versions}).

## Reference trajectories

Each file of `tests/parity_data` (its README says where the numbers come from) is trained again, 20 steps from the same
parameters on the same batches. Deviations are absolute, or, where the reference works in float32 inside, shares of the
largest number of the kind; shown is what comes closest to its tolerance, over all ways of writing the options.

{files}

## torchjd's scalarizers

20 steps of problem R for K = {count}, each side with a model, an optimizer and own parameters of its own. The
largest deviation over all K, as a share of the largest number of its kind.

{scalarizers}

What no factor puts right; each line has a test in `tests/balancers/test_torchjd.py`:

{deviations_table()}

{NO_COUNTERPART}
"""
    return page, files_fine and scalarizers_fine and not recorder.failures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="folder for parity.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    page, fine = report()
    print(page)
    write_results(arguments.output, "parity", page)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

"""Every registered balancer and variant: two ranks equal one process, accumulation both ways, kill and resume.

    python -m pytest campaigns/test_every_method.py               everything, and the report
    python -m pytest campaigns/test_every_method.py -k "famo"     what matches, without a report

What is compared stands in `tests/distributed/method_checks.py` and `tests/checkpoints/every_method.py`.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from campaigns.method_report import Figures
from tests.checkpoints.checks import assert_went_on
from tests.checkpoints.every_method import KINDS, kinds_of, run_of
from tests.distributed.conftest import ROOT, Runs, environment_of, launch
from tests.distributed.method_checks import CHECKS, EXACT, checks_of
from tests.distributed.methods import cases

CASES = cases()
REPORT = Path(__file__).with_name("every_method.md")
COMPARED = [(name, check) for name, case in CASES.items() for check in checks_of(case)]
KILLED = [(name, kind) for name, case in CASES.items() for kind in kinds_of(case)]
KILLED_TITLES = {kind: f"killed, {kind.replace('_', ' ')}" for kind in KINDS}
#: Interpreters that kill and resume side by side.
SIDE_BY_SIDE = 2
TIMEOUT = 1800


def chosen(request: pytest.FixtureRequest, test: Callable[..., None]) -> list[str]:
    """The cases that `test` is going to be called with, `-k` considered."""
    names = [item.callspec.params["name"] for item in request.session.items if item.function is test]
    return list(dict.fromkeys(names))


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    found = Figures()
    yield found
    titles = dict.fromkeys([check.title for check in CHECKS.values()] + list(KILLED_TITLES.values()))
    text = found.report(list(titles), f"{EXACT:.0e}")
    print(f"\n{text}")
    if len(found) == len(COMPARED) + len(KILLED):
        REPORT.write_text(text)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, figures: Figures) -> Runs:
    names = chosen(request, test_the_same_on_two_ranks_and_in_micro_batches)
    return launch(tmp_path_factory.mktemp("ranks"), "tests.distributed.every_method", names, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def killed_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, figures: Figures) -> Path:
    names = chosen(request, test_killed_and_resumed)
    folder = tmp_path_factory.mktemp("killed")
    for mode in ("kill", "resume"):
        parts = [part for i in range(SIDE_BY_SIDE) if (part := names[i::SIDE_BY_SIDE])]
        commands = [
            [sys.executable, "-m", "tests.checkpoints.every_method", mode, str(folder), *part] for part in parts
        ]
        in_processes(commands, folder)
    return folder


def in_processes(commands: list[list[str]], folder: Path) -> None:
    """Run the `commands` side by side; fails with the log of the first that fails."""
    logs = [folder / f"log{i}" for i in range(len(commands))]
    processes = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment_of(folder), stdout=output, stderr=subprocess.STDOUT
            )
        processes.append(process)
    try:
        for process, log in zip(processes, logs, strict=True):
            code = process.wait(timeout=TIMEOUT)
            assert code == 0, f"it ended with {code}:\n{log.read_text()[-6000:]}"
    finally:
        for process in processes:
            process.kill()


def noted(figures: Figures, name: str, title: str, verify: Callable[[], float]) -> None:
    """Assert, and keep the figure for the report."""
    try:
        figures.add(CASES[name].name, name, title, verify())
    except BaseException:
        figures.failed.append(f"{name}: {title}")
        raise


@pytest.mark.parametrize(("name", "check"), COMPARED)
def test_the_same_on_two_ranks_and_in_micro_batches(runs: Runs, figures: Figures, name: str, check: str) -> None:
    noted(figures, name, CHECKS[check].title, lambda: CHECKS[check].verify(runs, CASES[name]))


@pytest.mark.parametrize(("name", "kind"), KILLED)
def test_killed_and_resumed(killed_runs: Path, figures: Figures, name: str, kind: str) -> None:
    def verify() -> float:
        assert_went_on(killed_runs / f"{name}.{kind}", run_of(CASES[name], kind))
        return math.nan

    noted(figures, name, KILLED_TITLES[kind], verify)

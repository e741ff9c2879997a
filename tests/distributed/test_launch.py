"""A part of these tests launches the scenarios that it looks at, and no others."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.conftest import SCENARIOS
from tests.distributed.scenarios import all_scenarios


def test_every_scenario_belongs_to_one_file() -> None:
    for name in all_scenarios():
        owners = [file for file, starts in SCENARIOS.items() if name.startswith(starts)]
        assert len(owners) == 1, f"{name}: {owners}"


def test_every_file_that_asks_for_the_runs_is_listed() -> None:
    others = [path for path in Path(__file__).parent.glob("test_*.py") if path.name != Path(__file__).name]
    assert {path.name for path in others if "runs: Runs" in path.read_text()} == SCENARIOS.keys()

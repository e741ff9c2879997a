"""The runs that are killed in one launch and resumed in another, shared by the tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def resumed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tests.checkpoints.runs`, after both launches."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    for mode in ("kill", "resume"):
        command = [sys.executable, "-m", "tests.checkpoints.runs", mode, str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{mode} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
    return folder

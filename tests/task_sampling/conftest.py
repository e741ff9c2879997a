"""What the tests of this folder share: a launch of one process, one of two, and two of the runs that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import ROOT, Runs, free_port

TIMEOUT = 400


def launch(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # A launch variable of an outer launcher would make a rank of this process.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"


@pytest.fixture(scope="session")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Results of `tests.task_sampling.worker` by name of the scenario."""
    folder = tmp_path_factory.mktemp("sampled")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    for size, launcher in ((1, []), (2, torchrun)):
        launch(*launcher, "-m", "tests.task_sampling.worker", str(folder), str(size))
    one, first, second = (
        torch.load(folder / f"{name}.pt") for name in ("world1-rank0", "world2-rank0", "world2-rank1")
    )
    return Runs(one, (first, second))


@pytest.fixture(scope="session")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tests.task_sampling.runs`, after both launches."""
    folder = tmp_path_factory.mktemp("sampled_runs")
    for mode in ("kill", "resume"):
        launch("-m", "tests.task_sampling.runs", mode, str(folder))
    return folder

"""Two ranks, each with one task at a time, end where one process with both tasks' rows does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
def test_heads_that_a_rank_has_no_rows_for_are_trained_exactly(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    states = []
    for size, launcher in ((1, []), (2, torchrun)):
        file = tmp_path / f"world{size}.pt"
        command = [sys.executable, *launcher, "-m", "tests.models.text_data_parallel", str(file), str(size)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        states.append(torch.load(file))
    one, two = states
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-10, atol=1e-12, msg=name)
    for name, value in one["balancer"].items():
        torch.testing.assert_close(two["balancer"][name], value, rtol=1e-10, atol=1e-12, msg=name)

"""What one of two ranks finds out, or fails at, ends the run on both, with the same line, at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_bilb.storage.checkpoint_marker import read_marker
from hf_bilb.trainer.checkpointing import STAGING
from tests.checkpoints.conftest import ROOT

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "tests.checkpoints.ranks", str(folder)]
    # A rank that waits for the other one would wait for half an hour.
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


def said(folder: Path, case: str) -> dict[str, Any]:
    """What both ranks said."""
    first, second = (json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in (0, 1))
    assert first["world_size"] == second["world_size"] == 2
    assert first == second
    return dict(first)


def test_a_run_of_two_ranks_goes_on(launched: Path) -> None:
    for case in ("whole", "resumed"):
        assert said(launched, case)["error"] is None
    markers = [read_marker(path) for path in sorted((launched / "run").glob("checkpoint-*"))]
    assert len(markers) >= 2 and all(marker is not None for marker in markers)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {name for m in markers if m is not None for name in m.digests}
    assert len({marker.run for marker in markers if marker is not None}) == 1
    assert all(marker.finite_weights is True for marker in markers if marker is not None)


@pytest.mark.parametrize(
    ("case", "error", "part"),
    [
        ("flipped", "CheckpointError", "flipped/checkpoint-7/model.safetensors: is damaged or another run's"),
        ("other_method", "CheckpointError", "was saved by balancer 'bilb', this run uses 'uw'"),
        ("held", "FolderInUseError", "held: another run is writing into this folder"),
    ],
)
def test_both_are_refused(launched: Path, case: str, error: str, part: str) -> None:
    found = said(launched, case)
    assert found["error"] == error and part in found["line"]


@pytest.mark.parametrize(("case", "file"), [("full_0", "training_args.bin"), ("full_1", "rng_state_1.pth")])
def test_a_full_disk_of_one_rank_ends_both(launched: Path, case: str, file: str) -> None:
    found = said(launched, case)
    assert found["error"] == "CheckpointError"
    assert f"{case}/checkpoint-5/{file}: cannot be written to its end" in found["line"]
    assert not (launched / case / STAGING).exists() and not list((launched / case).glob("checkpoint-*"))

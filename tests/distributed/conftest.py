"""One launch of two processes and one of one process, shared by all tests of this folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900


#: Beginnings of the names of the scenarios that the tests of a file look at: a part of them launches no more than that.
SCENARIOS = {
    "test_absent_tasks.py": ("sparse",),
    "test_data_parallel.py": (
        "equality/", "standalone/", "sabotage/", "heads", "rest/", "poisoned/", "steep/", "looked_at", "evaluated/",
        "evaluated_stream/",
    ),
    "test_double_loop.py": (
        "double_", "beside/", "alone/", "group/", "poisoned_window", "reevaluated/", "diagnosed/", "phases", "resumed",
    ),
    "test_factors.py": ("factor/", "accumulated/"),
    "test_feature_routers.py": ("router",),
    "test_gradient_looks.py": ("gradient_looks/", "gradients_beside/"),
    "test_gradient_methods.py": ("gradient/",),
    "test_item_counts.py": ("uncounted/", "coded", "evaluated_uncounted/"),
    "test_methods.py": ("method/",),
    "test_restored.py": ("restored/",),
    "test_sharded.py": ("sharded",),
    "test_streams.py": ("streams/", "stream_"),
    "test_task_metrics.py": ("mixture",),
    "test_windows.py": ("window",),
}  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """Results by name of the scenario: of one process, and of the two ranks."""

    one: dict[str, Any]
    ranks: tuple[dict[str, Any], dict[str, Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of(folder: Path) -> dict[str, str]:
    """Of a launch. TMPDIR: hundreds of runs have a folder each, which go with `folder`."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # packages may lie in folders of their own
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(folder)}
    # A launch variable of an outer launcher would make a rank of this process.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return environment


def launch(folder: Path, module: str, arguments: Sequence[str] = (), timeout: float = TIMEOUT) -> Runs:
    """Run `module FOLDER SIZE *arguments` as one process and, at the same time, as two; load what they have saved."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    launches = {}
    for size, launcher in ((1, []), (2, torchrun)):
        command = [sys.executable, *launcher, "-m", module, str(folder), str(size), *arguments]
        log = folder / f"world{size}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment_of(folder), stdout=output, stderr=subprocess.STDOUT
            )
        launches[size] = (process, log)
    try:
        for size, (process, log) in launches.items():
            code = process.wait(timeout=timeout)
            assert code == 0, f"the launch of {size} process(es) ended with {code}:\n{log.read_text()[-6000:]}"
    finally:
        for process, _ in launches.values():
            process.terminate()
    one, first, second = (
        torch.load(folder / f"{name}.pt") for name in ("world1-rank0", "world2-rank0", "world2-rank1")
    )
    return Runs(one, (first, second))


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    asking = {item.path.name for item in request.session.items if "runs" in getattr(item, "fixturenames", ())}
    wanted = () if asking >= SCENARIOS.keys() else [start for name in sorted(asking) for start in SCENARIOS[name]]
    return launch(tmp_path_factory.mktemp("distributed"), "tests.distributed.worker", wanted)

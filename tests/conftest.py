"""One thread per process: two processes on two cores with OpenMP threads fight, and rounding depends on the number.

Under pytest-xdist (`make test`) the tests of a file stay together on one worker, for the sake of what they share, and
so do those of a folder that shares a launch of processes; what takes longest begins first.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Trainer collects garbage whenever a training begins: a quarter of a second, most of the time of the short ones
    here, if it looks at every object that the imports have left. Never unfrozen: that would bring them all back."""
    gc.collect()
    gc.freeze()


#: Folders and files of minutes, the longest first; the tests of a folder have a launch in common.
LONG = (
    "distributed",
    "checkpoints/test_kill_and_resume.py",
    "cli/test_compare.py",
    "end_to_end/test_every_family.py",
    "task_sampling",
    "models/test_text_encoder.py",
    "data/test_qm9_graphs.py",
)

#: Files that are `slow`, which `make test-fast` leaves out; single tests are marked where they stand.
SLOW = tuple(
    f"trainer/test_{name}.py"
    for name in (
        "diagnostics", "double_loop", "evaluation_metrics", "gradient_diagnostics", "history_methods", "looks",
        "marigold", "seq2seq", "streams", "task_sampler", "wrapped_models",
    )
)  # fmt: skip


def place_of(nodeid: str) -> str:
    """The file of a test, below this folder."""
    return nodeid.split("::")[0].removeprefix("tests/")


def group_of(nodeid: str) -> str:
    """What runs on one worker: the folder where it is in `LONG`, else the file."""
    folder = place_of(nodeid).split("/")[0]
    return folder if folder in LONG else place_of(nodeid)


def is_slow(item: pytest.Item) -> bool:
    """Of the methods' cases those with another normalization, which is none of the method's business."""
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return place_of(item.nodeid) in SLOW or str(getattr(case, "label", "")).startswith("normalization_")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks; and the order, which decides what a worker begins with, and is the same on all of them."""
    for item in items:
        if is_slow(item):
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" in os.environ:
        groups = [group_of(item.nodeid) for item in items]
        places = {group: LONG.index(group) if group in LONG else len(LONG) for group in groups}
        items.sort(key=lambda item: places[group_of(item.nodeid)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups as `group_of` says. `--dist loadgroup`, which would do it, sees no marks under pytest 9 (xdist 3.8.0)."""
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)

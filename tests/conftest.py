"""One thread per process: two processes on two cores with OpenMP threads fight, and rounding depends on the number.

Under pytest-xdist (`make test`) the tests of a file stay together on one worker, for the sake of what they share, and
so do those of a folder that shares a launch of processes; what takes longest begins first.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)

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
        "diagnostics", "double_loop", "evaluation_metrics", "history_methods", "looks", "marigold", "seq2seq",
        "streams", "task_sampler", "wrapped_models",
    )
)  # fmt: skip


def place_of(item: pytest.Item) -> str:
    """The file, below this folder."""
    return Path(os.path.relpath(item.path, Path(__file__).parent)).as_posix()


def group_of(item: pytest.Item) -> str:
    """What runs together: the folder where it is in `LONG`, else the file."""
    folder = place_of(item).split("/")[0]
    return folder if folder in LONG else place_of(item)


def is_slow(item: pytest.Item) -> bool:
    """Of the methods' cases those with another normalization, which is none of the method's business."""
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return place_of(item) in SLOW or str(getattr(case, "label", "")).startswith("normalization_")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks; and the order, which decides what `--dist loadgroup` begins with, and is the same on all workers."""
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
        if is_slow(item):
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONG.index(groups[item]) if groups[item] in LONG else len(LONG))

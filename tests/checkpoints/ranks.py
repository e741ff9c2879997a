"""Two ranks of one run, of which one fails alone; each rank in a process of its own, forked after the imports.

    python -m tests.checkpoints.ranks FOLDER

What rank r said in a case lies in FOLDER/<case>.<r>.json: the world's size, the kind of the error and its line.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_bilb.storage.folder_lock import hold
from tests.checkpoints.runs import RUNS, build_trainer, in_processes

RUN = RUNS["two_ranks"]
BEST = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}


def say(folder: Path, case: str, action: Callable[[], Any], size: Callable[[], int]) -> None:
    """Note what `action` ends with."""
    found: dict[str, Any] = {"error": None}
    try:
        action()
    except Exception as error:
        found = {"error": type(error).__name__, "line": str(error)}
    (folder / f"{case}.{os.environ['RANK']}.json").write_text(json.dumps({**found, "world_size": size()}))


def train(folder: Path, case: str, run: str, limits: dict[str, int], resume: str | bool = False, **more: Any) -> None:
    """Both ranks train into FOLDER/<run>; rank r may write files of `limits[r]` bytes at most."""

    def target() -> None:
        trainer = build_trainer(RUN, folder / run, max_steps=7, **more)
        own = limits.get(os.environ["RANK"])
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def act() -> None:
            if own is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (own, before[1]))
            trainer.train(resume_from_checkpoint=resume)

        def size() -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            return int(trainer.args.world_size)

        say(folder, case, act, size)

    assert in_processes(target, 2) == [0, 0], case


def main(folder: Path) -> None:
    gc.freeze()
    train(folder, "whole", "run", {})
    train(folder, "resumed", "run", {}, resume=True)
    shutil.copytree(folder / "run", folder / "flipped")
    path = folder / "flipped" / "checkpoint-7" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x93")
    train(folder, "flipped", "flipped", {}, resume=str(path.parent))
    train(folder, "other_method", "run", {}, resume=str(folder / "run" / "checkpoint-7"), balancer="uw")
    # Files of a checkpoint that only one of the ranks writes; with and without a barrier in the middle of the save.
    train(folder, "full_0", "full_0", {"0": 2000}, **BEST)
    train(folder, "full_1", "full_1", {"1": 2000}, **BEST)
    with hold(folder / "held"):
        train(folder, "held", "held", {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Which checkpoints stay under `save_total_limit`."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from hf_bilb.errors import CheckpointError
from hf_bilb.storage.checkpoint_check import STAGING
from hf_bilb.storage.checkpoint_marker import read_marker


def rotate_checkpoints(run_folder: str | Path, limit: int | None, best: str | Path | None = None) -> None:
    """Delete the oldest checkpoints of `run_folder` beyond `limit`, as `Trainer` does, but no finite one for another.

    `limit` of those with finite weights stay, the newest of them and the best one among them; of those without, the
    newest alone, as long as it is the newest of all.

    Args:
        limit: None or 0: all stay.
        best: the best checkpoint, if there is one.
    """
    if limit is None or limit <= 0:
        return
    ordered = [Path(path) for path in sort_checkpoints(str(run_folder), use_mtime=True)]
    finite = [path for path in ordered if _has_finite_weights(path)]
    needed = {*finite[-1:], *ordered[-1:]}
    if best is not None:
        needed |= {path for path in ordered if path.absolute() == Path(best).absolute()}
    stays = max(limit, len(needed & set(finite)))
    spare = [path for path in finite if path not in needed][: max(len(finite) - stays, 0)]
    for path in [*spare, *(path for path in ordered if path not in finite and path not in needed)]:
        _remove(path)


def _has_finite_weights(checkpoint: Path) -> bool:
    """As its marker says; one without a marker is taken for good, as `Trainer` takes it."""
    try:
        marker = read_marker(checkpoint)
    except CheckpointError:
        return False
    return marker is None or marker.finite_weights is not False


def _remove(checkpoint: Path) -> None:
    # Out of the way first: what a kill leaves of a half deleted one must not look like a checkpoint.
    aside = checkpoint.parent / STAGING / f"rotated-{checkpoint.name}"
    with contextlib.suppress(OSError):
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
        checkpoint = aside
    shutil.rmtree(checkpoint, ignore_errors=True)
    with contextlib.suppress(OSError):
        aside.parent.rmdir()  # only when nothing else is in it

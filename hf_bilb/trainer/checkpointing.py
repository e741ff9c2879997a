"""Checkpoints that are complete or not there, and the balancer's files in them.

A checkpoint is written to `_incomplete/checkpoint-N`, gets a marker that lists its files, and is then renamed to
`checkpoint-N`. What its marker says stands in `hf_bilb.storage.checkpoint_marker`, how it is looked at before it is
loaded in `hf_bilb.storage.checkpoint_check`. The balancer's state lies in it as `balancer.safetensors` (tensors) and
`balancer.json` (method, options, task names, running log): no pickle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_bilb._version import __version__
from hf_bilb.engine.balancer import LossBalancer
from hf_bilb.errors import CheckpointError, TaskLossError
from hf_bilb.storage.checkpoint_check import (
    DESCRIPTION,
    STAGING,
    TENSORS,
    check_as_saved,
    has_balancer,
    has_whole_balancer,
    verify,
)
from hf_bilb.storage.checkpoint_marker import MARKER, Marker, read_marker, sync, write_marker
from hf_bilb.trainer.running_log import RunningLog

logger = logging.getLogger(__name__)

__all__ = [
    "DESCRIPTION", "MARKER", "STAGING", "TENSORS", "balancer_folder", "check_as_saved", "check_description",
    "clear_staging", "discard_staging", "has_balancer", "has_whole_balancer", "last_complete_checkpoint",
    "load_balancer", "publish", "read_balancer", "run_id", "save_balancer", "start_balancer_from", "verify",
]  # fmt: skip

_FORMAT = 2
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


# --- writing ------------------------------------------------------------------------------------------------------


def clear_staging(staged: Path) -> None:
    """Remove what interrupted saves have left next to the checkpoint `staged`, which is about to be written."""
    discard_staging(staged)
    staged.mkdir(parents=True)


def discard_staging(staged: Path) -> None:
    """Remove the unfinished checkpoint `staged` and what lies next to it, as far as that can be done."""
    shutil.rmtree(staged.parent, ignore_errors=True)


def publish(staged: Path, final: Path, run: str, finite_weights: bool | None) -> None:
    """Mark the finished checkpoint `staged` as complete and rename it to `final`, replacing an older one.

    Its files are on the disk before it gets the name; the name is, before this returns.

    Args:
        run, finite_weights: see `hf_bilb.storage.checkpoint_marker`.
    """
    write_marker(staged, run, finite_weights)
    if final.exists():
        # Out of the way first, deleted last: at no moment is the only complete checkpoint gone.
        older = staged.parent / f"replaced-{final.name}"
        shutil.rmtree(older, ignore_errors=True)
        os.rename(final, older)
        os.rename(staged, final)
        shutil.rmtree(older, ignore_errors=True)
    else:
        os.rename(staged, final)
    sync(final.parent)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()  # only when nothing else is in it


def run_id(run_folder: str | Path, resumed_from: str | Path | None) -> str:
    """The id that the checkpoints of a run in `run_folder` get: that of the checkpoint it goes on from, when this lies
    in the same folder and has one, else a new one."""
    if resumed_from is not None and Path(resumed_from).absolute().parent == Path(run_folder).absolute():
        marker = read_marker(Path(resumed_from))
        if marker is not None and marker.run is not None:
            return marker.run
    return uuid.uuid4().hex


# --- finding ------------------------------------------------------------------------------------------------------


def last_complete_checkpoint(run_folder: str | Path, *, thorough: bool = True, finish_renames: bool = True) -> str:
    """The checkpoint in `run_folder` that a run goes on from: of those that can be loaded the last one.

    Passed over, with a warning: what was not finished, what is damaged (see `hf_bilb.storage.checkpoint_check.verify`),
    those of an earlier run in this folder, and those whose weights are not finite as long as there is another. One of
    `Trainer` counts when it looks complete.

    Args:
        thorough: see `verify`.
        finish_renames: take over a checkpoint that was stopped before its last rename; only for who holds the folder.

    Raises:
        CheckpointError: when there is none.
    """
    folder = Path(run_folder)
    if finish_renames:
        _finish_renames(folder)
    last = _last_complete(folder, thorough)
    if last is None:
        raise CheckpointError(
            f"No valid checkpoint found in output directory ({folder}): it has no complete checkpoint to resume from"
        )
    return str(last)


def _last_complete(folder: Path, thorough: bool) -> Path | None:
    not_finite = None
    for path in _candidates(folder):
        try:
            found = verify(path, thorough=thorough)
        except CheckpointError as error:
            logger.warning("passing over an incomplete checkpoint: %s", error)
            continue
        if found.marker is None and has_balancer(path):
            logger.warning("passing over an incomplete checkpoint: %s has no %s", path, MARKER)
        elif found.finite:
            if not_finite is not None:
                logger.warning("passing over %s: its weights are not finite; those of %s are", not_finite, path.name)
            return path
        else:
            not_finite = not_finite or path
    return not_finite


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints by step, the last one first; those of an earlier run in the same folder after all others."""
    steps = {
        p: int(m.group(1)) for p in (folder.iterdir() if folder.is_dir() else ()) if (m := _CHECKPOINT.match(p.name))
    }
    markers = {
        path: marker for path in steps if (marker := _marker_or_none(path)) is not None and marker.run is not None
    }
    if not markers:
        return sorted(steps, key=lambda path: -steps[path])
    newest = max(markers, key=lambda path: markers[path].saved or 0.0)
    earlier = {path for path, marker in markers.items() if marker.run != markers[newest].run}
    if stale := sorted(path.name for path in earlier if steps[path] > steps[newest]):
        logger.warning(
            "%s: %s %s of an earlier run than %s: a resume goes on with the later run",
            folder, ", ".join(stale), "are" if len(stale) > 1 else "is", newest.name,
        )  # fmt: skip
    return sorted(steps, key=lambda path: (path in earlier, -steps[path]))


def _marker_or_none(path: Path) -> Marker | None:
    try:
        return read_marker(path)
    except CheckpointError:
        return None  # `verify` will say so


def _finish_renames(folder: Path) -> None:
    """Take over checkpoints that were stopped between their marker and their rename; warn of the other ones."""
    staging = folder / STAGING
    for staged in sorted(staging.iterdir()) if staging.is_dir() else ():
        if not _CHECKPOINT.match(staged.name):
            continue  # was about to be deleted
        final = folder / staged.name
        try:
            if verify(staged).marker is None:
                raise CheckpointError(f"{staged}: has no {MARKER}")
        except CheckpointError:
            logger.warning("%s was being written when a run stopped; it is passed over", staged)
            continue
        if not final.exists():
            os.rename(staged, final)


# --- the balancer's files -----------------------------------------------------------------------------------------


def save_balancer(folder: str | Path, balancer: LossBalancer, log: RunningLog, run: str | None = None) -> None:
    """Write `balancer.safetensors` and `balancer.json` into `folder`, which is created if need be; `run` is the run's
    id."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in balancer.state_dict().items()}, path / TENSORS)
    description = {
        "format": _FORMAT,
        "hf_bilb": __version__,
        "run": run,
        "balancer": balancer.name,
        "options": repr(balancer.options),
        "task_names": list(balancer.task_names),
        "log": log.state(),
    }
    (path / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def read_balancer(folder: str | Path, balancer: LossBalancer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and check the balancer's files against `balancer`, which is not changed.

    Returns:
        the tensors and the description.

    Raises:
        CheckpointError: missing, truncated or foreign files; another method; other tasks.
    """
    path = Path(folder)
    description = _read_description(path / DESCRIPTION)
    _check_description(path / DESCRIPTION, description, balancer)
    with _explained(path / TENSORS):
        tensors = load_file(path / TENSORS, device=str(balancer.device))
        balancer.check_state_dict(tensors)
    return tensors, description


def check_description(folder: str | Path, balancer: LossBalancer) -> None:
    """Raise `CheckpointError` when `folder` holds a description, and it is of another method or of other tasks."""
    path = Path(folder) / DESCRIPTION
    if path.is_file():
        _check_description(path, _read_description(path), balancer)


def _check_description(path: Path, description: dict[str, Any], balancer: LossBalancer) -> None:
    if description["balancer"] != balancer.name:
        saved = description["balancer"]
        raise CheckpointError(
            f"{path}: was saved by balancer {saved!r}, this run uses {balancer.name!r}; go on with {saved!r}, or start "
            "a new run from the model's weights"
        )
    if list(description["task_names"]) != list(balancer.task_names):
        raise CheckpointError(f"{path}: {_task_difference(description['task_names'], balancer.task_names)}")


def _say_other_options(path: Path, description: dict[str, Any], balancer: LossBalancer) -> None:
    if description["options"] != repr(balancer.options):
        logger.warning("%s: was saved with other options than this run's; this run's hold", path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What can be wrong with the tensors at `path`, as one line."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is truncated or no safetensors file ({error})") from None
    except TaskLossError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_balancer(folder: str | Path, balancer: LossBalancer, log: RunningLog | None = None) -> None:
    """Restore `balancer` (and the running log) from `folder`; raises `CheckpointError` as `read_balancer` does."""
    tensors, description = read_balancer(folder, balancer)
    _say_other_options(Path(folder) / DESCRIPTION, description, balancer)
    balancer.load_state_dict(tensors)
    if log is not None:
        log.load_state(description["log"])


def balancer_folder(path: str | Path) -> Path:
    """The folder with a balancer's files that `path` means: itself, or the last complete checkpoint of a run in it.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder, expected a checkpoint or a run's folder")
    if has_balancer(folder):
        return folder
    # That run may be under way: what it is writing there is left alone.
    last = _last_complete(folder, thorough=False)
    if last is None or not has_balancer(last):
        raise CheckpointError(f"{last or folder}: holds no balancer state, expected a checkpoint that does")
    return last


def start_balancer_from(path: str | Path, balancer: LossBalancer) -> None:
    """Let `balancer` begin with what the run at `path` (see `balancer_folder`) has learned.

    Raises:
        CheckpointError: nothing there, another method, other tasks.
    """
    folder = balancer_folder(path)
    description = _read_description(folder / DESCRIPTION)
    _check_description(folder / DESCRIPTION, description, balancer)
    with _explained(folder / TENSORS):
        tensors = load_file(folder / TENSORS, device=str(balancer.device))
    check_as_saved(folder, [TENSORS])
    with _explained(folder / TENSORS):
        balancer.start_from(tensors)
    _say_other_options(folder / DESCRIPTION, description, balancer)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != _FORMAT:
            raise CheckpointError(
                f"{path}: has format {description['format']}, this version of hf_bilb reads {_FORMAT}"
            )
        if not {"balancer", "options", "task_names", "log"} <= description.keys():
            raise KeyError
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: is damaged or was not written by hf_bilb") from None
    return dict(description)


def _task_difference(saved: list[str], now: tuple[str, ...]) -> str:
    if len(saved) != len(now):
        return f"was saved for {len(saved)} tasks, this run has {len(now)}"
    k = next(i for i, (a, b) in enumerate(zip(saved, now, strict=True)) if a != b)
    return f"was saved for other tasks: task {k} is {saved[k]!r} there and {now[k]!r} in this run"

"""Checkpoints that are complete or not there, and the balancer's files in them.

A checkpoint is written to `_incomplete/checkpoint-N`, gets a marker that lists its files, and is then renamed to
`checkpoint-N`. The balancer's state lies in it as `balancer.safetensors` (tensors) and `balancer.json` (method,
options, task names, running log): no pickle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_bilb.balancers.base import LossBalancer
from hf_bilb.errors import CheckpointError, TaskLossError
from hf_bilb.running_log import RunningLog

logger = logging.getLogger(__name__)

MARKER = "checkpoint_complete.json"
STAGING = "_incomplete"
TENSORS, DESCRIPTION = "balancer.safetensors", "balancer.json"
_FORMAT = 2
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


# --- completeness -------------------------------------------------------------------------------------------------


def clear_staging(staged: Path) -> None:
    """Remove what interrupted saves have left beside the checkpoint `staged`, which is about to be written."""
    shutil.rmtree(staged.parent, ignore_errors=True)
    staged.mkdir(parents=True)


def publish(staged: Path, final: Path) -> None:
    """Mark the finished checkpoint `staged` as complete and rename it to `final`, replacing an older one."""
    files = {
        str(p.relative_to(staged)): p.stat().st_size
        for p in sorted(staged.rglob("*"))
        if p.is_file() and p.name != MARKER
    }
    (staged / MARKER).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1), encoding="utf-8")
    if final.exists():
        # Out of the way first, deleted last: at no moment is the only complete checkpoint gone.
        older = staged.parent / f"replaced-{final.name}"
        shutil.rmtree(older, ignore_errors=True)
        os.rename(final, older)
        os.rename(staged, final)
        shutil.rmtree(older, ignore_errors=True)
    else:
        os.rename(staged, final)
    if staged.parent.is_dir() and not any(staged.parent.iterdir()):
        staged.parent.rmdir()


def verify(checkpoint: str | Path) -> None:
    """Raise `CheckpointError` unless `checkpoint` is a folder whose marker's files are all there at their full size."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder")
    try:
        sizes = dict(json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"].items())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {MARKER}: writing it was not finished, or not by BilevelMTLTrainer"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / MARKER}: is damaged") from None
    for name, size in sizes.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: is missing from the checkpoint")
        found = (folder / name).stat().st_size
        if found != size:
            raise CheckpointError(f"{folder / name}: is damaged or truncated: {found} bytes, expected {size}")


def last_complete_checkpoint(run_folder: str | Path) -> str:
    """The complete checkpoint with the highest step in `run_folder`; incomplete ones are passed over with a warning.

    Raises:
        CheckpointError: when there is none.
    """
    folder = Path(run_folder)
    _finish_renames(folder)
    last = _last_complete(folder)
    if last is None:
        raise CheckpointError(f"{folder}: has no complete checkpoint to resume from")
    return str(last)


def _last_complete(folder: Path) -> Path | None:
    found = [
        (int(m.group(1)), p) for p in (folder.iterdir() if folder.is_dir() else ()) if (m := _CHECKPOINT.match(p.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("passing over an incomplete checkpoint: %s", error)
            continue
        return path
    return None


def _finish_renames(folder: Path) -> None:
    """Take over checkpoints that were stopped between their marker and their rename; warn of the other ones."""
    staging = folder / STAGING
    for staged in sorted(staging.iterdir()) if staging.is_dir() else ():
        final = folder / staged.name
        try:
            verify(staged)
        except CheckpointError:
            logger.warning("%s was being written when a run stopped; it is passed over", staged)
            continue
        if _CHECKPOINT.match(staged.name) and not final.exists():
            # Every rank comes here; the first one does it.
            with contextlib.suppress(FileNotFoundError):
                os.rename(staged, final)


# --- the balancer's files -----------------------------------------------------------------------------------------


def save_balancer(folder: str | Path, balancer: LossBalancer, log: RunningLog) -> None:
    """Write `balancer.safetensors` and `balancer.json` into `folder`, which is created if need be."""
    from hf_bilb import __version__

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in balancer.state_dict().items()}, path / TENSORS)
    description = {
        "format": _FORMAT,
        "hf_bilb": __version__,
        "balancer": balancer.name,
        "options": repr(balancer.options),
        "task_names": list(balancer.task_names),
        "log": log.state(),
    }
    (path / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def has_balancer(folder: str | Path) -> bool:
    """Whether `folder` holds a balancer's files (a `save_only_model` checkpoint does not)."""
    return (Path(folder) / TENSORS).is_file() or (Path(folder) / DESCRIPTION).is_file()


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


def _check_description(path: Path, description: dict[str, Any], balancer: LossBalancer) -> None:
    if description["balancer"] != balancer.name:
        saved = description["balancer"]
        raise CheckpointError(f"{path}: was saved by balancer {saved!r}, this run uses {balancer.name!r}")
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
    last = _last_complete(folder)
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
        balancer.start_from(load_file(folder / TENSORS, device=str(balancer.device)))
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

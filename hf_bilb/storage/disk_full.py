"""A full disk while files are written, as one line that names the file and the bytes that are needed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hf_bilb.errors import CheckpointError

#: No space, no quota, a file beyond what a process may write.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IN_SAFETENSORS = re.compile(r"\(os error (\d+)\)")
_IN_TORCH = ("inline_container.cc", "PytorchStreamWriter", "iostream error")


def disk_full_error(
    error: Exception,
    folder: Path,
    *,
    needed: Callable[[], int] | None = None,
    shown: Path | None = None,
    file: str = "",
) -> CheckpointError | None:
    """The error to raise when `error` is a write into `folder` for which there was no space; None for any other one.

    Args:
        needed: tells how many bytes all of what is being written takes.
        shown: what to call the folder, when it is not to keep its name.
        file: the file, where neither the error nor the folder tells. Of a random state, which every rank writes, it is
            taken as given: what is youngest in the folder may be another rank's.
    """
    reason = _reason(error)
    if reason is None:
        return None
    named = getattr(error, "filename", None)
    written = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    candidates = [path for path in written if not path.name.startswith("rng_state")]
    if named is None and candidates and not file.startswith("rng_state") and not isinstance(error, SafetensorError):
        named = max(candidates, key=lambda path: path.stat().st_mtime_ns)
    place = (folder if shown is None else shown) / (file if named is None else os.path.relpath(named, folder))
    asked = "" if needed is None else f": about {needed():,} bytes are needed"
    # What has been written of it goes away, when it is in a folder of its own.
    left = _free(folder, 0 if shown is None else sum(_on_disk(path) for path in written))
    return CheckpointError(f"{place}: cannot be written to its end ({reason}){asked}{',' if asked else ':'} {left}")


def _on_disk(path: Path) -> int:
    found = path.stat()
    return found.st_size if sys.platform == "win32" else found.st_blocks * 512


def _free(folder: Path, more: int = 0) -> str:
    try:
        return f"{shutil.disk_usage(folder).free + more:,} bytes are free"
    except OSError:
        return "it is not known how many are free"


@contextlib.contextmanager
def disk_full_explained(folder: Path) -> Iterator[None]:
    """Raise `CheckpointError` in place of what a full disk does to a write into `folder`."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        # Which file, only some of them tell; it may be one of a cache, on another disk.
        what = getattr(error, "filename", None) or "a file"
        raise CheckpointError(f"{what} cannot be written to its end ({reason}): in {folder} {_free(folder)}") from None


def _reason(error: Exception) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := _IN_SAFETENSORS.search(str(error))):
        number = int(found.group(1))
    if number in _FULL:
        return os.strerror(number)
    # torch.save does not say why.
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _IN_TORCH):
        return "no space left on the disk, or the disk fails"
    return None


def bytes_of_model(model: nn.Module) -> int:
    """Of its parameters and buffers, each counted once."""
    return _bytes([*model.parameters(), *model.buffers()])


def bytes_of_optimizer(optimizer: torch.optim.Optimizer | None) -> int:
    """Of its state's tensors."""
    if optimizer is None:
        return 0
    return _bytes(value for state in optimizer.state.values() if isinstance(state, dict) for value in state.values())


def _bytes(values: Iterable[object]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))

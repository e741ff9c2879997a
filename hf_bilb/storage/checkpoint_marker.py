"""`checkpoint_complete.json`: written last into a checkpoint, it says what belongs to it and what the files hold.

    {"format": 3, "run": "5f0c...", "saved": 1760000000.0, "finite_weights": true,
     "files": {"model.safetensors": 1234, ...}, "sha256": {"model.safetensors": "9b3e...", ...}, "of_this": "77a0..."}

`files` are sizes in bytes; formats 1 and 2 have them alone. `run` is the same in all checkpoints of a run, and after it
was resumed in its own folder; a run that goes on in another folder is another run. `finite_weights` is null where it
was not looked at. `of_this` is the SHA-256 of all the rest as JSON with sorted keys.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_bilb.errors import CheckpointError

MARKER = "checkpoint_complete.json"
_FORMAT = 3
_BLOCK = 1 << 20
#: What `fsync` says of what it cannot do, on some file systems and of folders.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Marker:
    """What a marker says.

    Attributes:
        sizes: bytes by file name, relative to the checkpoint.
        digests: SHA-256 by file name; empty in older formats.
        run: id of the run; None in older formats.
        saved: seconds since 1970; None in older formats.
        finite_weights: whether the saved weights are all finite; None where it is not known.
    """

    sizes: dict[str, int]
    digests: dict[str, str] = field(default_factory=dict)
    run: str | None = None
    saved: float | None = None
    finite_weights: bool | None = None


def read_marker(folder: Path) -> Marker | None:
    """The marker of `folder`; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / MARKER
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sizes = {str(name): int(size) for name, size in found["files"].items()}
        digests = {str(name): str(digest) for name, digest in found.get("sha256", {}).items()}
        if "of_this" in found and found.pop("of_this") != _digest_of(found):
            raise ValueError("other content than was written")
        if digests and digests.keys() != sizes.keys():
            raise ValueError("sizes and digests of other files")
        return Marker(sizes, digests, found.get("run"), found.get("saved"), found.get("finite_weights"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: is damaged") from None


def write_marker(folder: Path, run: str, finite_weights: bool | None) -> None:
    """Bring all files of `folder` to the disk and write the marker, which names them.

    When it is there, so is everything else, also after the power was cut. Cost: each file is read once (from memory,
    as a rule) for its SHA-256, see `digests`, and written out (`fsync`, which the disk's speed decides).
    """
    files = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
    with _workers() as pool:
        hashed = dict(zip(files, pool.map(_digest_to_disk, files.values()), strict=True))
    content: dict[str, Any] = {
        "format": _FORMAT,
        "run": run,
        "saved": time.time(),
        "finite_weights": finite_weights,
        "files": {name: path.stat().st_size for name, path in files.items()},
        "sha256": hashed,
    }
    content["of_this"] = _digest_of(content)
    (folder / MARKER).write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync(folder / MARKER)
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
        sync(path)
    sync(folder)


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- SHA-256 ------------------------------------------------------------------------------------------------------

#: Path -> the state of a file when it was hashed, and its SHA-256: a run looks twice at what it resumes from.
_known: dict[Path, tuple[tuple[int, ...], str]] = {}
_SECONDS_TO_SETTLE = 2.0  # a file that is younger may change without its times telling


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256, in hexadecimal, of each of the files `names` of `folder`.

    Cost: measured 0.9 s of processor time per GB with SHA instructions (2 to 3 s without), for the first time that
    a process asks; up to four files at once.
    """
    listed = list(names)
    with _workers() as pool:
        return dict(zip(listed, pool.map(lambda name: _digest_once(folder / name), listed), strict=True))


def _digest_once(path: Path) -> str:
    now = path.stat()
    state = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    known = _known.get(path)
    if known is not None and known[0] == state:
        return known[1]
    found = _digest(path)
    if time.time() - max(now.st_mtime, now.st_ctime) > _SECONDS_TO_SETTLE:
        _known[path] = (state, found)
    return found


def _digest(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
    return hashed.hexdigest()


def _digest_to_disk(path: Path) -> str:
    found = _digest(path)  # first, as long as it is in memory
    sync(path)
    return found


def _workers() -> ThreadPoolExecutor:
    """hashlib and fsync let other threads run."""
    return ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; nothing where that cannot be done."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise
        finally:
            os.close(descriptor)

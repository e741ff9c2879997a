"""One run at a time in an output folder: a lock that dies with its process.

Two runs in one folder write over each other's checkpoints, and what lies there at the end is of both.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_bilb.errors import FolderInUseError, OptionError

logger = logging.getLogger(__name__)

#: In the folder, as long as it is held. The underscore keeps it out of what `Trainer` pushes to the hub.
LOCK_FILE = "_in_use.lock"
#: Where there can be no lock: none in the file system, no right to write, no space.
_WITHOUT_LOCKS = {
    errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL,
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip
#: What `flock` says of a lock that is taken; the last over NFS.
_HELD_BY_ANOTHER = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@dataclass
class _Lock:
    """A folder that this process holds."""

    file: Path
    descriptor: int
    thread: int
    times: int = 1


_held: dict[tuple[int, int], _Lock] = {}  # by device and inode of the folder
_guard = threading.RLock()


@contextlib.contextmanager
def hold(folder: str | Path, *, again: bool = False) -> Iterator[int | None]:
    """Be the only one to write into `folder`, until the end of the `with` block or of the process.

    A child process that this one forks does not hold it; one that is handed the
    descriptor (`subprocess.Popen(..., pass_fds=...)`) does, and goes on doing so when this process is killed.

    Args:
        folder: is created if need be.
        again: the same thread may hold it already: a recipe's run holds its folder from its first moment on, and its
            Trainer again.

    Yields:
        the descriptor of the lock file; None where there is no lock: on Windows, and, with a warning, in a folder that
        cannot be written to or on a file system without locks.

    Raises:
        FolderInUseError: another process, or another thread of this one, holds it (without `again`: this thread, too);
            names the folder and, where it is known, the process.
        OptionError: `folder` is a file.
    """
    key = None if sys.platform == "win32" else _acquire(Path(folder).absolute(), again)
    try:
        yield None if key is None else _held[key].descriptor
    finally:
        if key is not None:
            _release(key)


def _acquire(folder: Path, again: bool) -> tuple[int, int] | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = _identity(folder)
        with _guard:
            held = _held.get(key)
            if held is None:
                _held[key] = _Lock(folder / LOCK_FILE, _lock(folder), threading.get_ident())
            elif held.thread != threading.get_ident():
                raise _in_use(folder, "another thread of this process")
            elif again:
                held.times += 1
            else:
                raise _in_use(folder, "this process")
        return key
    except (FileExistsError, NotADirectoryError):
        raise OptionError(f"{folder}: is no folder, or lies in something that is none") from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        logger.warning(
            "%s: cannot be locked (%s): take care that no other run writes into it", folder, error.strerror or error
        )
        return None


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _lock(folder: Path) -> int:
    """Create and lock the file; its descriptor."""
    import fcntl

    file = folder / LOCK_FILE
    while True:
        # Open for writing: over NFS an exclusive lock asks for it.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _HELD_BY_ANOTHER:
                    raise _in_use(folder, _holder(descriptor)) from None
                raise
            # The one before may have removed the file between these two calls: then this is a lock on nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    _sign(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(key: tuple[int, int]) -> None:
    with _guard:
        held = _held.get(key)
        if held is None:
            return  # in a child that was forked meanwhile
        held.times -= 1
        if held.times == 0:
            del _held[key]
            # First the file, then the lock: whoever gets the lock now sees that the file is gone.
            with contextlib.suppress(OSError):
                held.file.unlink()
            os.close(held.descriptor)


def _forget() -> None:
    """In a child after a fork: what the parent holds is the parent's, also when the child lives longer."""
    global _guard
    _guard = threading.RLock()  # another thread of the parent may have held it
    for held in _held.values():
        with contextlib.suppress(OSError):
            os.close(held.descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget)


# --- who holds it -------------------------------------------------------------------------------------------------


def _sign(descriptor: int) -> None:
    # Of use to who is refused, and no more: a full disk is not the lock's business.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _holder(descriptor: int) -> str:
    try:
        text = os.pread(descriptor, 200, 0).decode("utf-8", errors="replace")
    except OSError:
        text = ""
    return " ".join(text.split()) or "another process"


def _in_use(folder: Path, holder: str) -> FolderInUseError:
    return FolderInUseError(
        f"{folder}: another run is writing into this folder ({holder}): wait for its end, or take another output_dir"
    )

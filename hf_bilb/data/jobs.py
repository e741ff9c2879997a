"""Work that several processes share, and that an interrupt ends quietly."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(work: Callable[[Any], int], jobs: Sequence[Any], num_workers: int) -> Iterator[int]:
    """What `work` returns for each job, in the order in which they end.

    An interrupt, or an error of a job, ends it: the jobs under way are finished, the others are dropped.

    Args:
        work: a function of a module; jobs are pickled.
        jobs: what there is to do.
        num_workers: processes at most; 1 (or a single job): in this process.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a worker was killed (no memory left).
    """
    if min(num_workers, len(jobs)) <= 1:
        yield from map(work, jobs)
        return
    # Not multiprocessing.Pool, which waits for ever for a worker that died.
    executor = ProcessPoolExecutor(min(num_workers, len(jobs)), initializer=_start_worker)
    try:
        with _interrupts_held():
            futures = [executor.submit(work, job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """An interrupt comes at the end; never to a process that is started here, which would show a traceback before it
    has got to `_start_worker`."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    # An interrupt is the parent's to handle. When the parent is killed it can end nobody: its workers would stay, and
    # hold the lock that they inherited.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

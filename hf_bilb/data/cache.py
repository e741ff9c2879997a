"""A cache of flat, memory-mapped arrays that is computed once, in chunks, by several processes.

    <root>/<name>/              one .npy file per array, and meta.json
    <root>/<name>.partial/      the finished chunks of a preparation that is under way or was interrupted
    <root>/<name>.lock

Chunks and the finished folder are written aside and renamed: what has its final name is complete. The lock is
released by the system when its process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_bilb.errors import OptionError

logger = logging.getLogger(__name__)

META = "meta.json"
Arrays: TypeAlias = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Preparation:
    """How a cache is made.

    Attributes:
        name: of its folder; whatever its contents depend on has to be part of it.
        chunks: gives what there is to do, piece by piece; called when something is left to do.
        compute: a chunk -> its arrays; in another process, so a function of a module, and the chunks are pickled.
        size: a chunk -> how many rows it has, for the progress bar.
        summarize: all arrays, memory-mapped -> what `meta.json` records, plain JSON.
        description: of the progress bar.
        unit: of what it counts.
    """

    name: str
    chunks: Callable[[], Sequence[Any]]
    compute: Callable[[Any], Arrays]
    size: Callable[[Any], int]
    summarize: Callable[[Arrays], dict[str, Any]]
    description: str
    unit: str


def default_root() -> Path:
    """`hf_bilb` in the folder of Hugging Face's caches (`HF_HOME`)."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_bilb"


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare_arrays(
    root: Path, preparation: Preparation, num_workers: int | None = None
) -> tuple[Arrays, dict[str, Any]]:
    """The arrays, memory-mapped and read-only, and what `meta.json` says; computed when they are not there yet.

    An interrupted call leaves its finished chunks to the next one. The files are byte for byte the same whatever the
    number of processes and interruptions. Of several callers one computes, the others wait.

    Cost: memory for a chunk in each process, whatever the size of the arrays (`summarize` may want more); twice their
    size on the disk for a moment, since the chunks stay until the arrays are complete.

    Args:
        root: folder of the cache.
        preparation: what to compute.
        num_workers: processes; None: as many as there are cores; 1: in this process.

    Raises:
        OptionError: the folder cannot be written to (no space left), or a finished cache is damaged; names the folder.
        ValueError: chunks whose arrays differ in more than their number of rows, or the length of their text.
        concurrent.futures.process.BrokenProcessPool: a worker was killed (no memory left); finished chunks are kept.
    """
    folder = root / preparation.name
    if not (folder / META).is_file():
        with contextlib.ExitStack() as stack:
            with _writing(root):
                stack.enter_context(locked(root / f"{preparation.name}.lock", folder))
            if not (folder / META).is_file():  # another process may have been faster
                _prepare(folder, preparation, num_workers or available_cores())
    return read_arrays(folder)


def read_arrays(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """What `prepare_arrays` has written; raises `OptionError` when it is damaged."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        arrays: Arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in meta["arrays"]}
        for name, shape in meta["arrays"].items():
            if list(arrays[name].shape) != shape:
                raise ValueError(f"{name}.npy has shape {list(arrays[name].shape)}, expected {shape}")
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise OptionError(f"{folder}: this cache is damaged ({error}); delete the folder to prepare it again") from None
    return arrays, meta


@contextlib.contextmanager
def locked(file: Path, folder: Path) -> Iterator[None]:
    """Hold the lock on what is prepared in a folder; waits for another process that holds it, and says so.

    Args:
        file: of the lock, empty; stays behind.
        folder: named in the message.
    """
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: waiting for another process that prepares it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(f"data.cache_dir: {str(root)!r} cannot be written to: {error.strerror or error}") from None


# --- computing ----------------------------------------------------------------------------------------------------


def _prepare(folder: Path, preparation: Preparation, num_workers: int) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    chunks = preparation.chunks()
    files = [partial / f"{number:05d}.npz" for number in range(len(chunks))]
    _compute_missing(preparation, chunks, files, num_workers)
    aside = partial / "finished"
    with _writing(folder.parent):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        shapes = _join(files, aside)
    # No name for the arrays: an open file is in the way of the renaming on some systems.
    summary = preparation.summarize({name: np.load(aside / f"{name}.npy", mmap_mode="r") for name in shapes})
    meta = {**summary, "arrays": shapes}
    with _writing(folder.parent):
        (aside / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # without meta.json it is none of ours, or half deleted
    aside.rename(folder)
    shutil.rmtree(partial)


def _compute_missing(preparation: Preparation, chunks: Sequence[Any], files: list[Path], num_workers: int) -> None:
    from tqdm import tqdm

    whole = [_is_whole(file) for file in files]
    todo = [number for number, done in enumerate(whole) if not done]
    with tqdm(
        total=sum(map(preparation.size, chunks)),
        initial=sum(preparation.size(chunk) for chunk, done in zip(chunks, whole, strict=True) if done),
        desc=preparation.description,
        unit=f" {preparation.unit}",
    ) as bar:
        jobs = [
            (preparation.compute, chunks[number], files[number], preparation.size(chunks[number])) for number in todo
        ]
        for size in run_jobs(_work, jobs, num_workers):
            bar.update(size)


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


def _work(job: tuple[Callable[[Any], Arrays], Any, Path, int]) -> int:
    compute, chunk, file, size = job
    arrays = compute(chunk)
    aside = file.with_suffix(".tmp")
    with _writing(file.parent.parent):
        with aside.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        aside.replace(file)
    return size


def _is_whole(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


# --- joining ------------------------------------------------------------------------------------------------------

# Shape and type of each array.
_Layout: TypeAlias = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


def _join(files: Sequence[Path], folder: Path) -> dict[str, list[int]]:
    """Write each array of the chunks into a `.npy` file, with one of them in memory at a time; the arrays' shapes."""
    whole = _joined_layout(files)
    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in whole}
        for name, (shape, dtype) in whole.items():
            # As np.save does. A plain file and no memory map: its pages would count as this process's memory.
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(streams[name], header)
        for file in files:
            with np.load(file) as chunk:
                for name, (_, dtype) in whole.items():
                    streams[name].write(np.ascontiguousarray(chunk[name], dtype).data)
    return {name: list(shape) for name, (shape, _) in whole.items()}


def _joined_layout(files: Sequence[Path]) -> _Layout:
    layouts = [_layout(file) for file in files]
    whole = layouts[0]
    for file, layout in zip(files[1:], layouts[1:], strict=True):
        if list(layout) != list(whole):
            raise ValueError(f"{file}: has the arrays {', '.join(layout)}, {files[0].name} has {', '.join(whole)}")
        for name, (shape, dtype) in layout.items():
            rows, before = whole[name][0], whole[name][1]
            # Of text the longest one says how long an item is.
            alike = dtype == before or dtype.kind == before.kind in "SU"
            if not alike or len(shape) == 0 or shape[1:] != rows[1:]:
                raise ValueError(
                    f"{file}: {name} is {dtype} {list(shape)}, expected {before} and the shape of the others but for "
                    f"the first number, {list(rows)}"
                )
            whole[name] = (rows[0] + shape[0], *rows[1:]), max(dtype, before, key=lambda one: one.itemsize)
    return whole


def _layout(file: Path) -> _Layout:
    """From the headers of the arrays alone."""
    found: _Layout = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            found[member.removesuffix(".npy")] = shape, dtype
    return found

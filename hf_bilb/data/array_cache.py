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
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_bilb.options import OptionError

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
        summarize: all arrays -> what `meta.json` records, plain JSON.
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

    Args:
        root: folder of the cache.
        preparation: what to compute.
        num_workers: processes; None: as many as there are cores; 1: in this process.

    Raises:
        OptionError: the folder cannot be written to, or a finished cache is damaged; names the folder.
        concurrent.futures.process.BrokenProcessPool: a worker was killed (no memory left); finished chunks are kept.
    """
    folder = root / preparation.name
    if not (folder / META).is_file():
        with _locked(root, preparation.name):
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
def _locked(root: Path, name: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(root / f"{name}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("%s: waiting for another process that prepares it", root / name)
            lock.acquire()
    except OSError as error:
        raise OptionError(f"data.cache_dir: {str(root)!r} cannot be written to: {error}") from None
    try:
        yield
    finally:
        lock.release()


# --- computing ----------------------------------------------------------------------------------------------------


def _prepare(folder: Path, preparation: Preparation, num_workers: int) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    chunks = preparation.chunks()
    files = [partial / f"{number:05d}.npz" for number in range(len(chunks))]
    _compute_missing(preparation, chunks, files, num_workers)
    parts = [_read_chunk(file) for file in files]
    whole: Arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    aside = partial / "finished"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, array in whole.items():
        np.save(aside / f"{name}.npy", array)
    meta = {**preparation.summarize(whole), "arrays": {name: list(array.shape) for name, array in whole.items()}}
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
        for future in as_completed([executor.submit(work, job) for job in jobs]):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


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
    aside = file.with_suffix(".tmp")
    with aside.open("wb") as stream:
        np.savez(stream, **compute(chunk))  # type: ignore[arg-type]
    aside.replace(file)
    return size


def _is_whole(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _read_chunk(file: Path) -> Mapping[str, NDArray[Any]]:
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}

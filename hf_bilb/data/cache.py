"""A cache of memory-mapped arrays that are computed once, chunk by chunk, whatever interrupts it.

    <root>/<name>/              one .npy file per array
    <root>/<name>.partial/      the finished chunks of a preparation that is under way or was interrupted
    <root>/<name>.lock

There are two ways of computing. `prepare_arrays` is for arrays whose lengths come out on the way: several processes
make chunks, which are joined at the end, and `meta.json` tells that they are complete; whatever the contents depend on
is part of the name. `prepare_rows` is for one array of a shape that is known: it is written in place, `finished.txt`
has the finished chunks on record, each with the fingerprint of what it was made of, and a chunk whose fingerprint
has changed is made again; its lock lies in its folder.

What is written has its final name when it is complete: it is written aside and renamed. The lock is released by the
system when its process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.jobs import available_cores, run_jobs
from hf_bilb.errors import OptionError

logger = logging.getLogger(__name__)

META = "meta.json"
Arrays: TypeAlias = dict[str, NDArray[Any]]


# --- where it lies ------------------------------------------------------------------------------------------------


def default_root() -> Path:
    """`hf_bilb` in the folder of Hugging Face's caches (`HF_HOME`)."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_bilb"


def cache_root(cache_dir: str | None) -> Path:
    """The folder that an option `cache_dir` names; None: `default_root`."""
    return default_root() if cache_dir is None else Path(cache_dir)


def short_hash(text: str) -> str:
    """16 hexadecimal digits that change with the text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint(parts: Sequence[object]) -> str:
    """16 hexadecimal digits that change with any of the parts."""
    return short_hash("\n".join(map(repr, parts)))


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> size in bytes and time of change in nanoseconds, of the files of a folder; 200,000 in about a second."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                facts = entry.stat()
                found[entry.name] = (facts.st_size, facts.st_mtime_ns)
    return found


# --- how it is written --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_aside(file: Path, ending: str = ".tmp") -> Iterator[Path]:
    """A file to write in place of `file`, which it becomes when all went well.

    For what is written under a folder's lock and can be made again, unlike `hf_bilb.storage.writing`: the name is
    always the same, so that the next attempt overwrites what a kill has left, and nothing waits for the disk.
    """
    aside = file.with_suffix(ending)
    yield aside
    os.replace(aside, file)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns an error of the disk into an `OptionError`: `what`, and the reason."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"{what}: {error.strerror or error}") from None


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


# --- arrays that are joined from chunks ---------------------------------------------------------------------------


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


def _writing(root: Path) -> contextlib.AbstractContextManager[None]:
    return writing(f"data.cache_dir: {str(root)!r} cannot be written to")


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


def _work(job: tuple[Callable[[Any], Arrays], Any, Path, int]) -> int:
    compute, chunk, file, size = job
    arrays = compute(chunk)
    with _writing(file.parent.parent), written_aside(file) as aside, aside.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    return size


def _is_whole(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


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


# --- one array that is written in place ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RowPreparation:
    """How a cache of one array is made.

    Attributes:
        name: of its folder: changes with the list of what the rows are made of, not with what is in it.
        array: name of the array.
        row_shape: of the array `[N, *row_shape]`, of bytes.
        chunks: the rows that are made, and then written, together.
        fingerprints: of each chunk; changes when what it is made of does.
        compute: a chunk -> its rows, uint8 `[.., *row_shape]`.
        description: of the progress bar.
        unit: of what it counts.
    """

    name: str
    array: str
    row_shape: tuple[int, ...]
    chunks: Sequence[range]
    fingerprints: Sequence[str]
    compute: Callable[[range], NDArray[np.uint8]]
    description: str
    unit: str


def prepare_rows(root: Path, preparation: RowPreparation) -> Path:
    """The `.npy` file, for `np.load(..., mmap_mode="r")`; what is missing or has changed in it is computed.

    An interrupted call leaves its finished chunks to the next one, and no file that looks complete. Of several callers
    one computes, the others wait.

    Args:
        root: folder of the cache.
        preparation: what to compute.

    Raises:
        OptionError: the folder cannot be written to; names it.

    Cost: memory for a chunk; the size of the array on the disk.
    """
    cache = _RowCache(root / preparation.name, preparation)
    if cache.is_complete():
        return cache.file
    with writing(f"data.cache_dir: {str(cache.folder)!r} cannot be written"):
        cache.folder.mkdir(parents=True, exist_ok=True)
        with locked(cache.folder / "lock", cache.folder):
            if not cache.is_complete():  # another process may have written it meanwhile
                cache.fill()
    return cache.file


class _RowCache:
    """A folder with `<array>.npy` (`<array>.npy.part` until it is complete) and `finished.txt`."""

    def __init__(self, folder: Path, preparation: RowPreparation) -> None:
        self.folder = folder
        self.preparation = preparation
        self.file = folder / f"{preparation.array}.npy"
        self._part = folder / f"{preparation.array}.npy.part"
        self._record = folder / "finished.txt"

    def is_complete(self) -> bool:
        return self.file.is_file() and not self._unfinished()

    def _unfinished(self) -> list[int]:
        """Numbers of the chunks that are not on record as they are now."""
        lines = self._record.read_text(encoding="ascii").splitlines() if self._record.is_file() else []
        # Later lines are newer. A line that was cut off has no fingerprint of ours.
        finished = dict(words for words in (line.split() for line in lines) if len(words) == 2)
        return [number for number, now in enumerate(self.preparation.fingerprints) if finished.get(str(number)) != now]

    def fill(self) -> None:
        """Compute what is missing; the caller holds the lock."""
        from tqdm.auto import tqdm

        preparation = self.preparation
        offset = self._open_part()
        unfinished = self._unfinished()
        rows = sum(len(preparation.chunks[number]) for number in unfinished)
        row_bytes = math.prod(preparation.row_shape)
        logger.info("%s: %s: %d of %d", self.folder, preparation.description, rows, self._num_rows())
        # Written, not mapped: on a full disk a write says so, and a mapped page kills the process.
        with (
            open(self._part, "r+b") as stream,
            open(self._record, "a", encoding="ascii") as record,
            tqdm(total=rows, desc=preparation.description, unit=preparation.unit, leave=False) as bar,
        ):
            for number in unfinished:
                chunk = preparation.chunks[number]
                values = preparation.compute(chunk)
                stream.seek(offset + chunk.start * row_bytes)
                stream.write(values.tobytes())
                stream.flush()
                os.fsync(stream.fileno())  # on the disk before it is on record
                record.write(f"{number} {preparation.fingerprints[number]}\n")
                record.flush()
                bar.update(len(chunk))
        os.replace(self._part, self.file)

    def _num_rows(self) -> int:
        return sum(map(len, self.preparation.chunks))

    def _open_part(self) -> int:
        """See to it that the file aside is there; returns where its rows begin, in bytes."""
        if self.file.is_file():  # complete, but some rows are others now
            os.replace(self.file, self._part)
        if not self._part.is_file():
            self._record.unlink(missing_ok=True)
            shape = (self._num_rows(), *self.preparation.row_shape)
            with written_aside(self._part, ".new") as aside:
                np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape).flush()
        return int(np.load(self._part, mmap_mode="r").offset)

"""The array cache: the same bytes whatever happens on the way, and never half a cache."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from hf_bilb.data import cache as array_cache
from hf_bilb.data import jobs
from hf_bilb.data.cache import META, Arrays, Preparation, prepare_arrays
from hf_bilb.errors import OptionError
from tests.processes import group_is_gone, wait_for

CHUNKS = 12


def squares(chunk: tuple[int, str]) -> Arrays:
    """Rows of different lengths; leaves a trace of its work in a file, by which a test counts it."""
    number, trace = chunk
    with Path(trace).open("a", encoding="utf-8") as stream:
        stream.write(f"{number}\n")
    return {"number": np.full(number + 1, number), "square": np.full((number + 1, 2), number**2, np.float32)}


def slow_squares(chunk: tuple[int, str]) -> Arrays:
    with Path(f"{chunk[1]}-started").open("a", encoding="utf-8") as stream:
        stream.write(f"{chunk[0]}\n")
    time.sleep(0.15)
    return squares(chunk)


def failing_squares(chunk: tuple[int, str]) -> Arrays:
    if chunk[0] == 7:
        raise KeyboardInterrupt
    return squares(chunk)


def dying_squares(chunk: tuple[int, str]) -> Arrays:
    if chunk[0] == 7:
        os._exit(1)
    return squares(chunk)


def preparation(trace: Path, compute: object = squares) -> Preparation:
    return Preparation(
        name="made-up",
        chunks=lambda: [(number, str(trace)) for number in range(CHUNKS)],
        compute=compute,  # type: ignore[arg-type]
        size=lambda chunk: chunk[0] + 1,
        summarize=lambda arrays: {"total": int(arrays["number"].sum())},
        description="made up",
        unit="rows",
    )


def computed(trace: Path) -> list[int]:
    return [int(line) for line in trace.read_text(encoding="utf-8").split()] if trace.exists() else []


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "made-up").iterdir())}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("expected")
    prepare_arrays(root, preparation(root / "trace"), num_workers=1)
    return contents(root)


def test_arrays_are_joined_in_order_and_memory_mapped(tmp_path: Path, trace: Path) -> None:
    arrays, meta = prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    numbers = np.repeat(np.arange(CHUNKS), np.arange(CHUNKS) + 1)
    np.testing.assert_array_equal(arrays["number"], numbers)
    np.testing.assert_array_equal(arrays["square"], np.stack([numbers**2] * 2, axis=1).astype(np.float32))
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays.values())
    assert meta["total"] == numbers.sum()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made-up", "made-up.lock", "trace"]


def test_a_second_call_computes_nothing_and_does_not_even_ask_what_there_is(tmp_path: Path, trace: Path) -> None:
    first, _ = prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    again = preparation(trace)
    object.__setattr__(again, "chunks", lambda: pytest.fail("asked for the chunks"))
    second, _ = prepare_arrays(tmp_path, again, num_workers=1)
    np.testing.assert_array_equal(first["number"], second["number"])
    assert computed(trace) == list(range(CHUNKS))


def test_the_files_are_the_same_bytes_with_several_processes(
    tmp_path: Path, trace: Path, expected: dict[str, bytes]
) -> None:
    prepare_arrays(tmp_path, preparation(trace), num_workers=3)
    assert sorted(computed(trace)) == list(range(CHUNKS))
    assert contents(tmp_path) == expected


def test_an_interrupted_preparation_keeps_its_finished_chunks(
    tmp_path: Path, trace: Path, expected: dict[str, bytes]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_arrays(tmp_path, preparation(trace, failing_squares), num_workers=1)
    assert not (tmp_path / "made-up").exists()
    assert computed(trace) == list(range(7))
    prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    assert computed(trace) == list(range(CHUNKS))  # each once
    assert contents(tmp_path) == expected
    assert not (tmp_path / "made-up.partial").exists()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half a file", None])
def test_a_damaged_chunk_is_computed_again(
    tmp_path: Path, trace: Path, expected: dict[str, bytes], damage: bytes | None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_arrays(tmp_path, preparation(trace, failing_squares), num_workers=1)
    file = tmp_path / "made-up.partial" / "00003.npz"
    whole = file.read_bytes()
    number = whole.index(np.full(4, 3).tobytes())
    file.write_bytes(whole[:number] + b"\x04" + whole[number + 1 :] if damage is None else damage)
    prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    assert sorted(computed(trace)) == sorted([*range(CHUNKS), 3])
    assert contents(tmp_path) == expected


# --- joining ------------------------------------------------------------------------------------------------------


def given(chunk: Arrays) -> Arrays:
    return chunk


def of(chunks: list[Arrays], compute: object = given) -> Preparation:
    return Preparation(
        name="made-up",
        chunks=lambda: chunks,
        compute=compute,  # type: ignore[arg-type]
        size=lambda chunk: 1,
        summarize=lambda arrays: {},
        description="made up",
        unit="chunks",
    )


def test_the_files_are_those_that_numpy_saves_of_the_joined_arrays(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    chunks: list[Arrays] = [
        {
            "image": np.asfortranarray(generator.random((rows, 2, 3))),
            "known": generator.random(rows) < 0.5,
            "class": generator.integers(0, 9, (rows, 4, 0), dtype=np.int8),
            "name": np.array(["x" * (rows + k) for k in range(rows)], np.str_),
            "bytes": np.array([b"y" * k for k in range(rows)], np.bytes_),
        }
        for rows in (2, 0, 5, 1)
    ]
    arrays, _ = prepare_arrays(tmp_path, of(chunks), num_workers=1)
    assert list(arrays) == list(chunks[0])
    for name, array in arrays.items():
        whole = np.ascontiguousarray(np.concatenate([chunk[name] for chunk in chunks]))
        np.save(tmp_path / "expected.npy", whole)
        assert (tmp_path / "made-up" / f"{name}.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
        np.testing.assert_array_equal(array, whole)


MEGABYTE = 2**20


def megabytes(number: int) -> Arrays:
    return {"values": np.full((2, MEGABYTE), number, np.int8), "number": np.array([number, number])}


def test_preparing_needs_the_memory_of_a_chunk_and_not_of_the_arrays(tmp_path: Path) -> None:
    chunks = preparation(tmp_path / "trace", megabytes)
    object.__setattr__(chunks, "chunks", lambda: list(range(32)))
    object.__setattr__(chunks, "size", lambda chunk: 1)
    tracemalloc.start()
    try:
        arrays, meta = prepare_arrays(tmp_path, chunks, num_workers=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert arrays["values"].nbytes == 64 * MEGABYTE and meta["total"] == 2 * sum(range(32))
    assert arrays["values"][:, 7].tolist() == [number for number in range(32) for _ in range(2)]
    assert peak < 8 * MEGABYTE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.zeros((4, 2))}, r"00001\.npz: a is float64 \[4, 2\], expected float32 .* \[3, 2\]"),
        ({"a": np.zeros((4, 3), np.float32)}, r"00001\.npz: a is float32 \[4, 3\], expected float32 .* \[3, 2\]"),
        ({"a": np.float32(1)}, r"00001\.npz: a is float32 \[\], expected float32 .* \[3, 2\]"),
        ({"c": np.zeros(4)}, r"00001\.npz: has the arrays a, b, c, 00000\.npz has a, b"),
    ],
)
def test_chunks_that_do_not_fit_together_are_one_line(tmp_path: Path, change: Arrays, message: str) -> None:
    first: Arrays = {"a": np.zeros((3, 2), np.float32), "b": np.zeros(3)}
    second: Arrays = {"a": np.zeros((4, 2), np.float32), "b": np.zeros(4), **change}
    with pytest.raises(ValueError, match=message) as error:
        prepare_arrays(tmp_path, of([first, second]), num_workers=1)
    assert "\n" not in str(error.value) and not (tmp_path / "made-up").exists()


def test_an_interruption_while_joining_loses_no_chunk(
    tmp_path: Path, trace: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, opened = np.load, []

    def interrupted(file: Path, **options: object) -> object:
        opened.append(file)
        if len(opened) == 5:
            raise KeyboardInterrupt
        return load(file, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(array_cache.np, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    assert opened[-1].name == "00004.npz" and (tmp_path / "made-up.partial" / "finished" / "number.npy").is_file()
    assert not (tmp_path / "made-up").exists()
    prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    assert computed(trace) == list(range(CHUNKS))  # each once
    assert contents(tmp_path) == expected


# --- processes ----------------------------------------------------------------------------------------------------


def start(root: Path, trace: Path, compute: object) -> int:
    """A preparation by two workers in a process group of its own, as a terminal gives one to a command."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # tests run in the background inherit its absence
            prepare_arrays(root, preparation(trace, compute), num_workers=2)
            status = 0
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    return process


def exit_status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")


@needs_fork
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_killed_preparation_leaves_no_process_and_no_lock_and_is_taken_up_again(
    tmp_path: Path, trace: Path, expected: dict[str, bytes], capfd: pytest.CaptureFixture[str], how: str
) -> None:
    process = start(tmp_path, trace, slow_squares)
    partial = tmp_path / "made-up.partial"
    wait_for(lambda: len(list(partial.glob("*.npz"))) >= 3)
    if how == "kill":
        os.kill(process, signal.SIGKILL)  # the parent alone: nobody is left to end its workers
    else:
        os.killpg(process, signal.SIGINT)  # all of them, as Ctrl-C does
    assert exit_status(process) == (-signal.SIGKILL if how == "kill" else 130)
    wait_for(lambda: group_is_gone(process))
    assert "Traceback" not in capfd.readouterr().err  # workers are silent
    assert not (tmp_path / "made-up").exists()
    kept = len(list(partial.glob("*.npz")))
    assert how == "kill" or kept == len(computed(tmp_path / "trace-started"))  # chunks under way are finished
    before = len(computed(trace))
    started = time.monotonic()
    prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    assert time.monotonic() - started < 10  # the lock was free
    assert len(computed(trace)) - before == CHUNKS - kept < CHUNKS - 2
    assert contents(tmp_path) == expected


def slow_start(trace: Path, original: Callable[[], None]) -> None:
    """A worker that takes its time, as one that imports torch does, before it is told what to do with an interrupt."""
    for word in ("began", "ended"):
        with trace.open("a", encoding="utf-8") as stream:
            stream.write(f"{word}\n")
        if word == "began":
            time.sleep(0.3)
    original()


@needs_fork
def test_an_interrupt_while_workers_start_is_silent_too(
    tmp_path: Path, trace: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = tmp_path / "steps"
    steps.touch()
    monkeypatch.setattr(jobs, "_start_worker", functools.partial(slow_start, steps, jobs._start_worker))
    process = start(tmp_path, trace, slow_squares)
    wait_for(lambda: steps.read_text(encoding="utf-8") == "began\n" * 2)
    os.killpg(process, signal.SIGINT)
    assert exit_status(process) == 130
    wait_for(lambda: group_is_gone(process))
    assert "Traceback" not in capfd.readouterr().err
    assert steps.read_text(encoding="utf-8") == "began\n" * 2 + "ended\n" * 2  # no interrupt came to a worker
    prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    assert sorted(computed(trace)) == list(range(CHUNKS))


@needs_fork
@pytest.mark.parametrize("limit", [600, 720])  # of a file: the last chunks are larger, then the joined arrays alone
def test_no_space_left_is_one_line_and_loses_no_chunk(
    tmp_path: Path, trace: Path, expected: dict[str, bytes], limit: int
) -> None:
    import resource  # not on Windows

    message = tmp_path / "message"
    process = os.fork()
    if process == 0:
        try:
            stream = message.open("wb", buffering=0)
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            prepare_arrays(tmp_path, preparation(trace), num_workers=2)
        except OptionError as error:
            stream.write(str(error).encode())
        finally:
            os._exit(0)
    assert exit_status(process) == 0
    found = message.read_text(encoding="utf-8")
    assert found == f"data.cache_dir: {str(tmp_path)!r} cannot be written to: File too large"
    kept = len(list((tmp_path / "made-up.partial").glob("*.npz")))
    assert kept == CHUNKS if limit == 720 else 2 < kept < CHUNKS
    before = len(computed(trace))
    prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    assert len(computed(trace)) - before == CHUNKS - kept
    assert contents(tmp_path) == expected


@needs_fork
def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path: Path, trace: Path, expected: dict[str, bytes]) -> None:
    with pytest.raises(BrokenProcessPool):
        prepare_arrays(tmp_path, preparation(trace, dying_squares), num_workers=2)
    prepare_arrays(tmp_path, preparation(trace), num_workers=2)
    assert contents(tmp_path) == expected


@needs_fork
def test_of_two_processes_that_start_at_once_one_computes_and_both_have_it(
    tmp_path: Path, trace: Path, expected: dict[str, bytes]
) -> None:
    assert [exit_status(process) for process in [start(tmp_path, trace, slow_squares) for _ in range(2)]] == [0, 0]
    assert sorted(computed(trace)) == list(range(CHUNKS))
    assert contents(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "damage"),
    [(META, b"{"), (META, b"{}"), ("number.npy", b""), ("number.npy", None), ("square.npy", "truncated")],
)
def test_a_damaged_cache_is_one_line_that_names_the_folder(
    tmp_path: Path, trace: Path, name: str, damage: bytes | str | None
) -> None:
    prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    file = tmp_path / "made-up" / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8] if isinstance(damage, str) else damage)
    with pytest.raises(
        OptionError, match=f"^{re.escape(str(tmp_path / 'made-up'))}: this cache is damaged .*delete the folder"
    ) as error:
        prepare_arrays(tmp_path, preparation(trace), num_workers=1)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_one_line_that_names_it(tmp_path: Path, trace: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder", encoding="utf-8")
    for root in (occupied, occupied / "below"):
        with pytest.raises(OptionError, match=r"data\.cache_dir: .*file.* cannot be written to") as error:
            prepare_arrays(root, preparation(trace), num_workers=1)
        assert "\n" not in str(error.value)

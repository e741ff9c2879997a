"""The array cache: the same bytes whatever happens on the way, and never half a cache."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from hf_bilb.data.array_cache import META, Arrays, Preparation, prepare_arrays
from hf_bilb.options import OptionError

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


def wait_for(condition: object, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "took too long"
        time.sleep(0.01)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


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

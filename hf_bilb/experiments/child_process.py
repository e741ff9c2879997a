"""One run of a comparison in a process of its own: its output in a log, and an end that is polite."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import click

_LAST_LINES = 12  # of a failed run's output, printed
_ESCAPES = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]")  # a bar's moves of the cursor
_SECONDS_TO_STOP = 40  # for a launcher to end its processes, before they are killed


class Interrupted(Exception):
    """The comparison was told to stop; `signal_number` by which signal. The message says where it stands."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class _Stop(BaseException):
    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted(message)`; the handlers from before come back at the end."""

    def stop(number: int, frame: Any) -> None:
        raise _Stop(number)

    numbers = [signal.SIGINT, signal.SIGTERM, *([] if sys.platform == "win32" else [signal.SIGHUP])]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except _Stop as stopped:
        raise Interrupted(message, stopped.signal_number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (below 0: minus a signal), seconds, last lines of its output."""

    code: int
    seconds: float
    last_lines: list[str]


def run_process(arguments: Sequence[str], log: Path, lock: int | None) -> Ended:
    """A command to its end; its output goes into `log`, and to the terminal where there is one.

    Args:
        arguments: the command.
        log: a file that is appended to; its folder is made.
        lock: the descriptor of a lock that the process holds, too.
    """
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    to_terminal = sys.stdout.isatty()
    size = shutil.get_terminal_size()
    environment = {**os.environ, "COLUMNS": str(size.columns), "LINES": str(size.lines)} if to_terminal else None
    with log.open("ab") as file:
        lines = _LogLines(file)
        lines.write(f"$ {shlex.join(arguments)}\n".encode())
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            # Its own group: Ctrl-C comes here first, and a launcher is stopped together with its processes.
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
        assert process.stdout is not None
        try:
            while block := os.read(process.stdout.fileno(), 65536):
                lines.write(block)
                if to_terminal:
                    sys.stdout.buffer.write(block)
                    sys.stdout.buffer.flush()
            code = process.wait()
        finally:
            _stop(process)
            process.stdout.close()
            lines.close()
    return Ended(code, time.monotonic() - started, lines.last)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, first politely; nothing when it has ended."""
    if process.poll() is not None:
        return
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(_SECONDS_TO_STOP)
    except (subprocess.TimeoutExpired, _Stop):  # asked to stop a second time
        pass
    finally:
        if process.poll() is None:
            _signal_group(process, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if sys.platform == "win32":
        process.terminate()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


class _LogLines:
    """Writes a program's output line by line, of a progress bar only what stands there at the end of its line."""

    def __init__(self, file: IO[bytes]) -> None:
        self.last: list[str] = []
        self._file = file
        self._pending = b""

    def write(self, block: bytes) -> None:
        *lines, self._pending = (self._pending + block).split(b"\n")
        for line in lines:
            self._put(line)
        if b"\r" in self._pending[:-1]:
            self._pending = self._pending[self._pending[:-1].rindex(b"\r") :]
        self._file.flush()

    def close(self) -> None:
        if self._pending.strip():
            self._put(self._pending)
        self._pending = b""

    def _put(self, line: bytes) -> None:
        shown = _ESCAPES.sub(b"", line.rstrip(b"\r")).rpartition(b"\r")[2]
        if not shown.strip() and shown != line:
            return  # a bar that was wiped away
        self._file.write(shown + b"\n")
        text = shown.decode("utf-8", errors="replace").rstrip()
        if text:
            self.last = [*self.last, text][-_LAST_LINES:]


def say_failed(where: str, ended: Ended, log: Path) -> None:
    """Print how the process ended, and the last lines of its output."""
    how = f"exit code {ended.code}" if ended.code >= 0 else f"signal {signal.Signals(-ended.code).name}"
    lines = "".join(f"    {line}\n" for line in ended.last_lines)
    click.echo(f"{where}: FAILED with {how}; the last lines of {log}:\n{lines}", nl=False)

"""`hf-bilb compare`: trains the cells, one after the other, each in its own process, and puts the results together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import click

from hf_bilb.config.options import nearest, shown
from hf_bilb.errors import FolderInUseError, OptionError, one_line
from hf_bilb.experiments.plan import (
    LOG_FILE,
    SINGLE_TASK,
    Cell,
    parse_balancers,
    parse_seeds,
    plan_cells,
    state_of,
    task_names,
)
from hf_bilb.experiments.recipe import Recipe, dump_recipe, read_recipe
from hf_bilb.reporting.results import RunResults, read_results, write_text
from hf_bilb.reporting.study import Runs, Study, make_study
from hf_bilb.reporting.study_notes import study_notes
from hf_bilb.reporting.study_tables import (
    render_study_csv,
    render_study_json,
    render_study_latex,
    render_study_markdown,
    render_study_text,
)
from hf_bilb.storage import folder_lock
from hf_bilb.storage.folders import check_output_folder, make_output_folder

_LAST_LINES = 12  # of a failed cell's output, printed
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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is to be compared, checked.

    Attributes:
        recipe: the recipe that all cells share.
        cells: in the order in which they run.
        labels: of the methods, in the order of the tables.
        seeds: of each method.
        reference: label of the method that the others are related to.
        output: its folder.
        command: what a cell's arguments are appended to.
        split_by_seed: each seed splits the data in its own way.
    """

    recipe: Recipe
    cells: tuple[Cell, ...]
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: str
    output: Path
    command: tuple[str, ...]
    split_by_seed: bool = False


def plan(
    recipe: str | Path,
    overrides: Sequence[str],
    *,
    balancers: str,
    seeds: str,
    single_tasks: bool = False,
    output: str | None = None,
    launcher: str | None = None,
    reference: str | None = None,
    split_by_seed: bool = False,
) -> Comparison:
    """Check everything that is asked for, every cell included; nothing is written or started.

    Args:
        recipe, overrides: what all cells share.
        balancers, seeds: lists with commas, see `parse_balancers` and `parse_seeds`.
        single_tasks: train each task alone, too; loads the data once when the recipe does not name its tasks.
        output: default `trainer.output_dir` with `_compare` behind it.
        launcher: command before `-m hf_bilb train`, such as `accelerate launch --num_processes 2`; default this Python.
        reference: label that the others are related to; default `ls` where it is there, else the first.
        split_by_seed: the seed also splits the data.

    Raises:
        OptionError: at the first thing that is wrong.
    """
    shared = read_recipe(recipe, overrides)
    asked = parse_balancers(balancers, shared.balancer)
    labels = tuple(balancer.label for balancer in asked)
    numbers = parse_seeds(seeds)
    if reference is not None and reference not in labels:
        raise OptionError(f"--base: {shown(reference)} is none of {', '.join(labels)}{nearest(reference, labels)}")
    folder = _folder(output, shared)
    command = _command(launcher)
    plan_cells(recipe, overrides, folder, asked, numbers[:1], split_by_seed=split_by_seed)  # before data are loaded
    tasks = task_names(shared) if single_tasks else ()
    cells = plan_cells(recipe, overrides, folder, asked, numbers, tasks, split_by_seed)
    base = reference or ("ls" if "ls" in labels else labels[0])
    return Comparison(shared, tuple(cells), labels, numbers, base, folder, command, split_by_seed)


def _folder(output: str | None, shared: Recipe) -> Path:
    if output is None and not shared.output_dir.name:
        raise OptionError(
            f"--output: is required, since trainer.output_dir {shown(str(shared.output_dir))} has no name"
        )
    folder = Path(output) if output is not None else shared.output_dir.with_name(f"{shared.output_dir.name}_compare")
    check_output_folder(folder, "--output")
    return folder


def _command(launcher: str | None) -> tuple[str, ...]:
    try:
        words = [sys.executable] if launcher is None else shlex.split(launcher)
    except ValueError as error:
        raise OptionError(f"--launcher: {shown(launcher)} is no command: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise OptionError(f"--launcher: {shown(launcher)} begins with no command that is found")
    return (*words, "-m", "hf_bilb", "train")


# ---------------------------------------------------------------------------------------------------- running


def run_comparison(comparison: Comparison) -> tuple[Study | None, list[Cell]]:
    """Train every cell that is not finished, write the tables and plots into the folder and print the table.

    Returns:
        the study of what is finished (None without any finished cell) and the cells that failed.

    Raises:
        OptionError, CheckpointError, StorageError: a cell's folder holds something else; before the first cell starts.
        Interrupted: by SIGINT or a request to end; the running cell is stopped.
    """
    make_output_folder(comparison.output, "--output")
    with _alone(comparison.output) as lock:
        states = [state_of(cell) for cell in comparison.cells]
        shared = comparison.output / f"{comparison.recipe.name}.yaml"
        write_text(shared, f"# what all cells of this comparison share\n{dump_recipe(comparison.recipe)}")
        clock = _Estimate()
        failed: list[Cell] = []
        for i, (cell, state) in enumerate(zip(comparison.cells, states, strict=True)):
            where = f"[{i + 1}/{len(states)}] {cell.title}"
            if state == "finished":
                click.echo(f"{where}: is finished")
                continue
            rest = [later for later, its in zip(comparison.cells[i:], states[i:], strict=True) if its != "finished"]
            click.echo(f"{where}: {'goes on' if state == 'resume' else 'begins'}{clock.describe(rest)}")
            resume = ("--resume",) if state == "resume" else ()
            arguments = (*comparison.command, str(shared), *cell.overrides, *resume)
            with _interruptible(f"stopped in {where}: the same command goes on from there"):
                ended = _run(arguments, cell.folder / LOG_FILE, lock)
            clock.add(cell, ended.seconds)
            if ended.code == 0:
                click.echo(f"{where}: done in {_duration(ended.seconds)}")
            else:
                failed.append(cell)
                _say_failed(where, ended, cell.folder / LOG_FILE)
        return _report(comparison), failed


@dataclasses.dataclass(frozen=True)
class _Ended:
    code: int
    seconds: float
    last_lines: list[str]


def _run(arguments: Sequence[str], log: Path, lock: int | None) -> _Ended:
    """One cell to its end; its output goes into `log`, and to the terminal where there is one."""
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
    return _Ended(code, time.monotonic() - started, lines.last)


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


def _say_failed(where: str, ended: _Ended, log: Path) -> None:
    how = f"exit code {ended.code}" if ended.code >= 0 else f"signal {signal.Signals(-ended.code).name}"
    lines = "".join(f"    {line}\n" for line in ended.last_lines)
    click.echo(f"{where}: FAILED with {how}; the last lines of {log}:\n{lines}", nl=False)


class _Estimate:
    """How long the rest takes, from the cells that have run; a model of one task is another kind of cell."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def add(self, cell: Cell, seconds: float) -> None:
        self._seconds[bool(cell.task)].append(seconds)

    def describe(self, rest: Sequence[Cell]) -> str:
        known = [*self._seconds[True], *self._seconds[False]]
        if not known:
            return ""
        means = {kind: sum(own) / len(own) if own else sum(known) / len(known) for kind, own in self._seconds.items()}
        to_go = sum(means[bool(cell.task)] for cell in rest)
        return f" ({_duration(time.monotonic() - self._started)} so far, about {_duration(to_go)} to go)"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def _interruptible(message: str) -> Iterator[None]:
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


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int | None]:
    """Hold the folder's lock; two comparisons in one folder would train the same cells.

    The running cell holds it, too, so that one that outlives a killed comparison is not started a second time.
    """
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context(folder_lock.hold(folder))
        except FolderInUseError as error:
            raise OptionError(f"--output: in {str(folder)!r} a comparison is running ({error})") from None
        yield lock


# ---------------------------------------------------------------------------------------------------- results


def collect(comparison: Comparison) -> tuple[dict[str, Runs], dict[str, Runs]]:
    """The finished cells: label -> seed -> results, in the order of the tables; and task -> seed -> results."""
    methods: dict[str, dict[int, RunResults]] = {label: {} for label in comparison.labels}
    single: dict[str, dict[int, RunResults]] = {}
    for cell in comparison.cells:
        of_cell = single.setdefault(cell.task, {}) if cell.label == SINGLE_TASK else methods[cell.label]
        if state_of(cell) == "finished":
            of_cell[cell.seed] = read_results(cell.folder)
    return dict(methods), dict(single)


def _report(comparison: Comparison) -> Study | None:
    methods, single = collect(comparison)
    if not any(methods.values()):
        return None
    study = make_study(methods, single, comparison.reference)
    notes = study_notes(study, methods, comparison.seeds, comparison.split_by_seed)
    study = dataclasses.replace(study, notes=(*notes, *study.notes))
    written = write_study(study, comparison.output, _histories(comparison, methods))
    click.echo(f"\n{render_study_text(study)}")
    click.echo(f"wrote {', '.join(map(str, written))}")
    return study


def _histories(comparison: Comparison, methods: Mapping[str, Runs]) -> dict[str, list[list[dict[str, Any]]]]:
    """Label -> the log history of each of its finished cells."""
    histories: dict[str, list[list[dict[str, Any]]]] = {label: [] for label, runs in methods.items() if runs}
    for cell in comparison.cells:
        path = cell.folder / "trainer_state.json"
        if cell.seed in methods.get(cell.label, {}) and path.is_file():
            try:
                histories[cell.label].append(json.loads(path.read_text(encoding="utf-8"))["log_history"])
            except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
                click.echo(f"{path}: cannot be read, left out of progress.png: {one_line(error, 200)}", err=True)
    return histories


def write_study(
    study: Study, folder: Path, histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
) -> list[Path]:
    """Write `comparison.md`, `.csv`, `.tex`, `.json` and the plots; returns their paths."""
    from hf_bilb.reporting.plots import save_figure
    from hf_bilb.reporting.study_plots import progress_figure, tasks_figure

    renderings = {
        "md": render_study_markdown,
        "csv": render_study_csv,
        "tex": render_study_latex,
        "json": render_study_json,
    }
    written = []
    for suffix, render in renderings.items():
        written.append(folder / f"comparison.{suffix}")
        write_text(written[-1], render(study))
    figures = {"tasks": tasks_figure(study), "progress": progress_figure(study, histories)}
    for name, figure in figures.items():
        if figure is not None:
            written.append(save_figure(figure, folder / f"{name}.png"))
    return written

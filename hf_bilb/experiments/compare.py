"""`hf-bilb compare`: trains the runs, one after the other, each in its own process, and puts the results together."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from hf_bilb.errors import FolderInUseError, OptionError
from hf_bilb.experiments.child_process import interruptible, run_process, say_failed
from hf_bilb.experiments.plan import LOG_FILE, SINGLE_TASK, ComparisonPlan, PlannedRun, State, state_of
from hf_bilb.experiments.recipe import dump_recipe
from hf_bilb.reporting.comparison import Comparison, Runs, compare_methods
from hf_bilb.reporting.comparison_notes import comparison_notes
from hf_bilb.reporting.comparison_tables import (
    comparison_csv,
    comparison_json,
    comparison_latex,
    comparison_markdown,
    comparison_text,
)
from hf_bilb.reporting.history import History, read_history
from hf_bilb.reporting.results import RunResults, read_results
from hf_bilb.storage import folder_lock
from hf_bilb.storage.folders import make_output_folder
from hf_bilb.storage.writing import write_text

# ---------------------------------------------------------------------------------------------------- running


def run_comparison(plan: ComparisonPlan) -> tuple[Comparison | None, list[PlannedRun]]:
    """Train every run that is not finished, write the tables and plots into the folder and print the table.

    Returns:
        the comparison of what is finished (None without any finished run) and the runs that failed.

    Raises:
        OptionError, CheckpointError, StorageError: a run's folder holds something else; before the first run starts.
        Interrupted: by SIGINT or a request to end; the run under way is stopped.
    """
    make_output_folder(plan.output, "--output")
    with _alone(plan.output) as lock:
        states = [state_of(run) for run in plan.runs]
        shared = plan.output / f"{plan.recipe.name}.yaml"
        write_text(shared, f"# what all runs of this comparison share\n{dump_recipe(plan.recipe)}")
        failed = _train_all(plan, states, shared, lock)
        return _report(plan), failed


def _train_all(plan: ComparisonPlan, states: Sequence[State], shared: Path, lock: int | None) -> list[PlannedRun]:
    """Train one run after the other, each with the recipe `shared` and its own overrides; returns those that failed."""
    estimate = _Estimate()
    failed: list[PlannedRun] = []
    for i, (run, state) in enumerate(zip(plan.runs, states, strict=True)):
        where = f"[{i + 1}/{len(states)}] {run.title}"
        if state == "finished":
            click.echo(f"{where}: is finished")
            continue
        rest = [later for later, its in zip(plan.runs[i:], states[i:], strict=True) if its != "finished"]
        click.echo(f"{where}: {'goes on' if state == 'resume' else 'begins'}{estimate.describe(rest)}")
        resume = ("--resume",) if state == "resume" else ()
        arguments = (*plan.command, str(shared), *run.overrides, *resume)
        with interruptible(f"stopped in {where}: the same command goes on from there"):
            ended = run_process(arguments, run.folder / LOG_FILE, lock)
        estimate.add(run, ended.seconds)
        if ended.code == 0:
            click.echo(f"{where}: done in {_duration(ended.seconds)}")
        else:
            failed.append(run)
            say_failed(where, ended, run.folder / LOG_FILE)
    return failed


class _Estimate:
    """How long the rest takes, from the runs that have ended; a model of one task takes another time."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def add(self, run: PlannedRun, seconds: float) -> None:
        self._seconds[bool(run.task)].append(seconds)

    def describe(self, rest: Sequence[PlannedRun]) -> str:
        known = [*self._seconds[True], *self._seconds[False]]
        if not known:
            return ""
        means = {kind: sum(own) / len(own) if own else sum(known) / len(known) for kind, own in self._seconds.items()}
        to_go = sum(means[bool(run.task)] for run in rest)
        return f" ({_duration(time.monotonic() - self._started)} so far, about {_duration(to_go)} to go)"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int | None]:
    """Hold the folder's lock; two comparisons in one folder would train the same runs.

    The run under way holds it, too, so that one that outlives a killed comparison is not started a second time.
    """
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context(folder_lock.hold(folder))
        except FolderInUseError as error:
            raise OptionError(f"--output: in {str(folder)!r} a comparison is running ({error})") from None
        yield lock


# ---------------------------------------------------------------------------------------------------- results


def collect(plan: ComparisonPlan) -> tuple[dict[str, Runs], dict[str, Runs]]:
    """The finished runs: label -> seed -> results, in the order of the tables; and task -> seed -> results."""
    methods: dict[str, dict[int, RunResults]] = {label: {} for label in plan.labels}
    single: dict[str, dict[int, RunResults]] = {}
    for run in plan.runs:
        by_seed = single.setdefault(run.task, {}) if run.label == SINGLE_TASK else methods[run.label]
        if state_of(run) == "finished":
            by_seed[run.seed] = read_results(run.folder)
    return dict(methods), dict(single)


def _report(plan: ComparisonPlan) -> Comparison | None:
    methods, single = collect(plan)
    if not any(methods.values()):
        return None
    comparison = compare_methods(methods, single, plan.reference)
    notes = comparison_notes(comparison, methods, plan.seeds, plan.split_by_seed)
    comparison = dataclasses.replace(comparison, notes=(*notes, *comparison.notes))
    folders = {label: {run.seed: run.folder for run in plan.runs if run.label == label} for label in comparison.names}
    written = write_comparison(comparison, plan.output, _histories(folders, comparison), folders)
    click.echo(f"\n{comparison_text(comparison)}")
    click.echo(f"wrote {', '.join(map(str, written))}")
    return comparison


def _histories(folders: Mapping[str, Mapping[int, Path]], comparison: Comparison) -> dict[str, list[History]]:
    """Label -> the log history of each of its finished runs."""
    histories: dict[str, list[History]] = {label: [] for label in comparison.names}
    for label, runs in zip(comparison.names, comparison.runs, strict=True):
        for seed in runs:
            try:
                history = read_history(folders[label][seed])
            except OptionError as error:
                click.echo(f"left out of progress.png: {error}", err=True)
                continue
            if history:
                histories[label].append(history)
    return histories


def write_comparison(
    comparison: Comparison,
    folder: Path,
    histories: Mapping[str, Sequence[History]],
    folders: Mapping[str, Mapping[int, Path]],
) -> list[Path]:
    """Write `comparison.html`, `.md`, `.csv`, `.tex`, `.json` and the plots; returns their paths.

    Args:
        comparison: of methods.
        folder: to write into.
        histories: method -> the log history of each of its runs.
        folders: method -> seed -> the run's folder.
    """
    from hf_bilb.reporting.comparison_plots import progress_figure, tasks_figure
    from hf_bilb.reporting.files import save_figure
    from hf_bilb.reporting.html_page import write_methods_page

    texts = {
        "md": comparison_markdown,
        "csv": comparison_csv,
        "tex": comparison_latex,
        "json": comparison_json,
    }
    written = []
    for suffix, render in texts.items():
        written.append(folder / f"comparison.{suffix}")
        write_text(written[-1], render(comparison))
    plots = []
    figures = {"tasks": tasks_figure(comparison), "progress": progress_figure(comparison, histories)}
    for name, figure in figures.items():
        if figure is not None:
            plots.append(save_figure(figure, folder / f"{name}.png"))
    page = write_methods_page(folder / "comparison.html", comparison, folders, plots)
    return [page, *written, *plots]

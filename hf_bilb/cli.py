"""The command line: `hf-bilb train | show | report | compare | balancers | prepare`.

What a user gets wrong is one line and exit code 2, Ctrl-C is one line and exit code 130. What is said in addition to
our own
errors: code that a recipe names, by file and line; memory and disks that are full, files and packages that are missing.
Anything else is a fault of this package or of a library, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from hf_bilb.config.options import shown
from hf_bilb.config.user_code import import_sources, own_code
from hf_bilb.errors import HfBilbError, NonFiniteLossError, one_line
from hf_bilb.experiments.recipe import dump_recipe, read_recipe
from hf_bilb.storage.folders import check_output_folder, make_output_folder

if TYPE_CHECKING:
    from hf_bilb.reporting.comparison import Comparison


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


class UserError(click.ClickException):
    """A mistake in what was given: one line on stderr instead of a traceback, exit code 2."""

    exit_code = 2

    def __init__(self, error: Exception) -> None:
        super().__init__(one_line(error))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line; of several processes only the first one speaks."""
        if _speaks():
            click.echo(f"hf-bilb: error: {self.format_message()}", err=True)


class Failed(UserError):
    """No mistake in what was given, but it came to an end that it cannot go on from; exit code 1."""

    exit_code = 1


_TRACEBACK = "HF_BILB_TRACEBACK"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def _one_line_errors(interrupted: str = "interrupted") -> Iterator[None]:
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        if _speaks():
            click.echo(f"hf-bilb: {interrupted}", err=True)
        raise click.exceptions.Exit(128 + signal.SIGINT) from None
    except Exception as error:
        said = _said(error)
        if said is None:
            raise
        if click.get_current_context().find_root().params.get("traceback"):
            traceback.print_exc()
        raise said from None


def _said(error: Exception) -> UserError | None:
    """The line for an error; None for one that is nobody's mistake but ours."""
    if isinstance(error, NonFiniteLossError):
        return Failed(error)
    if isinstance(error, HfBilbError):
        return UserError(error if error.__cause__ is None else _with_hint(str(error)))
    if isinstance(error, BrokenProcessPool):
        killed = "a worker process was killed (no memory left?); the same command goes on from what is finished"
        return Failed(RuntimeError(killed))
    if _is_out_of_memory(error):
        less = "a smaller trainer.per_device_train_batch_size with more trainer.gradient_accumulation_steps takes less"
        return Failed(_with_hint(f"out of memory: {one_line(error, 200)}; {less}"))
    kind = type(error).__name__
    if (place := own_code(error)) is not None:
        return UserError(_with_hint(f"{place}: {kind}: {error}"))
    if isinstance(error, OSError):
        where = f": {shown(str(error.filename))}" if error.filename is not None else ""
        line = _with_hint(f"{error.strerror or error}{where}")
        return Failed(line) if error.errno in _FULL else UserError(line)
    return UserError(_with_hint(f"{kind}: {error}")) if isinstance(error, ImportError) else None


def _with_hint(message: str) -> Exception:
    return Exception(f"{one_line(message, 480)} ({_TRACEBACK}=1 shows where it comes from)")


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # where it is not loaded yet, nothing of it is raised
    of_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_device or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


class _OneLineUsage(click.Group):
    """A group whose usage errors are one line, too, instead of click's four."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments before the command's name."""
        with _one_line_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the command's own arguments and run it."""
        with _one_line_usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_line_usage() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = "" if error.ctx is None else f" ({error.ctx.command_path} --help says more)"
        raise UserError(Exception(f"{one_line(error.format_message(), 480)}{command}")) from None


@click.group(cls=_OneLineUsage, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hf-bilb", prog_name="hf-bilb")
@click.option(
    "--traceback",
    is_flag=True,
    envvar=_TRACEBACK,
    help=f"Print where an error comes from, before its line; also by {_TRACEBACK}=1.",
)
def main(traceback: bool) -> None:
    """Train one model on several tasks and keep the tasks in balance."""


@main.command()
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on from the last complete checkpoint in trainer.output_dir.")
def train(recipe: str, overrides: tuple[str, ...], resume: bool) -> None:
    """Train what RECIPE says, measure it once at the end and write everything into trainer.output_dir.

    Settings are changed on the command line by their path, with a YAML value:

    \b
        hf-bilb train recipes/qm9/mlp_bilb.yaml trainer.learning_rate=5e-4 balancer.pairs=adjacent

    The same under `accelerate launch -m hf_bilb train ...`. The folder holds at the end: recipe.yaml (as resolved),
    results.json, table.md, losses.png, weights.png, the model and its checkpoints. A folder that already holds a run is
    never written over.
    """
    with _one_line_errors():
        checked = read_recipe(recipe, overrides)
        from hf_bilb.experiments.train import run_recipe  # only now: takes ten seconds

        run_recipe(checked, resume=resume)


@main.command()
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check RECIPE with its overrides and print it resolved, as a recipe; loads no data and no model."""
    with _one_line_errors():
        click.echo(dump_recipe(read_recipe(recipe, overrides)), nl=False)


@main.command()
@click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR...")
@click.option("--output", type=click.Path(), help="Write comparison.html, .md, .csv and .png into this folder.")
def report(run_dirs: tuple[str, ...], output: str | None) -> None:
    """Print the results of finished runs side by side, related to the first one."""
    with _one_line_errors():
        from hf_bilb.reporting.results import labels, read_results
        from hf_bilb.reporting.side_by_side import compare_runs, runs_text

        if output is not None:
            check_output_folder(output, "--output")
        runs = [read_results(run_dir) for run_dir in run_dirs]
        comparison = compare_runs(runs, labels(runs, run_dirs))
        click.echo(runs_text(comparison), nl=False)
        if output is not None:
            click.echo(f"wrote {', '.join(map(str, _write_comparison(comparison, Path(output), run_dirs)))}")


def _write_comparison(comparison: Comparison, folder: Path, run_dirs: Sequence[str]) -> list[Path]:
    from hf_bilb.reporting.comparison_plots import runs_figure
    from hf_bilb.reporting.files import save_figure
    from hf_bilb.reporting.html_page import write_runs_page
    from hf_bilb.reporting.side_by_side import runs_csv, runs_markdown
    from hf_bilb.storage.writing import write_text

    make_output_folder(folder, "--output")
    markdown, csv, png = (folder / f"comparison.{suffix}" for suffix in ("md", "csv", "png"))
    write_text(markdown, runs_markdown(comparison))
    write_text(csv, runs_csv(comparison))
    save_figure(runs_figure(comparison), png)
    return [write_runs_page(folder / "comparison.html", comparison, run_dirs, [png]), markdown, csv, png]


@main.command()
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option(
    "--balancers", required=True, help="What to compare: ls,si,bilb,bilb:preset=qm9,'bilb:{pairs: adjacent}'."
)
@click.option("--seeds", default="0", show_default=True, help="Runs of each: trainer.seed, such as 0,1,2.")
@click.option("--stl", is_flag=True, help="Train each task alone, too: what Delta_m then relates to.")
@click.option(
    "--output",
    type=click.Path(),
    help="Folder of the comparison.  [default: the recipe's trainer.output_dir with _compare behind it]",
)
@click.option("--launcher", help="Starts each run: 'accelerate launch --num_processes 2'.  [default: this Python]")
@click.option("--base", help="What the others are related to.  [default: ls where it is there, else the first]")
@click.option("--split-by-seed", is_flag=True, help="Each seed splits the data in its own way, too (data.seed).")
def compare(
    recipe: str,
    overrides: tuple[str, ...],
    balancers: str,
    seeds: str,
    stl: bool,
    output: str | None,
    launcher: str | None,
    base: str | None,
    split_by_seed: bool,
) -> None:
    """Train RECIPE with several balancers and seeds, one run after the other, and write tables and plots.

    \b
        hf-bilb compare recipes/qm9/mlp_ls.yaml --balancers ls,si,uw,bilb --seeds 0,1,2

    Every run is checked before the first one starts. The same command goes on after an interruption: what is finished
    stays, what has a checkpoint goes on from it. A run that fails is named, the others go on, and the exit code is 1.
    In the folder: comparison.html, .md, .csv, .tex, .json, tasks.png, progress.png, and a run for each cell.
    """
    with _one_line_errors():
        from hf_bilb.experiments.child_process import Interrupted
        from hf_bilb.experiments.compare import run_comparison  # only now: matplotlib, torch
        from hf_bilb.experiments.plan import plan_comparison

        planned = plan_comparison(
            recipe,
            overrides,
            balancers=balancers,
            seeds=seeds,
            single_tasks=stl,
            output=output,
            launcher=launcher,
            reference=base,
            split_by_seed=split_by_seed,
        )
        try:
            comparison, failed = run_comparison(planned)
        except Interrupted as stopped:
            click.echo(f"hf-bilb: {stopped}", err=True)
            raise click.exceptions.Exit(128 + stopped.signal_number) from None
    if failed or comparison is None:
        names = ", ".join(run.title for run in failed)
        click.echo(f"hf-bilb: error: {len(failed)} of {len(planned.runs)} runs failed: {names}", err=True)
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("name", required=False)
@click.option("--format", "form", type=click.Choice(["text", "markdown", "json"]), default="text", show_default=True)
@click.option(
    "--import",
    "sources",
    multiple=True,
    metavar="FILE",
    help="A Python file, or a module, with methods of your own: as `imports` of a recipe.",
)
def balancers(name: str | None, form: str, sources: tuple[str, ...]) -> None:
    """Print the table of all balancers: paper, cost, state, options; or one of them, NAME, in full."""
    with _one_line_errors():
        import_sources(sources, "--import")
        from hf_bilb.experiments.describe import catalogue, describe  # only now: torch
        from hf_bilb.reporting.balancer_table import (
            render_one_json,
            render_one_markdown,
            render_one_text,
            render_table_json,
            render_table_markdown,
            render_table_text,
        )

        known = catalogue()
        if name is None:
            tables = {"markdown": render_table_markdown, "json": render_table_json}
            table = tables[form](known) if form in tables else render_table_text(known, _terminal_width())
            click.echo(table, nl=False)
            return
        entry = describe(name)
        pages = {"markdown": render_one_markdown, "json": render_one_json}
        page = pages[form](entry, known) if form in pages else render_one_text(entry, known, _terminal_width())
        click.echo(page, nl=False)


@main.group()
def prepare() -> None:
    """Write a data set's files in the layout that its loader reads."""


@prepare.command("nyuv2")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--size", nargs=2, type=click.IntRange(8, 640), default=(288, 384), show_default=True, help="Height and width."
)
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one for each core]")
def prepare_nyuv2_command(file: Path, output: Path, size: tuple[int, int], workers: int | None) -> None:
    """NYU Depth V2 in MTAN's layout, from FILE, the official nyu_depth_v2_labeled.mat.

    \b
        hf-bilb prepare nyuv2 nyu_depth_v2_labeled.mat --output data/nyuv2

    The official split, 13 classes, depth in metres, normals computed from it, and image_labels.csv with the kind of
    scene of each image. An interrupted command goes on where it stood.
    """
    with _one_line_errors("interrupted; the same command goes on where it stood"):
        from hf_bilb.data.dense.prepare_nyuv2 import prepare_nyuv2

        check_output_folder(output, "--output")
        train, test = prepare_nyuv2(file, output, size, workers)
        click.echo(f"{output}: {train} training and {test} test images")


def _terminal_width() -> int:
    return shutil.get_terminal_size(fallback=(120, 24)).columns

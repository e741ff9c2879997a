"""A run's folder: who may write into it, and what is written."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from hf_bilb.config.yaml import read_yaml
from hf_bilb.data import TaskData
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.experiments.recipe import Recipe, differences, dump_recipe
from hf_bilb.reporting.gallery import GalleryRow, write_gallery
from hf_bilb.reporting.plots import plot_run
from hf_bilb.reporting.results import FILE_NAME, RunResults, write_results
from hf_bilb.reporting.side_by_side import compare_runs, runs_markdown, runs_text
from hf_bilb.storage import folder_lock
from hf_bilb.storage.folders import check_output_folder, make_output_folder
from hf_bilb.storage.writing import write_text
from hf_bilb.trainer.trainer import checkpointing

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
_RECIPE_HEAD = "# resolved from"


def enter_folder(folder: Path, resume: bool, held: contextlib.ExitStack) -> str | None:
    """Hold the folder from now on, and look at what is in it; the first rank does it for all."""
    check_output_folder(folder, "trainer.output_dir")
    if not resume:
        make_output_folder(folder, "trainer.output_dir")
    if not resume or folder.is_dir():  # else there is nothing to resume, and no folder is left behind
        held.enter_context(folder_lock.hold(folder))
    return _check_folder(folder, resume)


def _check_folder(folder: Path, resume: bool) -> str | None:
    """The checkpoint to resume from, or None for a fresh start; refuses to start over in the folder of another run."""
    if resume:
        return checkpointing.last_complete_checkpoint(folder)
    held = [path.name for path in (folder / FILE_NAME, *sorted(folder.glob("checkpoint-*"))) if path.exists()]
    if held:
        raise OptionError(
            f"trainer.output_dir: {str(folder)!r} already holds a run ({held[0]}): --resume goes on with it, "
            "another folder starts a new run"
        )
    path = folder / RECIPE_FILE
    if path.is_file() and not path.read_bytes().startswith(_RECIPE_HEAD.encode()):
        raise OptionError(f"trainer.output_dir: {str(path)!r} was not written by a run and would be lost")
    return None


@contextlib.contextmanager
def saying_how_to_go_on(folder: Path) -> Iterator[None]:
    """Lets an interrupt say from which checkpoint the run, whose folder is held, can go on."""
    try:
        yield
    except KeyboardInterrupt:
        try:
            last = checkpointing.last_complete_checkpoint(folder, thorough=False)
        except CheckpointError:
            how = f"{folder} has no checkpoint yet, the same command begins again"
        else:
            how = f"the same command with --resume goes on from {last}"
        raise KeyboardInterrupt(f"interrupted; {how}") from None


def write_recipe(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Write the resolved recipe; on a resume, say where it differs from the one that the run was started with."""
    make_output_folder(folder, "trainer.output_dir")
    path = folder / RECIPE_FILE
    if resume and path.is_file():
        before = read_yaml(path)
        for difference in differences(before, recipe.to_dict()) if isinstance(before, Mapping) else []:
            logger.warning("%s: this folder's run was started with another value: %s", path, difference)
    write_text(path, f"{_RECIPE_HEAD} the recipe {recipe.name!r} by hf-bilb\n{dump_recipe(recipe)}")


def write_run(recipe: Recipe, results: RunResults, history: list[dict[str, Any]], tasks: tuple[str, ...]) -> list[Path]:
    """Write results, table and plots, and print the table; returns the plots."""
    folder = Path(recipe.output_dir)
    write_results(results, folder)
    table = compare_runs([results], [results.balancer])
    write_text(folder / "table.md", runs_markdown(table))
    plots = []
    if recipe.evaluation.plots:
        plots = plot_run(history, tasks, folder, title=f"{recipe.name} ({results.balancer})")
    what = "results" if any(metric.higher_is_better for metric in results.metrics) else "errors"
    click.echo(f"\n{results.split} {what} of {recipe.name} ({results.balancer}):\n\n{runs_text(table)}")
    steps, planned = results.training["steps"], results.training.get("planned_steps")
    of = f" of {planned} (stopped early)" if planned is not None and steps < planned else ""
    click.echo(f"{steps} steps{of} in {results.training['seconds']:.0f} s; all files are in {folder}")
    return plots


def write_image_gallery(recipe: Recipe, data: TaskData, rows: list[GalleryRow]) -> list[Path]:
    """Write `gallery.png`, where there are images to draw; returns it."""
    if not rows or data.gallery is None:
        return []
    title = f"{recipe.name} ({recipe.balancer['name']}): {recipe.evaluation.split} images"
    tasks, folder = list(rows[0].prediction), Path(recipe.output_dir)
    return [write_gallery(rows, tasks, folder, title, data.gallery.class_names, data.gallery.depth_unit)]

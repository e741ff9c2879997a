"""`train`, `show` and `compare`: commands that take a recipe."""

from __future__ import annotations

import os

import click

from hf_bilb.cli.errors import one_line_errors
from hf_bilb.errors import OptionError
from hf_bilb.experiments.launch import launch_command
from hf_bilb.experiments.recipe import dump_recipe, read_recipe


@click.command()
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on from the last complete checkpoint in trainer.output_dir.")
@click.option(
    "--accelerate",
    "backend",
    metavar="NAME|FILE",
    help="Run in several processes: ddp, fsdp2, zero2, zero3, multi_node, or a configuration file of accelerate.",
)
@click.option("--processes", type=click.IntRange(min=1), help="How many.  [default: one for each GPU]")
def train(recipe: str, overrides: tuple[str, ...], resume: bool, backend: str | None, processes: int | None) -> None:
    """Train what RECIPE says, measure it once at the end and write everything into trainer.output_dir.

    Settings are changed on the command line by their path, with a YAML value:

    \b
        hf-bilb train recipes/qm9/mlp_bilb.yaml trainer.learning_rate=5e-4 balancer.pairs=adjacent

    \b
        hf-bilb train --accelerate zero2 recipes/glue/bilb.yaml

    The same under `accelerate launch -m hf_bilb train ...`. The folder holds at the end: recipe.yaml (as resolved),
    results.json, table.md, losses.png, weights.png, the model and its checkpoints. A folder that already holds a run is
    never written over.
    """
    with one_line_errors():
        checked = read_recipe(recipe, overrides)
        if processes is not None and backend is None:
            raise OptionError("--processes: says how many processes --accelerate starts, which is not given")
        if backend is not None:
            command = launch_command(backend, [recipe, *overrides, *(["--resume"] if resume else [])], processes)
            os.execv(command[0], command)
        from hf_bilb.experiments.train import run_recipe  # only now: takes ten seconds

        run_recipe(checked, resume=resume)


@click.command()
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check RECIPE with its overrides and print it resolved, as a recipe; loads no data and no model."""
    with one_line_errors():
        click.echo(dump_recipe(read_recipe(recipe, overrides)), nl=False)


@click.command()
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
    with one_line_errors():
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

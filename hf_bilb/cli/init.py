"""`init`: from a table to a recipe."""

from __future__ import annotations

import shlex

import click

from hf_bilb.cli.errors import one_line_errors
from hf_bilb.experiments.starter_request import StarterRequest


@click.command()
@click.argument("file", type=click.Path())
@click.option("--text", metavar="COLUMN[,COLUMN]", help="The texts to predict from: one column, or two for pairs.")
@click.option("--image", metavar="COLUMN", help="The images to predict from: a column of paths, or of images.")
@click.option("--tasks", metavar="COLUMN,...", help="The columns to predict.  [default: named label, target, ...]")
@click.option("--columns", metavar="NAME,...", help="Names of all columns of a text file that has none.")
@click.option("--output", type=click.Path(), help="The recipe to write.  [default: FILE's name with .yaml]")
@click.option("--force", is_flag=True, help="Write over a recipe that is already there.")
def init(
    file: str,
    text: str | None,
    image: str | None,
    tasks: str | None,
    columns: str | None,
    output: str | None,
    force: bool,
) -> None:
    """Write a commented recipe for your own data in FILE: a table (csv, tsv, jsonl, parquet) or a folder saved by
    `datasets`.

    \b
        hf-bilb init reviews.csv --text body --tasks stars,topic
        hf-bilb train reviews.yaml

    The columns are looked at, and the type of each task is guessed: the recipe says why. Without --text and --image all
    other columns are the inputs of a model for tables.
    """
    with one_line_errors():
        request = StarterRequest(file, _names(text), image, _names(tasks), _names(columns), output, force)
        from hf_bilb.experiments.starter import write_starter  # only now: datasets, torch

        written = write_starter(request)
        for task in written.tasks:
            click.echo(f"{task.name}: {task.type} ({task.why})")
        click.echo(f"wrote {written.recipe}; next: hf-bilb train {shlex.quote(str(written.recipe))}")


def _names(given: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())

"""`recipes`: those that come with the package, and a copy of one of them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import TYPE_CHECKING

import click

from hf_bilb.cli.errors import one_line_errors
from hf_bilb.cli.terminal import terminal_width

if TYPE_CHECKING:
    from hf_bilb.experiments.packaged import PackagedRecipe


@click.group(invoke_without_command=True)
@click.option("--format", "form", type=click.Choice(["text", "markdown", "json"]), default="text", show_default=True)
@click.pass_context
def recipes(context: click.Context, form: str) -> None:
    """List the recipes that come with the package; `recipes copy` puts one into your folder."""
    if context.invoked_subcommand is not None:
        return
    with one_line_errors():
        from hf_bilb.experiments.packaged import packaged_recipes

        click.echo(_rendered(packaged_recipes(), form), nl=False)


def _rendered(known: list[PackagedRecipe], form: str) -> str:
    from hf_bilb.reporting.grid import plain_grid

    entries = [dataclasses.asdict(recipe) for recipe in known]
    if form == "json":
        return json.dumps({"recipes": entries}, indent=2, ensure_ascii=False) + "\n"
    table = plain_grid(
        ("recipe", "data", "model", "balancer", "what it is"), [tuple(entry.values()) for entry in entries]
    )
    if form == "markdown":
        return table.to_markdown()
    lines = [_cut(line, terminal_width()) for line in table.to_text().splitlines()]
    return "\n".join([*lines, "", f"hf-bilb recipes copy {known[0].name} puts one into the current folder."]) + "\n"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 3].rstrip()}..."


@recipes.command()
@click.argument("name")
@click.option(
    "--output", type=click.Path(), help="A file (my.yaml) or a folder to write to.  [default: the current folder]"
)
@click.option("--force", is_flag=True, help="Write over files that are already there.")
def copy(name: str, output: str | None, force: bool) -> None:
    """Copy the recipe NAME, and the Python files that it names, into the current folder.

    \b
        hf-bilb recipes copy qm9/bilb_small.yaml
        hf-bilb recipes copy census/bilb.yaml --output census

    The copy is yours to change. It runs from the current folder, seen from which it names its Python files.
    """
    with one_line_errors():
        from hf_bilb.experiments.packaged import copy_recipe

        copied = copy_recipe(name, output, force)
        click.echo(f"wrote {', '.join(map(str, (copied.recipe, *copied.code)))}")
        for key, value in copied.missing:
            click.echo(f"{key}: there is no {value!r} here; set it to where your data lie, which the recipe describes")
        click.echo(f"next: hf-bilb train {shlex.quote(str(copied.recipe))}")

"""`balancers`: the table of all methods, or one in full."""

from __future__ import annotations

import click

from hf_bilb.cli.errors import one_line_errors
from hf_bilb.cli.terminal import terminal_width
from hf_bilb.config.user_code import import_sources


@click.command()
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
    with one_line_errors():
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
            table = tables[form](known) if form in tables else render_table_text(known, terminal_width())
            click.echo(table, nl=False)
            return
        entry = describe(name)
        pages = {"markdown": render_one_markdown, "json": render_one_json}
        page = pages[form](entry, known) if form in pages else render_one_text(entry, known, terminal_width())
        click.echo(page, nl=False)

"""`push`: a finished run to the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from hf_bilb.cli.errors import one_line_errors


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--private", is_flag=True, help="For its owners alone.  [default: as the Hub has it]")
@click.option("--revision", help="The branch to push to; it is made where it is not there.  [default: main]")
@click.option("--commit-message", help="What the Hub's history says.  [default: recipe and balancer]")
@click.option("--with-checkpoints", is_flag=True, help="Its complete checkpoints, too, from which it can be resumed.")
@click.option("--license", help="For the model card, such as apache-2.0.")
def push(
    run: Path,
    repository: str,
    private: bool,
    revision: str | None,
    commit_message: str | None,
    with_checkpoints: bool,
    license: str | None,
) -> None:
    """Push the finished run in the folder RUN to REPOSITORY (owner/name) on the Hugging Face Hub.

    \b
        hf-bilb push runs/reviews me/reviews
        hf-bilb push runs/reviews me/reviews --private --license apache-2.0

    Pushed are the model, its card (README.md), results, table, plots and recipe, in one commit. After an interruption
    the same command goes on: what the Hub has is not sent again. The token is that of HF_TOKEN or `hf auth login`.
    """
    with one_line_errors("interrupted; the same command goes on"):
        from hf_bilb.reporting.results import read_results

        read_results(run)  # before torch is imported
        from hf_bilb.experiments.push import push_run
        from hf_bilb.hub.repository import Repository

        where = Repository(repository, private or None, revision, key="repository")
        address = push_run(run, where, commit_message, with_checkpoints, license)
        click.echo(f"pushed to {address}")

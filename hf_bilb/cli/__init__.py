"""The command line: `hf-bilb init | recipes | train | show | predict | evaluate | export | report | compare | push |
balancers | prepare`.

One file for each group of commands; what they do is in `hf_bilb.experiments`. Nothing heavy is imported for `--help`
and for the errors of a recipe.
"""

from __future__ import annotations

import click

from hf_bilb.cli.balancers import balancers
from hf_bilb.cli.errors import TRACEBACK, OneLineUsage
from hf_bilb.cli.export import export
from hf_bilb.cli.init import init
from hf_bilb.cli.predict import evaluate, predict
from hf_bilb.cli.prepare import prepare
from hf_bilb.cli.push import push
from hf_bilb.cli.recipes import recipes
from hf_bilb.cli.report import report
from hf_bilb.cli.runs import compare, show, train


@click.group(cls=OneLineUsage, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hf-bilb", prog_name="hf-bilb")
@click.option(
    "--traceback",
    is_flag=True,
    envvar=TRACEBACK,
    help=f"Print where an error comes from, before its line; also by {TRACEBACK}=1.",
)
def main(traceback: bool) -> None:
    """Train one model on several tasks and keep the tasks in balance."""


for command in (init, recipes, train, show, predict, evaluate, export, report, compare, push, balancers, prepare):
    main.add_command(command)

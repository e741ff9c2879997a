"""`report`: finished runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hf_bilb.cli.errors import one_line_errors
from hf_bilb.storage.folders import check_output_folder, make_output_folder

if TYPE_CHECKING:
    from hf_bilb.reporting.comparison import Comparison


@click.command()
@click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR...")
@click.option("--output", type=click.Path(), help="Write comparison.html, .md, .csv and .png into this folder.")
def report(run_dirs: tuple[str, ...], output: str | None) -> None:
    """Print the results of finished runs side by side, related to the first one."""
    with one_line_errors():
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

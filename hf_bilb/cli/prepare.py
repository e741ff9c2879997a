"""`prepare`: data sets' files in the layout that their loaders read."""

from __future__ import annotations

from pathlib import Path

import click

from hf_bilb.cli.errors import one_line_errors
from hf_bilb.storage.folders import check_output_folder


@click.group()
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
    with one_line_errors("interrupted; the same command goes on where it stood"):
        from hf_bilb.data.dense.prepare_nyuv2 import prepare_nyuv2

        check_output_folder(output, "--output")
        train, test = prepare_nyuv2(file, output, size, workers)
        click.echo(f"{output}: {train} training and {test} test images")

"""`predict` and `evaluate`: commands that use a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_bilb.cli.errors import one_line_errors

if TYPE_CHECKING:
    from hf_bilb.inference.language import LoadedLanguageModel
    from hf_bilb.inference.loaded import LoadedModel
    from hf_bilb.inference.pixels import LoadedPixelModel

_ROWS_AT_ONCE = 32
_BATCH_SIZE = f"Rows at a time.  [default: {_ROWS_AT_ONCE}; of tasks of pixels 8]"
_TRUST = "Run the Python file in the folder that builds the network (runs of torch_module)."


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("file", type=click.Path())
@click.option(
    "--output",
    required=True,
    type=click.Path(),
    help="A .csv, .tsv, .jsonl or .parquet file; of tasks of pixels a folder.",
)
@click.option("--force", is_flag=True, help="Write over the output where it is there.")
@click.option("--prefix", default="predicted_", show_default=True, help="Of the names of the new columns.")
@click.option("--all-classes", is_flag=True, help="The probability of each class, too.")
@click.option("--preview", is_flag=True, help="Of numbers at every pixel also a picture.")
@click.option("--batch-size", type=int, help=_BATCH_SIZE)
@click.option("--max-new-tokens", default=128, show_default=True, help="Of a language model's response, at most.")
@click.option("--device", help="Such as cuda:1 or cpu.  [default: the first GPU, else the CPU]")
@click.option("--revision", help="Branch, tag or commit of a repository on the hub.")
@click.option("--trust-remote-code", is_flag=True, help=_TRUST)
def predict(
    model: str,
    file: str,
    output: str,
    force: bool,
    prefix: str,
    all_classes: bool,
    preview: bool,
    batch_size: int | None,
    max_new_tokens: int,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Write FILE's rows with what MODEL says of each into --output.

    MODEL is the folder of a run, a checkpoint in it, or owner/name on the hub; FILE a .csv, .tsv, .jsonl or .parquet
    file with the input columns of the training data, an image, or a folder of images. Text files are read, and written,
    as those that the model was trained on: in the same encoding, with the same delimiter and decimal sign.

    \b
        hf-bilb predict runs/reviews new.csv --output predicted.csv
        hf-bilb predict runs/rooms photos --output predicted

    Of tasks of pixels --output is a folder, with a file for each image and task (class numbers as .png, numbers as
    .npy) and the table predictions.csv.
    """
    with one_line_errors():
        from hf_bilb.data.own.files import check_there
        from hf_bilb.inference.image_folder import check_output_place
        from hf_bilb.inference.load import load  # only now: torch, transformers
        from hf_bilb.inference.pixels import LoadedPixelModel
        from hf_bilb.inference.quiet import quieten
        from hf_bilb.inference.tables import check_output, is_table

        source, target = Path(file), Path(output)
        check_there(source)
        (check_output if is_table(target) else check_output_place)(target, source, force)
        quieten()
        loaded = load(model, device, revision, trust_remote_code)
        if isinstance(loaded, LoadedPixelModel):
            said = _write_images(loaded, source, target, prefix, all_classes, preview, batch_size)
        else:
            check_output(target, source, force)
            said = _write_rows(loaded, source, target, prefix, all_classes, batch_size, max_new_tokens)
    click.echo(f"wrote {output}: {said}")


def _write_rows(
    loaded: LoadedModel | LoadedLanguageModel,
    source: Path,
    target: Path,
    prefix: str,
    all_classes: bool,
    batch_size: int | None,
    max_new_tokens: int,
) -> str:
    from hf_bilb.inference.language import LoadedLanguageModel
    from hf_bilb.inference.tables import check_free, csv_of_output, read_rows, write_rows

    rows = read_rows(source, loaded.format)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens} if isinstance(loaded, LoadedLanguageModel) else {}
    names = [f"{prefix}{name}" for name in loaded.columns(all_classes)]
    check_free(rows.column_names, names, str(source))
    found = loaded.predict(source, _ROWS_AT_ONCE if batch_size is None else batch_size, **settings).to_columns(
        all_classes
    )
    write_rows(rows, dict(zip(names, found.values(), strict=True)), target, csv_of_output(source, loaded.format.csv))
    return f"{len(rows)} rows, with {', '.join(names)}"


def _write_images(
    loaded: LoadedPixelModel,
    source: Path,
    target: Path,
    prefix: str,
    all_classes: bool,
    preview: bool,
    batch_size: int | None,
) -> str:
    from hf_bilb.inference.image_folder import INDEX, check_is_folder, map_files, without_images, write_images
    from hf_bilb.inference.pixels import BATCH_SIZE
    from hf_bilb.inference.tables import check_free, read_rows

    check_is_folder(target)
    rows, files = without_images(read_rows(source, loaded.format)), map_files(loaded, all_classes, preview)
    names = [f"{prefix}{name}" for name in (*(file.column for file in files), *loaded.columns(all_classes))]
    check_free(rows.column_names, names, str(source))
    predictions = loaded.predict(source, BATCH_SIZE if batch_size is None else batch_size)
    write_images(predictions, rows, source, target, files, prefix, all_classes)
    return f"{len(predictions)} image{'s' * (len(predictions) > 1)}; {INDEX} has {', '.join(names)}"


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
@click.option("--batch-size", type=int, help=_BATCH_SIZE)
@click.option("--device", help="Such as cuda:1 or cpu.  [default: the first GPU, else the CPU]")
@click.option("--revision", help="Branch, tag or commit of a repository on the hub.")
@click.option("--trust-remote-code", is_flag=True, help=_TRUST)
def evaluate(
    model: str,
    file: str,
    as_json: bool,
    batch_size: int | None,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Measure MODEL on the rows of FILE, which has the columns of the training data, labels included.

    The metrics are those of the run; a task whose column FILE does not have is not measured.
    """
    with one_line_errors():
        from hf_bilb.data.own.files import check_there
        from hf_bilb.inference.language import LoadedLanguageModel
        from hf_bilb.inference.load import load  # only now: torch, transformers
        from hf_bilb.inference.pixels import BATCH_SIZE, LoadedPixelModel
        from hf_bilb.inference.quiet import quieten
        from hf_bilb.inference.report import measured_table

        check_there(Path(file))
        quieten()
        loaded = load(model, device, revision, trust_remote_code)
        usual = BATCH_SIZE if isinstance(loaded, LoadedPixelModel) else _ROWS_AT_ONCE
        measured = loaded.evaluate(Path(file), usual if batch_size is None else batch_size)
        if as_json:
            click.echo(json.dumps({"model": model, "file": file, "metrics": measured}, indent=2))
            return
        assert not isinstance(loaded, LoadedLanguageModel)  # it says that it is not measured
        click.echo(f"{model} on {file}:\n\n{measured_table(loaded.metric_infos, measured, Path(model).name)}", nl=False)

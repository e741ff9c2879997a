"""`predict` and `evaluate`: commands that use a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hf_bilb.cli.errors import one_line_errors

_TRUST = "Run the Python file in the folder that builds the network (runs of torch_module)."


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("file", type=click.Path())
@click.option("--output", required=True, type=click.Path(), help="A .csv, .tsv, .jsonl or .parquet file.")
@click.option("--force", is_flag=True, help="Write over the output where it is there.")
@click.option("--prefix", default="predicted_", show_default=True, help="Of the names of the new columns.")
@click.option("--all-classes", is_flag=True, help="A column with the probability of each class, too.")
@click.option("--batch-size", default=32, show_default=True, help="Rows at a time.")
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
    batch_size: int,
    max_new_tokens: int,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Write FILE's rows with what MODEL says of each into --output.

    MODEL is the folder of a run, a checkpoint in it, or owner/name on the hub; FILE a .csv, .tsv, .jsonl or .parquet
    file with the input columns of the training data. Text files are read, and written, as those that the model was
    trained on: in the same encoding, with the same delimiter and decimal sign.

    \b
        hf-bilb predict runs/reviews new.csv --output predicted.csv
    """
    with one_line_errors():
        from hf_bilb.data.own.files import check_there
        from hf_bilb.inference.load import load  # only now: torch, transformers
        from hf_bilb.inference.loaded import LoadedModel
        from hf_bilb.inference.quiet import quieten
        from hf_bilb.inference.tables import check_free, check_output, csv_of_output, read_rows, write_rows

        check_output(Path(output), Path(file), force)
        check_there(Path(file))
        quieten()
        loaded = load(model, device, revision, trust_remote_code)
        rows = read_rows(Path(file), loaded.format.csv)
        settings: dict[str, Any] = {} if isinstance(loaded, LoadedModel) else {"max_new_tokens": max_new_tokens}
        names = [f"{prefix}{name}" for name in loaded.columns(all_classes)]
        check_free(rows.column_names, names, file)
        found = loaded.predict(Path(file), batch_size, **settings).to_columns(all_classes)
        csv = csv_of_output(Path(file), loaded.format.csv)
        write_rows(rows, dict(zip(names, found.values(), strict=True)), Path(output), csv)
    click.echo(f"wrote {output}: {len(rows)} rows, with {', '.join(names)}")


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
@click.option("--batch-size", default=32, show_default=True, help="Rows at a time.")
@click.option("--device", help="Such as cuda:1 or cpu.  [default: the first GPU, else the CPU]")
@click.option("--revision", help="Branch, tag or commit of a repository on the hub.")
@click.option("--trust-remote-code", is_flag=True, help=_TRUST)
def evaluate(
    model: str,
    file: str,
    as_json: bool,
    batch_size: int,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Measure MODEL on the rows of FILE, which has the columns of the training data, labels included.

    The metrics are those of the run; a task whose column FILE does not have is not measured.
    """
    with one_line_errors():
        from hf_bilb.data.own.files import check_there
        from hf_bilb.inference.load import load  # only now: torch, transformers
        from hf_bilb.inference.loaded import LoadedModel
        from hf_bilb.inference.quiet import quieten
        from hf_bilb.inference.report import measured_table

        check_there(Path(file))
        quieten()
        loaded = load(model, device, revision, trust_remote_code)
        measured = loaded.evaluate(Path(file), batch_size)
        if as_json:
            click.echo(json.dumps({"model": model, "file": file, "metrics": measured}, indent=2))
            return
        assert isinstance(loaded, LoadedModel)  # a language model says that it is not measured
        click.echo(f"{model} on {file}:\n\n{measured_table(loaded.metric_infos, measured, Path(model).name)}", nl=False)

"""`export`: a trained model as a file of another format."""

from __future__ import annotations

import click

from hf_bilb.cli.errors import one_line_errors


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--format", "format_", type=click.Choice(["onnx"]), default="onnx", show_default=True, help="Of the file."
)
@click.option("--output", type=click.Path(), help="The folder to write.  [default: MODEL/onnx; of the hub, NAME_onnx]")
@click.option("--force", is_flag=True, help="Write over an export that is already there.")
@click.option("--atol", default=1e-4, show_default=True, help="Largest difference from torch that is let through.")
@click.option("--revision", help="Branch, tag or commit of a repository on the hub.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python file in the folder that builds the network (runs of torch_module).",
)
def export(
    model: str,
    format_: str,
    output: str | None,
    force: bool,
    atol: float,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Write MODEL, of texts, images or a table, as ONNX, which runs without torch and hf_bilb.

    MODEL is the folder of a run, a checkpoint in it, or owner/name on the hub. Adapters are merged into the weights.

    \b
        hf-bilb export runs/reviews --format onnx
        hf-bilb export me/reviews --format onnx --output exported/reviews

    In the folder: model.onnx, hf_bilb.json (class names, units, means), the tokenizer, and a README.md with the inputs,
    the outputs and code that uses them. The outputs are raw: numbers in standardised units, and logits. They are
    compared with torch's, where onnxruntime is installed, before the folder is put in its place.
    """
    with one_line_errors():
        from hf_bilb.inference.onnx.export import check_packages, export_onnx

        check_packages()
        from hf_bilb.inference.quiet import quieten

        quieten()
        done = export_onnx(model, output, force, atol, revision, trust_remote_code, click.echo)
        click.echo(f"wrote {done.folder}: {', '.join(done.files)}")

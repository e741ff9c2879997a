"""`export_onnx`: a trained model becomes a folder that onnxruntime needs, and nothing else."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_bilb._version import __version__
from hf_bilb.config.options import shown
from hf_bilb.data.inputs.kinds import MoleculeInputs, NoInputs, PromptInputs
from hf_bilb.errors import ExportError, MissingPackageError, OptionError, StorageError
from hf_bilb.inference.folder import find_folder, read_folder
from hf_bilb.inference.saved import FILE, SavedModel
from hf_bilb.storage.folders import check_output_folder

if TYPE_CHECKING:
    import onnx_ir

    from hf_bilb.inference.loaded import LoadedModel
    from hf_bilb.inference.pixels import LoadedPixelModel

MODEL_FILE, PAGE_FILE = "model.onnx", "README.md"
#: Where a model is larger than a file of ONNX may be, its weights lie here.
WEIGHTS_FILE = "model.onnx.data"
_LARGEST_FILE = 1_900_000_000  # bytes; protobuf ends at 2 GiB
#: Models of pixels, whose inputs are images whatever their data say.
_OF_PIXELS = ("dense_backbone", "mtan", "segnet")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where it lies.
        files: their names.
        differences: task -> the largest difference from torch; None: onnxruntime is not installed.
    """

    folder: Path
    files: tuple[str, ...]
    differences: dict[str, float] | None


def export_onnx(
    model: str | Path,
    output: str | Path | None = None,
    force: bool = False,
    atol: float = 1e-4,
    revision: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a model for texts, images or tables as ONNX, with what is needed to use it.

    The folder holds `model.onnx`, `hf_bilb.json`, `README.md`, and of texts the tokenizer. The inputs are called as the
    columns of a batch, the outputs as the tasks; adapters are merged into the weights, all numbers are float32. It is
    compared with torch before it is moved to its place.

    Args:
        model: the folder of a run, a checkpoint in it, or `owner/name` on the hub.
        output: the folder to write; None: `onnx` in that of the run, `<name>_onnx` here for one of the hub.
        force: write over an export that is there.
        atol: largest difference between a task's outputs and torch's; where they are above 1, of the largest one.
        revision, trust_remote_code: as of `hf_bilb.load`.
        say: is told what is done.

    Raises:
        OptionError: a model that is not exported, such as a language model; a folder that is there already.
        ExportError: torch cannot translate it, or the result computes something else.
        MissingPackageError: onnx and onnxscript are not installed.
        StorageError: it cannot be written.
        CheckpointError: as of `hf_bilb.load`.

    Cost: the model twice in memory, and three passes of it over a few rows.
    """
    check_packages()
    target = _target(Path(model).expanduser(), output)
    check_target(target, force)
    source = find_folder(model, revision)
    saved = read_folder(source)
    check_can_be_exported(source, saved)
    from hf_bilb.inference.language import LoadedLanguageModel
    from hf_bilb.inference.load import load

    say(f"loading {model}")
    loaded = load(source, "cpu", trust_remote_code=trust_remote_code)
    assert not isinstance(loaded, LoadedLanguageModel)  # it is refused above
    with _written_aside(target, force) as folder:
        differences = _export(loaded, saved, folder, Path(model).absolute().name, atol, say)
        files = tuple(sorted(path.name for path in folder.iterdir()))
    return Exported(target, files, differences)


# --- what is refused before anything is done ----------------------------------------------------------------------


def check_packages() -> None:
    """Raise `MissingPackageError` where torch's exporter could not work."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f'export needs {" and ".join(missing)}: pip install "hf-bilb[onnx]"')


def _target(model: Path, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output).expanduser()
    return model / "onnx" if model.is_dir() else Path(f"{model.name}_onnx")


def check_target(target: Path, force: bool) -> None:
    """Raise `OptionError` or `StorageError` where the folder cannot be, or shall not be, written."""
    check_output_folder(target, "--output")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise OptionError(f"--output: {shown(str(target))} is already there; --force writes over its files")
        if not (target / MODEL_FILE).is_file():
            raise OptionError(f"--output: {shown(str(target))} is already there, and holds no export to write over")


def check_can_be_exported(folder: Path, saved: SavedModel) -> None:
    """Raise `OptionError` for a model whose inputs or outputs ONNX, or this command, has no place for."""
    inputs = saved.format.inputs
    if isinstance(inputs, PromptInputs) or saved.model == "causal_lm":
        cause = "it is a language model, for which there is optimum: https://huggingface.co/docs/optimum-onnx"
    elif isinstance(inputs, MoleculeInputs) or saved.model == "mpnn":
        cause = "it reads graphs of molecules, which are not arrays of one shape"
    elif isinstance(inputs, NoInputs) and saved.model not in _OF_PIXELS:
        cause = f"nobody but its data set makes its inputs ({inputs.reason})"
    else:
        return
    raise OptionError(f"{folder}: is not exported: {cause}")


def _check_weights(loaded: LoadedModel | LoadedPixelModel) -> None:
    if any(not weights.is_floating_point() for weights in loaded.model.parameters()):
        raise OptionError(
            f"{loaded.folder}: is not exported: its weights are quantized here; without a GPU (CUDA_VISIBLE_DEVICES=) "
            "they are loaded in full"
        )


# --- the work -----------------------------------------------------------------------------------------------------


def _export(
    loaded: LoadedModel | LoadedPixelModel,
    saved: SavedModel,
    folder: Path,
    name: str,
    atol: float,
    say: Callable[[str], None],
) -> dict[str, float] | None:
    """Everything into `folder`; returns the differences from torch, by task."""
    from hf_bilb.inference.onnx.check import can_be_compared, differences, outputs_of
    from hf_bilb.inference.onnx.graph import merged, translate
    from hf_bilb.inference.onnx.made_up import made_up_inputs
    from hf_bilb.inference.pixels import LoadedPixelModel

    _check_weights(loaded)
    network: Any = loaded.model.float()
    tasks = saved.format.tasks or network.config.task_types
    tokenizer = None if isinstance(loaded, LoadedPixelModel) else loaded.tokenizer
    made_up = made_up_inputs(saved.format.inputs, network, tokenizer)
    # Of other sizes than the batch that is traced, and of adapters before they are merged.
    batches = [made_up.batch(1, False, seed=1), made_up.batch(3, True, seed=2)]
    pairs = [(batch, outputs_of(network, tasks, batch)) for batch in batches]
    say("translating it into ONNX")
    graph = translate(merged(network), tasks, made_up.batch(2, False, seed=0), made_up.axes)
    # Of a module of somebody's own the code stays where it is.
    described = replace(saved, format=replace(saved.format, tasks=tasks), module=None)
    _write(graph, described, tokenizer, folder, name)
    if not can_be_compared():
        say("onnxruntime is not installed: it was not compared with torch")
        return None
    found = differences(folder / MODEL_FILE, list(tasks), pairs)
    worst = max(found, key=lambda task: found[task])
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    say(f"compared with torch on {rows} made-up rows: the largest difference is {found[worst]:.1e}")
    if not found[worst] <= atol:
        raise ExportError(
            f"{loaded.folder}: is not exported: outputs of the task {worst!r} differ from torch's by "
            f"{found[worst]:.1e}, more than {atol:g}"
        )
    return found


def _write(graph: onnx_ir.Model, saved: SavedModel, tokenizer: Any, folder: Path, name: str) -> None:
    import onnx_ir

    from hf_bilb.inference.onnx.page import page_text

    described = saved.to_bytes()
    graph.producer_name, graph.producer_version = "hf_bilb", __version__
    graph.metadata_props.clear()
    graph.metadata_props["hf_bilb"] = described.decode()
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    inputs, outputs = ([_port(value) for value in values] for values in (graph.graph.inputs, graph.graph.outputs))
    opset = graph.opset_imports[""]
    page = page_text(saved, inputs, outputs, name, opset, __version__)
    try:
        onnx_ir.save(graph, folder / MODEL_FILE, external_data=WEIGHTS_FILE if size > _LARGEST_FILE else None)
        (folder / FILE).write_bytes(described)
        (folder / PAGE_FILE).write_text(page, encoding="utf-8", newline="\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise StorageError(f"--output: {folder.parent}: cannot be written: {error.strerror or error}") from None


def _port(value: onnx_ir.Value) -> Any:
    from hf_bilb.inference.onnx.page import Port

    assert value.shape is not None and value.dtype is not None and value.name is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return Port(value.name, shape, "float32" if value.dtype.name == "FLOAT" else value.dtype.name.lower())


@contextlib.contextmanager
def _written_aside(target: Path, force: bool) -> Iterator[Path]:
    """A folder to write to, whose files are moved to `target` at the end; after an error nothing is left of it.

    Of what `target` holds, files of the same names are written over, and weights of an export that was larger deleted.
    """
    missing = [folder for folder in (target, *target.parents) if not folder.exists()]
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"--output: {shown(str(target))} cannot be made: {error.strerror or error}") from None
        yield aside
        check_target(target, force)  # it may have been made in the meantime
        target.mkdir(exist_ok=True)
        (target / WEIGHTS_FILE).unlink(missing_ok=True)
        for path in sorted(aside.iterdir()):
            path.replace(target / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not target.is_dir():
            for folder in missing[1:]:
                with contextlib.suppress(OSError):
                    folder.rmdir()

"""Which folder is meant, and what is in it."""

from __future__ import annotations

from pathlib import Path

from hf_bilb.config.options import shown
from hf_bilb.config.pretrained import is_hub_name, no_folder
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.inference.saved import FILE, SavedModel, read_saved
from hf_bilb.inference.without_file import described_by_config

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin")


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder `name`, or that of a repository of the hub with this name, downloaded.

    Args:
        name: a run's folder, a checkpoint in it, or `owner/name` on the hub.
        revision: of the repository: a branch, tag or commit.

    Raises:
        OptionError: neither is there, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise OptionError(f"{shown(str(name))}: is a file, expected the folder of a run")
    if not is_hub_name(str(name)):
        raise OptionError(no_folder(str(path)))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision, ignore_patterns=["checkpoint-*"]))
    except (HfHubHTTPError, HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise OptionError(f"{no_folder(str(path))}, and the hub gives none: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def read_folder(folder: Path) -> SavedModel:
    """What the folder says of its model, in `hf_bilb.json`, or where it has none, as far as the config tells.

    Raises:
        CheckpointError: there is no model, or none yet.
    """
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise _no_model(folder)
    return read_saved(folder) if (folder / FILE).is_file() else described_by_config(folder)


def _no_model(folder: Path) -> CheckpointError:
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    if checkpoints:
        last = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        return CheckpointError(f"{folder}: this run has not finished; its last checkpoint is {last}")
    if (folder / "recipe.yaml").is_file():
        return CheckpointError(f"{folder}: this run has not finished, and has no checkpoint yet")
    if (folder / "model.onnx").is_file():
        return CheckpointError(f"{folder}: holds an ONNX model, which onnxruntime runs; its README.md says how")
    return CheckpointError(f"{folder}: holds no model: no weights are in it")

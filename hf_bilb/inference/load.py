"""`hf_bilb.load`: a run's folder, or a repository of the hub, becomes an object that predicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_bilb.config.options import shown
from hf_bilb.config.registry import MODELS
from hf_bilb.data.inputs.kinds import PixelInputs, PromptInputs, SceneInputs, TextInputs
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.inference.folder import find_folder, read_folder
from hf_bilb.inference.language import LoadedLanguageModel
from hf_bilb.inference.loaded import LoadedModel
from hf_bilb.inference.pixels import LoadedPixelModel
from hf_bilb.inference.saved import SavedModel

if TYPE_CHECKING:
    import torch
    from torch import nn


def load(
    folder_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel | LoadedPixelModel | LoadedLanguageModel:
    """A trained model with everything that predicting needs.

        model = hf_bilb.load("runs/reviews")
        model.predict(["Great service."]).to_pandas()

    Args:
        folder_or_hub_id: the folder of a run, a checkpoint in it, or `owner/name` on the hub.
        device: where it computes; None: the first accelerator (CUDA, MPS, ...), else the CPU.
        revision: of a repository on the hub: branch, tag or commit.
        trust_remote_code: run the Python file in the folder that builds the network, for runs of `torch_module`.

    Returns:
        `LoadedModel`; of tasks of pixels `LoadedPixelModel`, of a language model `LoadedLanguageModel`; in evaluation
        mode.

    Raises:
        OptionError: no such folder or repository or device; the network's file needs `trust_remote_code`; the encoder
            that adapters belong to cannot be loaded.
        CheckpointError: the folder holds no model (yet), or weights that do not match: none is left at random.
        MissingPackageError: a package that the model needs is not installed.

    Cost: reading the weights once.
    """
    folder = find_folder(folder_or_hub_id, revision)
    saved = read_folder(folder)
    target = _device(device)
    model = _model(folder, saved, trust_remote_code, str(folder_or_hub_id))
    if not getattr(model, "is_quantized", False):
        model = model.to(target)
    tokenizer = _tokenizer(folder, saved)
    if isinstance(saved.format.inputs, PromptInputs):
        return LoadedLanguageModel(model, tokenizer, saved.format, folder)
    if isinstance(saved.format.inputs, PixelInputs | SceneInputs):
        return LoadedPixelModel(model, saved.format, folder)
    return LoadedModel(model, tokenizer, saved.format, folder)


def _model(folder: Path, saved: SavedModel, trust_remote_code: bool, name: str) -> nn.Module:
    if saved.module is not None:
        return _own_module(folder, saved, trust_remote_code, name)
    if saved.model == "causal_lm":
        from hf_bilb.models.causal_lm import load_causal_lm

        return load_causal_lm(folder)
    if saved.model not in MODELS:
        raise CheckpointError(f"{folder}: its model {saved.model!r} is not known here; import what registers it first")
    try:
        model: nn.Module = MODELS[saved.model].model_class.from_pretrained(folder, dtype="auto")
    except (OSError, RuntimeError) as error:  # the latter: other shapes than the config's
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from None
    return model.eval()


def _own_module(folder: Path, saved: SavedModel, trust_remote_code: bool, name: str) -> nn.Module:
    """The network that somebody's own code builds."""
    assert saved.module is not None
    factory = str(saved.module["factory"])
    if not trust_remote_code:
        raise OptionError(
            f"{name}: its network is built by {factory}, code that comes with it: pass trust_remote_code=True "
            "(--trust-remote-code) to run it"
        )
    from hf_bilb.models.torch_module import TorchModuleOptions, build_torch_module
    from hf_bilb.storage.weights import load_weights

    source = factory.rpartition(":")[0]
    reference = str(folder / factory) if source.endswith(".py") else factory
    options = TorchModuleOptions(reference, saved.module["arguments"])
    tasks = {"tasks": saved.format.tasks} if saved.module["needs_tasks"] else {}
    model = build_torch_module(options, **saved.module["dictated"], **tasks)
    load_weights(model, folder)
    return model.eval()


def _tokenizer(folder: Path, saved: SavedModel) -> Any:
    if not isinstance(saved.format.inputs, TextInputs | PromptInputs):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: has no tokenizer: {error}") from None


def _device(asked: str | torch.device | None) -> torch.device:
    import torch

    if asked is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OptionError(f"device: {shown(str(asked))} cannot be used here: {str(error).splitlines()[0]}") from None
    return device

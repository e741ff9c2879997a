"""Adapters of peft in checkpoints: each comes back to the bit, and so does what is trained in addition to them.

peft saves the adapters and what is named in `modules_to_save`. Whatever else training moves (a parameter that was
unfrozen by hand, the running statistics of a normalization layer, the network behind a learned prompt) goes into a file
of its own here.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import PreTrainedModel

from hf_bilb.errors import CheckpointError
from hf_bilb.storage.tensor_files import Differences, read_tensors, same_bits, storage

BESIDE = "beside_adapters.safetensors"


def has_adapters(model: nn.Module) -> bool:
    """Whether of `model`, which nothing is wrapped around, the adapters alone are saved."""
    # `add_adapter` of transformers puts adapters into a model without wrapping it.
    return isinstance(model, PeftModel) or (isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded)


def moved_beside(model: nn.Module) -> dict[str, Tensor]:
    """What training moves and peft does not save, by its name in the state of `model`, in the model's own memory."""
    saved = {storage(tensor) for _, state in _adapters(model) for tensor in state.values()}
    moved = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for prefix, module in model.named_modules():
        # peft keeps what it has replaced, but no batch passes through it.
        if isinstance(module, _NormBase) and module.track_running_stats and "original_module" not in prefix.split("."):
            moved |= {f"{prefix}.{name}" for name, _ in module.named_buffers()}
    return {name: t for name, t in model.state_dict().items() if name in moved and storage(t) not in saved}


def save_beside(model: nn.Module, folder: str | Path) -> None:
    """Write `moved_beside(model)` into `folder`, where there is any."""
    tensors = {name: t.to("cpu", copy=True).contiguous() for name, t in moved_beside(model).items()}
    if tensors:
        save_file(tensors, Path(folder) / BESIDE)


def load_adapters(model: nn.Module, folder: str | Path) -> None:
    """Set adapters, and what is trained in addition to them, in place to what `folder` holds.

    Raises:
        CheckpointError: files that are missing or damaged, or do not match the model; it is as it was then.
    """
    path = Path(folder)
    memory = {storage(tensor) for tensor in model.state_dict().values()}
    differences, targets, values = Differences(), {}, {}
    for name, expected in _adapters(model):
        found = _read_adapter(path, name)
        if not any(storage(t) in memory for t in expected.values()) and not (path / BESIDE).is_file():
            _load_prompt(model, path, name)
            return
        differences.compare(found, expected)
        # A learned prompt is computed when it is saved; the network that computes it lies beside.
        targets.update({(name, n): t for n, t in expected.items() if storage(t) in memory})
        values.update({(name, n): t for n, t in found.items()})
    beside = moved_beside(model)
    found = read_tensors([path / BESIDE] if (path / BESIDE).is_file() else [])
    differences.compare(found, beside)
    if differences:
        raise CheckpointError(f"{folder}: its adapters do not match the model: {differences}")
    for key, tensor in targets.items():
        tensor.copy_(values[key])
    for name, tensor in beside.items():
        tensor.copy_(found[name])


def _load_prompt(model: nn.Module, folder: Path, name: str) -> None:
    """A prompt that `Trainer` has saved: peft finds the network again where there is none but a table."""
    assert isinstance(model, PeftModel)
    try:
        model.load_adapter(str(folder / _subfolder(name)), name, is_trainable=True)
    except (RuntimeError, KeyError) as error:
        raise _refused(folder, error) from None
    check_adapters(model, folder)


def with_adapters(model: nn.Module, folder: str | Path) -> PeftModel:
    """`model` with the adapters in `folder`, and what was trained in addition to them, not to be trained.

    Raises:
        CheckpointError: they do not match the model.
    """
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, KeyError) as error:  # other shapes; a module to save that is not there
        raise _refused(folder, error) from None
    check_adapters(adapted, folder)
    if (Path(folder) / BESIDE).is_file():
        load_adapters(adapted, folder)
    return adapted.eval()


def _refused(folder: str | Path, error: Exception) -> CheckpointError:
    # Of a tensor that it misses, peft says the name alone.
    text = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
    return CheckpointError(f"{folder}: its adapters do not match the model: {text}")


def check_adapters(model: nn.Module, folder: str | Path) -> None:
    """Raise `CheckpointError` unless the adapters of `model` are those in `folder`, to the bit."""
    differences = Differences()
    for name, expected in _adapters(model):
        found = _read_adapter(Path(folder), name)
        differences.compare(found, expected)
        differences.other_values += [n for n in expected if n in found and not same_bits(found[n], expected[n].cpu())]
    if differences:
        raise CheckpointError(f"{folder}: its adapters do not match the model: {differences}")


def _adapters(model: nn.Module) -> list[tuple[str, dict[str, Tensor]]]:
    """Name and state of each adapter, with the names that a file of it has; almost all in the model's own memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says at every turn that embeddings are saved as well
        if isinstance(model, PeftModel):
            return [(name, get_peft_model_state_dict(model, adapter_name=name)) for name in model.peft_config]
        assert isinstance(model, PreTrainedModel)
        name = model.active_adapters()[0]  # more than one at a time are not saved
        return [("default", {f"base_model.model.{n}": t for n, t in model.get_adapter_state_dict(name).items()})]


def _read_adapter(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / _subfolder(name)
    pickled = path / WEIGHTS_NAME
    return read_tensors([pickled if pickled.is_file() else path / SAFETENSORS_WEIGHTS_NAME])


def _subfolder(adapter: str) -> str:
    return "" if adapter == "default" else adapter

"""Weights as files: what of a model is saved, and how every tensor of it comes back to the bit.

transformers saves some models (ViT, Swin, Mixtral, ...) under other names, or merged and split otherwise, than their
modules have them; `from_pretrained` maps them back, `load_state_dict` does not. Here every file goes through that
mapping, and what is left unmatched on either side is an error: a model is restored whole, or not at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel

from hf_bilb.errors import CheckpointError
from hf_bilb.storage.tensor_files import (
    Differences,
    is_same_view,
    overlap,
    read_tensors,
    same_bits,
    shared,
    storage,
    weight_files,
)

logger = logging.getLogger(__name__)

_COMPILED = "_orig_mod."  # what `torch.compile` puts into the names of the tensors of a module that it wraps


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without what distributes it, or compiles it as a whole."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def named_tensors(model: nn.Module) -> dict[str, Any]:
    """The model's state, in its own memory; names do not tell whether a module in it is compiled."""
    return {name.replace(_COMPILED, ""): value for name, value in model.state_dict().items()}


# --- saving -------------------------------------------------------------------------------------------------------


def check_savable(model: nn.Module) -> None:
    """Raise `CheckpointError`, one line, where the state of `model` holds what could not be saved or loaded again."""
    for name, value in named_tensors(unwrapped(model)).items():
        if is_lazy(value):
            continue  # a lazy module: it gets its shape in the first forward pass
        reason = None
        if not isinstance(value, Tensor):
            reason = f"is of type {type(value).__name__}, and a checkpoint holds tensors alone"
        elif value.layout != torch.strided:
            reason = f"has the layout {value.layout}, and a checkpoint holds dense tensors alone"
        elif storage(value) is not None and any(
            stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)
        ):
            reason = "was expanded: several of its entries are one place in memory; call contiguous() on it"
        if reason is not None:
            raise CheckpointError(f"the model cannot be saved: {name} {reason}")


def state_to_save(model: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a file of `model` holds: memory that several names share is written once, under the first of them.

    Names that transformers knows as tied are left to it. Where views overlap in part, each is written: read back into
    the same views, they give the same memory.

    Args:
        model: any module, but for one with adapters.
        state: its state, where that was gathered from several processes.
    """
    bare = unwrapped(model)
    given = bare.state_dict() if state is None else state
    result = {name.replace(_COMPILED, ""): value for name, value in given.items()}
    for names in _undeclared(bare, result):
        kept: list[Tensor] = []
        for name in names:
            if any(is_same_view(result[name], other) for other in kept):
                del result[name]
            else:
                # The first comparison stays with the model's own memory, which a copy is not.
                kept.append(result[name])
                if any(overlap(result[name], other) for other in kept[:-1]):
                    result[name] = result[name].clone()
    return {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in result.items()}


def is_plainly_saved(model: nn.Module) -> bool:
    """Whether `save_pretrained` alone saves `model` rightly: no name in it is of a compiled module, and transformers
    knows of all memory that several names share."""
    names = model.state_dict()
    return not any(_COMPILED in name for name in names) and not _undeclared(model, names)


def _undeclared(model: nn.Module, state: Mapping[str, Any]) -> list[list[str]]:
    """Names that share a storage, two or more at a time, without those that transformers leaves out when it saves."""
    ties = [
        re.compile(f"{re.escape(prefix)}.{pattern}" if prefix else pattern)
        for prefix, module in model.named_modules()
        if isinstance(model, PreTrainedModel) and isinstance(module, PreTrainedModel)
        for pattern in (module._tied_weights_keys or ())
    ]
    groups = [[name for name in names if not any(tie.search(name) for tie in ties)] for names in shared(state)]
    return [names for names in groups if len(names) > 1]


# --- loading ------------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Set every tensor of `model`, in place, to what the weights in `folder` hold.

    Names and layouts go through the mapping of `from_pretrained`. Tensors that are one in memory may be saved under one
    of their names; those that their class leaves out of what it saves, and that are not trained, stay.

    Raises:
        CheckpointError: no weights, damaged ones, or ones that do not match the model; it is as it was then.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"Can't find a valid checkpoint at {folder}: it holds no weights of a model")
    bare = unwrapped(model)
    live = named_tensors(bare)
    found, differences = _matched(bare, live, read_tensors(files))
    if differences:
        raise CheckpointError(f"{folder}: its weights do not match the model: {differences}")
    _say_other_types(folder, found, live)
    bare.load_state_dict({name: found[name.replace(_COMPILED, "")] for name in bare.state_dict()})
    for names in shared(live):
        if not all(same_bits(live[name], found[name].to(live[name])) for name in names):
            both = " and ".join(names[:2])
            raise CheckpointError(f"{folder}: {both} share memory in the model, but not in these weights")


def _matched(
    model: nn.Module, live: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Differences]:
    """`saved` under the names of `model`, by the first mapping that leaves nothing unmatched, else by the first one."""
    first: tuple[dict[str, Tensor], Differences] | None = None
    for mapping in _mappings(model):
        found, unexpected = _renamed(model, mapping, live, saved)
        _fill(model, live, found)
        differences = Differences()
        differences.compare(found, live)
        differences.unexpected += [name for name in unexpected if not _may_be_left(model, name, saved)]
        if not differences:
            return found, differences
        first = first or (found, differences)
    assert first is not None
    return first


def _mappings(model: nn.Module) -> list[list[Any]]:
    """The mappings that a file of `model` may have been written with: of its class, of the file that it was loaded
    from, none."""
    if not isinstance(model, PreTrainedModel):
        return [[]]
    # Kept out of the module's head: these are internals of transformers, which peft uses as well.
    from transformers.conversion_mapping import get_model_conversion_mapping

    own = model.__dict__.get("_weight_conversions")
    mappings = [get_model_conversion_mapping(model), *([deepcopy(own)] if own else []), []]
    for transform in (transform for mapping in mappings for transform in mapping):
        if transform.scope_prefix:
            transform.scope_prefix = f"{transform.scope_prefix}.".replace(_COMPILED, "").removesuffix(".")
    return mappings


def _renamed(
    model: nn.Module, mapping: Sequence[Any], live: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """`saved` as `mapping` makes it, and the names in it that the model does not have then.

    The counterpart of transformers' `revert_weight_conversion`, which a file was saved with.
    """
    if not mapping:
        plain = {name.replace(_COMPILED, ""): tensor for name, tensor in saved.items()}
        return {name: tensor for name, tensor in plain.items() if name in live}, [n for n in plain if n not in live]
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    assert isinstance(model, PreTrainedModel)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    conversions: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for key in sorted(saved, key=dot_natural_key):
        plain_key = key.replace(_COMPILED, "")
        name, pattern = rename_source_key(plain_key, renamings, converters)
        if name not in live and plain_key in live:
            name, pattern = plain_key, None
        elif name not in live:
            # A prefix comes or goes where nothing else fits: a model may have `norm` and `<prefix>.norm` (Pixio).
            name, pattern = rename_source_key(plain_key, renamings, converters, model.base_model_prefix, live)
        if name not in live or name in found:
            unexpected.append(key)
        elif pattern is None:
            found[name] = saved[key]
        else:
            conversion = conversions.setdefault(name, deepcopy(by_pattern[pattern]))
            conversion.add_tensor(name, plain_key, pattern, saved[key])
    for name, conversion in conversions.items():
        try:
            converted = conversion.convert(name, model=model, config=model.config)
        except Exception as error:  # whatever torch or transformers make of tensors that do not go together
            unexpected.append(f"{name}: {str(error).partition(chr(10))[0]}")
            continue
        found.update({target: value[0] if isinstance(value, list) else value for target, value in converted.items()})
    return found, unexpected


def _fill(model: nn.Module, live: Mapping[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add to `found` the names that no file has to hold: another name of a tensor in it, and what stays as it is."""
    for names in shared(live):
        for name in names:
            if name not in found:
                other = next((n for n in names if n in found and is_same_view(live[n], live[name])), None)
                if other is not None:
                    found[name] = found[other]
    trained = {
        name.replace(_COMPILED, "") for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    for name in live.keys() - found.keys() - trained:
        if _is_left_out(model, name):
            found[name] = live[name]


def _is_left_out(model: nn.Module, name: str) -> bool:
    """Whether the model's class leaves `name` out of what it saves, or does without it in what it loads."""
    if not isinstance(model, PreTrainedModel):
        return False
    patterns = model._keys_to_ignore_on_load_missing or ()
    return name in (model._keys_to_ignore_on_save or ()) or any(re.search(pattern, name) for pattern in patterns)


def _may_be_left(model: nn.Module, name: str, saved: Mapping[str, Tensor]) -> bool:
    """Whether nothing is lost with a tensor that the model's state has no place for."""
    buffer = dict(model.named_buffers()).get(name)
    if buffer is not None and name in saved and same_bits(buffer, saved[name]):
        return True  # a constant that is not saved any more, such as position ids
    patterns = model._keys_to_ignore_on_load_unexpected or () if isinstance(model, PreTrainedModel) else ()
    return any(re.search(pattern, name) for pattern in patterns)


def _say_other_types(folder: str | Path, found: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    other = [name for name in live if found[name].dtype != live[name].dtype]
    if other:
        name = other[0]
        logger.warning(
            "%s: %d of its weights are of another type than the model's and are converted: %s is %s there, %s here",
            *(folder, len(other), name, found[name].dtype, live[name].dtype),
        )

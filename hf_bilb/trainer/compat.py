"""What this package uses of transformers and accelerate that their documentation does not promise, and a look at it.

Both may rename such a name in any minor release, and Python would say so in the middle of a training, or never: an
override that nobody calls fails silently. Where an installed version is not among the tested ones, `check_versions`
therefore looks for every name when a Trainer is built.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from types import FunctionType
from typing import Any

from packaging.version import Version
from transformers import TrainingArguments

from hf_bilb.errors import TrainerError

#: The versions in whose source the names below were read: those of constraints.txt.
READ_IN = {"transformers": "5.23.0", "accelerate": "1.15.0"}
#: The lowest version that the tests ran with: the bounds of pyproject.toml (`campaigns/lowest_versions.py`).
LOWEST = {"transformers": "5.21.0", "accelerate": "1.13.0"}

#: Owner (a class, or a module) -> the names that are overridden, called or set.
PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    # overridden: what is ours is done there, and is not done where Trainer calls another name
    "transformers.trainer.Trainer": (
        "_determine_best_metric",
        "_get_collator_with_removed_columns",
        "_get_dataloader",
        "_get_grad_norm",
        "_get_num_items_in_batch",
        "_get_output_dir",
        "_get_train_sampler",
        "_hp_search_setup",
        "_init_training_state",
        "_inner_training_loop",
        "_issue_warnings_after_load",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_load_scaler",
        "_push_from_checkpoint",
        "_remove_unused_columns",
        "_run_epoch",
        "_save",
        "_save_checkpoint",
        "_save_optimizer_and_scheduler",
        "_save_rng_state",
        "_save_scaler",
        "_set_signature_columns_if_needed",
        "_validate_args",
        # called, read or set
        "_created_lr_scheduler",
        "_prepare_inputs",
        "_signature_columns",
        "_train_batch_size",
    ),
    "transformers.modeling_utils.PreTrainedModel": (
        "_hf_peft_config_loaded",
        "_init_weights",
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "_keys_to_ignore_on_save",
        "_tied_weights_keys",
    ),
    # imported when a checkpoint is loaded, long after the start
    "transformers.conversion_mapping": ("get_model_conversion_mapping",),
    "transformers.core_model_loading": (
        "WeightConverter",
        "WeightRenaming",
        "_weight_conversions",
        "dot_natural_key",
        "rename_source_key",
    ),
    # set to skip an optimizer step on all ranks
    "accelerate.optimizer.AcceleratedOptimizer": ("_is_overflow",),
    "accelerate.state.GradientState": ("_set_sync_gradients",),
}

#: Field of `TrainingArguments`, and end of a property of `PreTrainedModel`: renamed in 5.23.
ACTIVATION_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


def checkpoints_activations(args: TrainingArguments, model: Any) -> bool:
    """Whether activations are computed again in the backward pass, by the arguments or by the model's own doing."""
    return bool(getattr(args, ACTIVATION_CHECKPOINTING) or getattr(model, f"is_{ACTIVATION_CHECKPOINTING}", False))


def check_versions(installed: Mapping[str, str] | None = None) -> None:
    """Look for the private names where transformers or accelerate is of another minor version than the tested ones.

    Args:
        installed: package -> version; None asks the installed packages.

    Raises:
        TrainerError: names that are not there; one line with the versions and the names.

    Cost: nothing for tested versions; else some milliseconds, once.
    """
    found = _installed() if installed is None else installed
    untested = [package for package in READ_IN if not _is_tested(package, found[package])]
    missing = missing_names(untested)
    if missing:
        shown = ", ".join(f"{package} {found[package]}" for package in untested)
        tested = ", ".join(f"{package} {LOWEST[package]} to {READ_IN[package]}" for package in untested)
        raise TrainerError(
            f"hf_bilb does not know this version of {shown}: {', '.join(missing)} is not there any more; "
            f"install a tested one ({tested}) or a newer hf_bilb"
        )


def missing_names(packages: Sequence[str], names: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """`Owner.name` of what the packages lack of the `names` (default: `PRIVATE_NAMES`), or the owner that is gone."""
    missing = []
    for path, wanted in (PRIVATE_NAMES if names is None else names).items():
        if path.partition(".")[0] not in packages:
            continue
        owner = _owner(path)
        if owner is None:
            missing.append(path)
        else:
            has = _names_of(owner)
            missing += [f"{path.rpartition('.')[2]}.{name}" for name in wanted if name not in has]
    return missing


@functools.cache
def _installed() -> dict[str, str]:
    return {package: version(package) for package in READ_IN}


def _is_tested(package: str, installed: str) -> bool:
    """Whether its minor version lies among the tested ones; patch releases and builds do not count."""
    lowest, minor, read_in = (Version(text).release[:2] for text in (LOWEST[package], installed, READ_IN[package]))
    return lowest <= minor <= read_in


def _owner(path: str) -> Any:
    """The module or class; None where it is gone."""
    try:
        return import_module(path)
    except ImportError:
        module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def _names_of(owner: Any) -> set[str]:
    """Attributes, and what its functions and methods set or read: attributes of instances."""
    names = set(dir(owner))
    for scope in owner.__mro__ if isinstance(owner, type) else (owner,):
        names.update(*(f.__code__.co_names for f in vars(scope).values() if isinstance(f, FunctionType)))
    return names

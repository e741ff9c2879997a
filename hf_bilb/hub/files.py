"""Which files of a folder are the model: what `from_pretrained` and `hf_bilb.load` read."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

#: The folder of the repository with the last checkpoint, under Trainer's strategy `checkpoint`.
LAST_CHECKPOINT = "last-checkpoint"
_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
    "adapter_model.bin",
)  # fmt: skip
#: Files of the model; of tokenizers there are many kinds.
_OTHERS = (
    "config.json", "generation_config.json", "adapter_config.json", "hf_bilb.json",
    "*tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.jinja", "*processor*.json", "*.py",
)  # fmt: skip
#: Those of weights in a checkpoint that are not the model's.
_BALANCER = "balancer*"
#: Those with the code of a packaged model, which a push makes anew (`hub/remote_code.py`).
_CODE = "hf_bilb_*.py"
#: Left from another push they would be loaded, or tell of its run. `training_args.bin` is a pickle, with paths in it.
REPLACED = (
    "model*.safetensors", "model*.safetensors.index.json", "adapter_*", "beside_adapters.safetensors",
    "pytorch_model*", "hf_bilb.json", "config.json", "training_args.bin", _CODE,
)  # fmt: skip


def model_files(folder: Path) -> dict[str, Path]:
    """Name -> file of the model in a run's folder, or in a checkpoint; empty where there are no weights.

    Not those that training alone needs: optimizer, balancer, random state.
    """
    here = [path for path in sorted(folder.iterdir()) if path.is_file() and not _is_no_part(path.name)]
    if not any(fnmatch(path.name, pattern) for path in here for pattern in _WEIGHTS):
        return {}
    return {path.name: path for path in here if any(fnmatch(path.name, p) for p in (*_WEIGHTS, *_OTHERS))}


def _is_no_part(name: str) -> bool:
    return fnmatch(name, _BALANCER) or fnmatch(name, _CODE)


def files_of(folder: Path, place: str) -> dict[str, Path]:
    """All files of a checkpoint, by their paths in the repository's folder `place`."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {f"{place}/{file.relative_to(folder).as_posix()}": file for file in files}

"""Is a checkpoint whole, and is it what was saved? Nothing is loaded and nothing is changed.

What a resume would load without noticing must be what was saved, bit for bit: weights, optimizer, schedule, random
state, balancer. What people change or delete on purpose is let through with a word: JSON files, files that a resume can
do without, weights that were put into other files as a whole.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_bilb.errors import CheckpointError
from hf_bilb.storage.checkpoint_marker import MARKER, Marker, digests, read_marker

STAGING = "_incomplete"
TENSORS, DESCRIPTION = "balancer.safetensors", "balancer.json"
STATE = "trainer_state.json"
#: What `Trainer` loads weights from, in its order.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$|pytorch_model_fsdp"
)
_TENSOR_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".distcp", ".metadata"}
_NEVER_LOADED = {"training_args.bin"}
#: Kind of file -> what its absence means for the run that goes on.
_FRESH = {
    "optimizer": "optimizer and learning rate schedule",
    "scaler": "gradient scaler",
    "random": "random numbers",
    "balancer": "balancer",
}
#: Kind of file -> what it is called in a checkpoint of one process.
_USUAL = {
    "optimizer": ("optimizer.pt or scheduler.pt",),
    "random": ("rng_state.pth",),
    "balancer": (TENSORS, DESCRIPTION),
}


@dataclass(frozen=True)
class Findings:
    """What is not as it was saved in a checkpoint that can be loaded all the same.

    Attributes:
        folder: the checkpoint.
        marker: what its marker says; None where there is none.
        gone: saved files that are missing.
        changed: saved files, no tensors, with other content.
        moved_weights: the weights lie in other files than they were saved in.
        fresh: keys of what is not restored: optimizer, scaler, random, balancer.
    """

    folder: Path
    marker: Marker | None
    gone: tuple[str, ...]
    changed: tuple[str, ...]
    moved_weights: bool
    fresh: tuple[str, ...]

    @property
    def finite(self) -> bool:
        """Whether the saved weights are all finite; taken for granted where nothing tells."""
        return self.marker is None or self.marker.finite_weights is not False

    def describe(self, balancing: bool) -> str | None:
        """One line that names all of it; None where there is nothing to say.

        Args:
            balancing: several tasks are balanced; else nothing is said of balancers.
        """
        gone = [name for name in self.gone if balancing or _kind(name) != "balancer"]
        fresh = [_FRESH[key] for key in self.fresh if balancing or key != "balancer"]
        said = []
        if self.marker is None:
            gone = [name for key in self.fresh if balancing or key != "balancer" for name in _USUAL[key]]
            said.append(
                f"{MARKER} is missing (a checkpoint of Trainer has none), so that nothing tells whether its files are "
                "what was saved"
            )
        elif "optimizer" in self.fresh and not any(_kind(name) == "optimizer" for name in gone):
            said.append("holds the model alone (save_only_model)")
        elif balancing and "balancer" in self.fresh and not any(_kind(name) == "balancer" for name in gone):
            said.append("holds no balancer state")
        said += [f"{name} is missing" for name in gone]
        said += [f"{name} was changed after it was saved" for name in self.changed]
        if self.moved_weights:
            said.append("its weights lie in other files than those that were saved, so that nothing tells whether "
                        "they are what was saved")  # fmt: skip
        if not self.finite:
            said.append("its weights are NOT FINITE")
        if not said:
            return None
        starts = f"; what starts FRESH: {', '.join(fresh)}" if fresh else ""
        return f"{self.folder}: {'; '.join(said)}{starts}"


def verify(checkpoint: str | Path, *, thorough: bool = True, model_alone: bool = False) -> Findings:
    """See whether `checkpoint` can be loaded and is what was saved.

    Args:
        thorough: take the SHA-256 of the files, too (for its cost see `hf_bilb.storage.checkpoint_marker.digests`);
            else only their sizes are looked at. Without SHA-256 in the marker, or without a marker, files of tensors
            are opened and their own checksums, where they have some, are compared (of `torch.save`; about 1 s per GB).
        model_alone: look at weights and balancer only: no run is to go on from it.

    Raises:
        CheckpointError: it cannot be loaded, or a file of tensors is not what was saved. One line that names the file.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise _invalid(folder, "there is no such checkpoint folder")
    marker = read_marker(folder)
    sizes = {} if marker is None else marker.sizes
    if model_alone:
        sizes = {name: size for name, size in sizes.items() if _kind(name) in ("weights", "balancer")}
    gone = [name for name in sizes if not (folder / name).is_file()]
    different = _different(folder, {name: size for name, size in sizes.items() if name not in gone}, marker, thorough)
    moved = _weights_moved(folder, set(sizes), {*gone, *different})
    if moved:
        gone = [name for name in gone if _kind(name) != "weights"]
        different = {name: how for name, how in different.items() if _kind(name) != "weights"}
    for name in gone:
        _check_dispensable(folder, name, gone)
    for name, how in different.items():
        _check_harmless(folder / name, how)
    if DESCRIPTION in different and marker is not None:
        _check_same_run(folder / DESCRIPTION, marker, different[DESCRIPTION])
    if marker is None:
        _check_unmarked(folder, model_alone)
    if not model_alone and (thorough or marker is None):
        check_state(folder)
    fresh = (*_fresh(folder), *(["scaler"] if "scaler.pt" in gone else []))
    return Findings(folder, marker, tuple(gone), tuple(different), moved, fresh)


def has_balancer(folder: str | Path) -> bool:
    """Whether `folder` holds a balancer's files, or one of them (a `save_only_model` checkpoint does not)."""
    return (Path(folder) / TENSORS).is_file() or (Path(folder) / DESCRIPTION).is_file()


def has_whole_balancer(folder: str | Path) -> bool:
    """Whether `folder` holds both of a balancer's files."""
    return (Path(folder) / TENSORS).is_file() and (Path(folder) / DESCRIPTION).is_file()


def check_as_saved(folder: Path, names: Iterable[str]) -> None:
    """Raise `CheckpointError` when one of the files `names` is not what the marker of `folder` says; without a marker,
    or for a file that it does not list, there is nothing to compare."""
    marker = read_marker(folder)
    if marker is not None:
        sizes = {name: marker.sizes[name] for name in names if name in marker.sizes}
        for name, how in _different(folder, sizes, marker, thorough=True).items():
            raise CheckpointError(f"{folder / name}: {how}")


def check_state(folder: Path) -> dict[str, Any]:
    """The content of `trainer_state.json`, without which a run does not know where it goes on.

    Raises:
        CheckpointError: it is missing or damaged, or lacks the step.
    """
    path = folder / STATE
    if not path.is_file():
        raise _invalid(folder, f"{path}: is missing")
    state = _read_json(path)
    step = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"{path}: is damaged: global_step is {step!r}, expected the number of a step")
    if not isinstance(state.get("log_history", []), list):
        raise CheckpointError(f"{path}: is damaged: log_history is no list")
    return dict(state)


# --- one file -----------------------------------------------------------------------------------------------------


def _kind(name: str) -> str:
    """`weights`, `optimizer`, `scaler`, `random`, `balancer` or `other`, by the file's name."""
    first = PurePath(name).parts[0]
    if name in (TENSORS, DESCRIPTION):
        return "balancer"
    if _WEIGHTS.match(first) or PurePath(name).name in _ADAPTERS:
        return "weights"
    for kind, beginnings in (("optimizer", ("optimizer", "scheduler")), ("random", ("rng_state",))):
        if first.startswith(beginnings):
            return kind
    return "scaler" if first == "scaler.pt" else "other"


def _holds_tensors(name: str) -> bool:
    path = PurePath(name)
    return (path.suffix in _TENSOR_SUFFIXES or path.name in _TENSOR_SUFFIXES) and path.name not in _NEVER_LOADED


def _different(folder: Path, sizes: dict[str, int], marker: Marker | None, thorough: bool) -> dict[str, str]:
    """The files of another size or SHA-256 than the marker says -> how they differ."""
    if marker is None:
        return {}
    found = {name: (folder / name).stat().st_size for name in sizes}
    different = {
        name: f"is damaged or truncated: {found[name]} bytes, expected {size}"
        for name, size in sizes.items()
        if found[name] != size
    }
    same_size = [name for name in sizes if name not in different]
    if thorough and marker.digests:
        for name, digest in digests(folder, same_size).items():
            if digest != marker.digests[name]:
                saved = marker.digests[name]
                different[name] = (
                    f"is damaged or another run's: its SHA-256 is {digest[:12]}..., saved was {saved[:12]}..."
                )
    elif thorough:
        for name in filter(_holds_tensors, same_size):
            _check_opens(folder / name)
    return different


def _check_opens(path: Path) -> None:
    """What can be told of a file of tensors that nothing was noted about."""
    if path.suffix == ".safetensors":
        _tensor_names(path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    whole = archive.testzip() is None
            else:
                with path.open("rb") as file:
                    whole = file.read(1) == b"\x80"  # a pickle, the form before
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path}: is damaged or truncated")


def _tensor_names(path: Path) -> set[str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is truncated or no safetensors file ({error})") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no UTF-8, no JSON
        raise CheckpointError(f"{path}: is damaged: it is no JSON") from None


def _check_dispensable(folder: Path, name: str, gone: list[str]) -> None:
    """A missing file, that a run can go on without."""
    nested = len(PurePath(name).parts) > 1
    top = PurePath(name).parts[0]
    whole_folder_gone = nested and _kind(name) == "optimizer" and not (folder / top).exists()
    if _kind(name) == "weights" or name == STATE or (nested and _holds_tensors(name) and not whole_folder_gone):
        raise _invalid(folder, f"{folder / name}: is missing")


def _check_harmless(path: Path, how: str) -> None:
    """A file with another content, that is no tensors and can be read."""
    if _holds_tensors(path.name):
        raise CheckpointError(f"{path}: {how}")
    if path.suffix == ".json":
        try:
            _read_json(path)
        except CheckpointError:
            raise CheckpointError(f"{path}: {how}") from None


def _check_same_run(description: Path, marker: Marker, how: str) -> None:
    """Somebody may have edited it; it may not come from another run."""
    content = _read_json(description)
    run = content.get("run") if isinstance(content, dict) else None
    if run != marker.run:
        raise CheckpointError(f"{description}: {how}")


# --- weights ------------------------------------------------------------------------------------------------------


def _weights_moved(folder: Path, saved: set[str], odd: set[str]) -> bool:
    """Whether the weights that would be loaded lie in other files than the saved ones, all of them.

    One file whose content differs is no such thing: it is damaged, or another run's. Neither is a part of the shards.

    Raises:
        CheckpointError: they do, and index and shards do not agree.
    """
    if not any(_kind(name) == "weights" for name in odd):
        return False
    index, files = loaded_weights(folder)
    decides = files[0] if index is None and files else index
    if decides is None or (decides in saved and (index is None or index not in odd)):
        return False
    if any(name in saved and name not in odd for name in files):
        return False
    _check_weights(folder, index, files)
    return True


def loaded_weights(folder: Path) -> tuple[str | None, list[str]]:
    """The files that `Trainer` loads weights from: name of the index, if it takes one, and those of the tensors."""
    for names in (_WHOLE, _ADAPTERS):
        if found := next((name for name in names if (folder / name).is_file()), None):
            return None, [found]
    for index in _INDEXES:
        if (folder / index).is_file():
            return index, sorted(set(_weight_map(folder / index).values()))
    return None, []


def _weight_map(path: Path) -> dict[str, str]:
    found = _read_json(path)
    parts = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise CheckpointError(f"{path}: is damaged: weight_map is no mapping")
    return parts


def _check_weights(folder: Path, index: str | None, files: list[str]) -> None:
    """Nothing was noted about them: all there, readable, and what the index says."""
    for name in files:
        if not (folder / name).is_file():
            raise _invalid(folder, f"{folder / name}: is missing")
        _check_opens(folder / name)
    if index is None:
        return
    parts = _weight_map(folder / index)
    for name in (name for name in files if name.endswith(".safetensors")):
        listed = {key for key, file in parts.items() if file == name}
        if odd := sorted(listed ^ _tensor_names(folder / name)):
            raise CheckpointError(f"{folder / name}: does not agree with {index}: {odd[0]!r} is in one of them only")


# --- without a marker ---------------------------------------------------------------------------------------------


def _check_unmarked(folder: Path, model_alone: bool) -> None:
    """A checkpoint that nothing is known about: `Trainer` writes `trainer_state.json` last."""
    if folder.parent.name == STAGING or not (model_alone or (folder / STATE).is_file()):
        raise _invalid(folder, f"{folder} has no {MARKER}: writing it was not finished")
    index, files = loaded_weights(folder)
    in_folders = any(path.is_dir() and _is_sharded(path) for path in folder.iterdir())
    if not files and not in_folders:
        raise _invalid(folder, "it holds no weights")
    _check_weights(folder, index, files)
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            _read_json(folder / name)
    for path in sorted(folder.iterdir()) if not model_alone else ():
        if path.is_file() and _kind(path.name) in ("optimizer", "scaler", "random"):
            _check_opens(path)


def _is_sharded(path: Path) -> bool:
    """Of FSDP, of DeepSpeed, or an adapter among several."""
    return path.name.startswith(("pytorch_model_fsdp", "global_step")) or any(
        (path / name).is_file() for name in _ADAPTERS
    )


def _fresh(folder: Path) -> tuple[str, ...]:
    """What `Trainer`, and the balancer, will not find in it."""
    names = {path.name for path in folder.iterdir()}
    deepspeed = any(name.startswith("global_step") for name in names)
    optimizer = any(name.startswith("optimizer") for name in names) and "scheduler.pt" in names
    found = {
        "optimizer": optimizer or deepspeed,
        "random": any(name.startswith("rng_state") for name in names),
        "balancer": has_whole_balancer(folder),
    }
    return tuple(key for key, there in found.items() if not there)


def _invalid(folder: Path, why: str) -> CheckpointError:
    # The words that `Trainer` says it with, and that people look for.
    return CheckpointError(f"Can't find a valid checkpoint at {folder}: {why}")

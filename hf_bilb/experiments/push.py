"""Pushing a finished run to the Hub: what goes into the repository, and under which words."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_bilb.config.yaml import dump_yaml, read_yaml
from hf_bilb.errors import CheckpointError, HubError, OptionError, one_line
from hf_bilb.experiments.folder import RECIPE_FILE
from hf_bilb.experiments.recipe import Recipe
from hf_bilb.experiments.run_card import IMAGES, check_base_is_public, own_card, read_json, run_facts
from hf_bilb.hub.card import CARD_FILE, card_text
from hf_bilb.hub.files import LAST_CHECKPOINT, REPLACED, files_of, model_files
from hf_bilb.hub.paths import without_machine
from hf_bilb.hub.remote_code import with_code
from hf_bilb.hub.repository import Repository, prepare_repository, push_files
from hf_bilb.reporting.history import STATE_FILE
from hf_bilb.reporting.results import FILE_NAME as RESULTS_FILE
from hf_bilb.reporting.results import RunResults, read_results
from hf_bilb.storage import folder_lock
from hf_bilb.storage.checkpoint_check import verify
from hf_bilb.storage.checkpoint_marker import MARKER

#: Tables, pictures and logs of a run. `table.md` is in the card, too.
_RUN_FILES = ("table.md", "task_vectors.jsonl", "gradients.jsonl", *IMAGES)
_CHECKPOINT = "checkpoint-"
#: Strategies of Trainer's with which the last checkpoint is on the Hub.
_WITH_LAST_CHECKPOINT = ("checkpoint", "all_checkpoints")


def repository_of(recipe: Recipe) -> Repository | None:
    """Where a recipe wants its model to be pushed to; None: nowhere."""
    settings = recipe.trainer
    if not settings.get("push_to_hub"):
        return None
    name = settings.get("hub_model_id") or recipe.output_dir.absolute().name
    return Repository(
        name, settings.get("hub_private_repo"), settings.get("hub_revision"), None, "trainer.hub_model_id"
    )


def prepare_push(recipe: Recipe) -> Repository | None:
    """Before anything is loaded: see that the run can be pushed at its end; None where it shall not be.

    Raises:
        OptionError, HubError: see `prepare_repository`; adapters that nobody else could load.
    """
    repository = repository_of(recipe)
    if repository is None:
        return None
    check_base_is_public(recipe.model, "trainer.push_to_hub")
    return prepare_repository(repository)


def push_after_training(recipe: Recipe, repository: Repository) -> str:
    """Push the run that has just been measured; returns the repository's address.

    Raises:
        HubError: it did not work. The run is complete, and the message says how to push it again.
    """
    folder = recipe.output_dir
    strategy = str(recipe.trainer.get("hub_strategy", ""))
    checkpoints = _last_checkpoint(folder, strategy) if strategy in _WITH_LAST_CHECKPOINT else {}
    try:
        return _push(folder, read_results(folder), repository, "End of training", checkpoints)
    except Exception as error:
        raise HubError(
            f"{folder} is complete, but was not pushed: {one_line(error, 260)}; this pushes it: "
            f"{push_command(folder, repository)}"
        ) from error


def push_command(folder: Path, repository: Repository) -> str:
    """What pushes a run, as a line for a shell."""
    words = ["hf-bilb", "push", str(folder), repository.name]
    words += ["--private"] if repository.private else []
    words += ["--revision", repository.revision] if repository.revision else []
    return shlex.join(words)


def push_run(
    folder: Path,
    repository: Repository,
    message: str | None = None,
    with_checkpoints: bool = False,
    license: str | None = None,
) -> str:
    """Push a finished run, of today or of last week, in one commit; returns the repository's address.

    Args:
        folder: of the run.
        repository: where to; it is made where it is not there.
        message: of the commit.
        with_checkpoints: its complete checkpoints, too, from which it can be resumed.
        license: for the card, the Hub's word for it (`apache-2.0`).

    Raises:
        OptionError: no finished run, or no model in it; see `prepare_repository`.
        HubError: the Hub cannot be reached, or the upload broke off. The same call goes on with what is missing.
        FolderInUseError: a run is writing into the folder.
    """
    results = read_results(folder)
    check_base_is_public(results.settings.get("model", {}), str(folder))
    if not model_files(folder):
        raise OptionError(f"{folder}: holds no weights of a model")
    if license is not None and own_card(folder) is not None:
        raise OptionError(f"--license: {folder / CARD_FILE} was changed by hand; write `license: {license}` into it")
    with folder_lock.hold(folder, again=True):
        checkpoints = _checkpoints(folder) if with_checkpoints else {}
        prepared = prepare_repository(repository)
        message = message or f"{results.recipe}, tasks balanced by {results.balancer}"
        return _push(folder, results, prepared, message, checkpoints, license)


def _push(
    folder: Path,
    results: RunResults,
    repository: Repository,
    message: str,
    checkpoints: Mapping[str, Path],
    license: str | None = None,
) -> str:
    card = own_card(folder) or card_text(run_facts(folder, results, repository.name, True, license))
    files = {**with_code(model_files(folder)), **_about_the_run(folder), CARD_FILE: card.encode()}
    places = {path.partition("/")[0] for path in checkpoints}
    replaced = (*REPLACED, *IMAGES, *(f"{place}/*" for place in places))
    push_files(repository, {**files, **checkpoints}, message, replaced)
    return repository.address


# ---------------------------------------------------------------------------------------------------- files


def _about_the_run(folder: Path) -> dict[str, Path | bytes]:
    """Recipe, results, log, tables and pictures, without the paths of this machine."""
    found: dict[str, Path | bytes] = {name: folder / name for name in _RUN_FILES if (folder / name).is_file()}
    if (folder / RECIPE_FILE).is_file():
        head = (folder / RECIPE_FILE).read_text(encoding="utf-8").partition("\n")[0]
        recipe = dump_yaml(without_machine(read_yaml(folder / RECIPE_FILE)))
        found[RECIPE_FILE] = f"{head}\n{recipe}".encode()
    results = read_json(folder / RESULTS_FILE)
    found[RESULTS_FILE] = _json({**results, "settings": without_machine(results.get("settings", {}))})
    if state := read_json(folder / STATE_FILE):
        found[STATE_FILE] = _json({**state, "best_model_checkpoint": without_machine(state["best_model_checkpoint"])})
    return found


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _checkpoints(folder: Path) -> dict[str, Path]:
    """The files of all complete checkpoints, by their paths in the repository.

    Raises:
        OptionError: there is none.
    """
    found = {path: file for name in _complete(folder) for path, file in files_of(folder / name, name).items()}
    if not found:
        raise OptionError(f"--with-checkpoints: {folder} holds no complete checkpoint")
    return found


def _last_checkpoint(folder: Path, strategy: str) -> dict[str, Path]:
    names = list(_complete(folder))
    if not names:
        return {}
    return files_of(folder / names[-1], LAST_CHECKPOINT if strategy == "checkpoint" else names[-1])


def _complete(folder: Path) -> Iterator[str]:
    """The names of the checkpoints that a run can go on from, the last one last."""
    steps = [path.name.removeprefix(_CHECKPOINT) for path in folder.glob(f"{_CHECKPOINT}*")]
    for step in sorted(int(step) for step in steps if step.isdigit()):
        name = f"{_CHECKPOINT}{step}"
        if not (folder / name / MARKER).is_file():
            continue
        try:
            verify(folder / name, thorough=False)
        except CheckpointError:
            continue
        yield name

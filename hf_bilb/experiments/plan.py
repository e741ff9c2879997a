"""The plan of a comparison: which runs it consists of, each checked before any starts, and how far each one is."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_bilb.config.options import nearest, shown
from hf_bilb.config.yaml import load_yaml, read_yaml
from hf_bilb.errors import OptionError
from hf_bilb.experiments.folder import RECIPE_FILE
from hf_bilb.experiments.recipe import Recipe, differences, read_recipe
from hf_bilb.reporting.results import FILE_NAME, as_json, read_results
from hf_bilb.storage import folder_lock
from hf_bilb.storage.folders import check_output_folder
from hf_bilb.trainer import checkpointing
from hf_bilb.trainer.running_log import VECTORS_FILE

SINGLE_TASK = "stl"  # label of the runs that train one task
LOG_FILE = "train.log"
#: What a run leaves before its first checkpoint; nothing is lost when it is started over.
_WITHOUT_VALUE = re.compile(
    rf"{re.escape(LOG_FILE)}|{re.escape(RECIPE_FILE)}|{re.escape(VECTORS_FILE)}|{checkpointing.STAGING}|{folder_lock.LOCK_FILE}|runs|\..*"
)

State = Literal["finished", "resume", "fresh"]


@dataclasses.dataclass(frozen=True)
class Balancer:
    """A method asked for: the `balancer` section of its runs, and a label that is unique and fit for a folder."""

    label: str
    section: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run. `label`: of the balancer, or `SINGLE_TASK` with the task it trains alone; `overrides`: on the recipe."""

    label: str
    task: str
    seed: int
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def title(self) -> str:
        """For a reader: `bilb, seed 0`."""
        return f"{self.label}{f' {self.task}' if self.task else ''}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.recipe.output_dir


@dataclasses.dataclass(frozen=True)
class ComparisonPlan:
    """What is to be compared, checked.

    Attributes:
        recipe: the recipe that all runs share.
        runs: in the order in which they are trained.
        labels: of the methods, in the order of the tables.
        seeds: of each method.
        reference: label of the method that the others are related to.
        output: its folder.
        command: what a run's arguments are appended to.
        split_by_seed: each seed splits the data in its own way.
    """

    recipe: Recipe
    runs: tuple[PlannedRun, ...]
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: str
    output: Path
    command: tuple[str, ...]
    split_by_seed: bool = False


def plan_comparison(
    recipe: str | Path,
    overrides: Sequence[str],
    *,
    balancers: str,
    seeds: str,
    single_tasks: bool = False,
    output: str | None = None,
    launcher: str | None = None,
    reference: str | None = None,
    split_by_seed: bool = False,
) -> ComparisonPlan:
    """Check everything that is asked for, every run included; nothing is written or started.

    Args:
        recipe, overrides: what all runs share.
        balancers, seeds: lists with commas, see `parse_balancers` and `parse_seeds`.
        single_tasks: train each task alone, too; loads the data once when the recipe does not name its tasks.
        output: default `trainer.output_dir` with `_compare` behind it.
        launcher: command before `-m hf_bilb train`, such as `accelerate launch --num_processes 2`; default this Python.
        reference: label that the others are related to; default `ls` where it is there, else the first.
        split_by_seed: the seed also splits the data.

    Raises:
        OptionError: at the first thing that is wrong.
    """
    shared = read_recipe(recipe, overrides)
    if shared.trainer.get("push_to_hub"):
        raise OptionError(
            "trainer.push_to_hub: a comparison trains several models; set trainer.push_to_hub=false, and push the one "
            "that you choose with hf-bilb push"
        )
    asked = parse_balancers(balancers, shared.balancer)
    labels = tuple(balancer.label for balancer in asked)
    numbers = parse_seeds(seeds)
    if reference is not None and reference not in labels:
        raise OptionError(f"--base: {shown(reference)} is none of {', '.join(labels)}{nearest(reference, labels)}")
    folder = _folder(output, shared)
    command = _command(launcher)
    seed_keys = split_seed_keys(shared) if split_by_seed else ()
    plan_runs(recipe, overrides, folder, asked, numbers[:1], {}, seed_keys)  # before data are loaded
    tasks = single_task_choices(shared) if single_tasks else {}
    runs = plan_runs(recipe, overrides, folder, asked, numbers, tasks, seed_keys)
    base = reference or ("ls" if "ls" in labels else labels[0])
    return ComparisonPlan(shared, tuple(runs), labels, numbers, base, folder, command, split_by_seed)


def _folder(output: str | None, shared: Recipe) -> Path:
    if output is None and not shared.output_dir.name:
        raise OptionError(
            f"--output: is required, since trainer.output_dir {shown(str(shared.output_dir))} has no name"
        )
    folder = Path(output) if output is not None else shared.output_dir.with_name(f"{shared.output_dir.name}_compare")
    check_output_folder(folder, "--output")
    return folder


def _command(launcher: str | None) -> tuple[str, ...]:
    try:
        words = [sys.executable] if launcher is None else shlex.split(launcher)
    except ValueError as error:
        raise OptionError(f"--launcher: {shown(launcher)} is no command: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise OptionError(f"--launcher: {shown(launcher)} begins with no command that is found")
    return (*words, "-m", "hf_bilb", "train")


# ---------------------------------------------------------------------------------------------------- what is asked for


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` -> (0, 1, 2); raises `OptionError` for what is no list of different whole numbers >= 0."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) <= 10 for word in words):
        raise OptionError(
            f"--seeds: {shown(text)} is not valid, expected whole numbers >= 0 with commas, such as 0,1,2"
        )
    seeds = tuple(int(word) for word in words)
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise OptionError(f"--seeds: {twice[0]} stands twice")
    return seeds


def parse_balancers(text: str, own: Mapping[str, Any]) -> tuple[Balancer, ...]:
    """`ls,bilb,bilb:preset=qm9,bilb:{preset: qm9, learning_rate: 0.01}` -> the balancers, in order.

    Args:
        text: names with commas between them; after a colon an option or a YAML mapping of several.
        own: the recipe's balancer section; a balancer of the same name without options of its own keeps its options.

    Raises:
        OptionError: for another form, or the same balancer twice. Names and options are checked with the runs.
    """
    balancers = []
    for word in _split(text):
        name, colon, rest = (part.strip() for part in word.partition(":"))
        if not name or (colon and not rest):
            raise OptionError(
                f"--balancers: {shown(word)} is not valid, expected NAME, NAME:KEY=VALUE or NAME:{{KEY: VALUE}}"
            )
        options = _options(word, rest) if rest else {}
        section = own if name == own["name"] and not options else {"name": name, **options}
        balancers.append(Balancer(_label(name, options), dict(section)))
    labels = [balancer.label for balancer in balancers]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise OptionError(f"--balancers: {shown(twice[0])} stands twice")
    return tuple(balancers)


def _split(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    words, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            words.append("")
        else:
            words[-1] += character
    return [word.strip() for word in words]


def _options(word: str, rest: str) -> dict[str, Any]:
    if rest.startswith("{"):
        options = load_yaml(rest, f"--balancers {word}")
    else:
        key, _, value = rest.partition("=")
        options = {key.strip(): load_yaml(value, f"--balancers {word}")} if "=" in rest else None
    if not isinstance(options, dict) or "name" in options:
        raise OptionError(
            f"--balancers: {shown(word)} is not valid, expected NAME, NAME:KEY=VALUE or NAME:{{KEY: VALUE}}"
        )
    return options


def _label(name: str, options: Mapping[str, Any]) -> str:
    said = ",".join(f"{key}={value}" for key, value in options.items())
    return re.sub(r"[^\w.,=+-]+", "_", f"{name}-{said}" if said else name)


# ---------------------------------------------------------------------------------------------------- the runs


def plan_runs(
    recipe: str | Path,
    overrides: Sequence[str],
    output: Path,
    balancers: Sequence[Balancer],
    seeds: Sequence[int],
    single_tasks: Mapping[str, Any] | None = None,
    split_seed_keys: Sequence[str] = (),
) -> list[PlannedRun]:
    """Every run with its checked recipe; seed by seed, so that a comparison of one seed is there early.

    Args:
        recipe, overrides: as for `read_recipe`.
        output: folder of the comparison.
        balancers, seeds: the methods, and `trainer.seed` of their runs.
        single_tasks: the tasks that are also trained alone, with the sum of losses (which has one term), and what
            `data.tasks` is then.
        split_seed_keys: what else gets the seed (`data.seed`), so that it also splits the data.

    Raises:
        OptionError: at the first setting of any run that is not valid.
    """
    runs = []

    def add(label: str, task: str, seed: int, folder: Path, *own: str) -> None:
        # A task that is trained alone has no splits of the others.
        others = [f"data.tasks.{name}." for name in single_tasks or {} if task and name != task]
        seed_keys = [key for key in split_seed_keys if not key.startswith(tuple(others))]
        of_seed = [f"{key}={seed}" for key in ("trainer.seed", *seed_keys)]
        of_folder = f"trainer.output_dir={_yaml(str(folder / f'seed-{seed}'))}"
        changes = (*own, *of_seed, of_folder)
        runs.append(PlannedRun(label, task, seed, changes, read_recipe(recipe, (*overrides, *changes))))

    for seed in seeds:
        for balancer in balancers:
            add(balancer.label, "", seed, output / balancer.label, f"balancer={_yaml(balancer.section)}")
        for task, choice in (single_tasks or {}).items():
            folder = output / SINGLE_TASK / re.sub(r"[^\w.,=+-]+", "_", task)
            add(SINGLE_TASK, task, seed, folder, 'balancer={"name": "ls"}', f"data.tasks={_yaml(choice)}")
    return runs


def _yaml(value: Any) -> str:
    # As it stands: JSON writes a character beyond 16 bits as two halves, which are no YAML.
    return json.dumps(value, ensure_ascii=False)


def split_seed_keys(recipe: Recipe) -> list[str]:
    """The keys of the seeds that split the recipe's data: `data.seed`, or those of every option `split`."""
    data = recipe.data
    if not isinstance(data.get("split"), Mapping):
        return ["data.seed"]
    own = [name for name, task in data["tasks"].items() if task["split"] is not None]
    return ["data.split.seed", *(f"data.tasks.{name}.split.seed" for name in own)]


def single_task_choices(recipe: Recipe) -> dict[str, Any]:
    """Each task of the recipe's data, and what `data.tasks` is for it alone; the tasks are as the recipe names them,
    else known by loading the data once.

    Raises:
        OptionError: the data set has no option `tasks`, so that no task can be trained alone.
    """
    from hf_bilb.data import DATA_SETS
    from hf_bilb.experiments.build import resolve_data_options

    if "tasks" not in recipe.data:
        raise OptionError(
            f"--stl: the data set {recipe.data['name']!r} has no option data.tasks to train one task with"
        )
    tasks = recipe.data["tasks"]
    if isinstance(tasks, Mapping):
        return {name: {name: options} for name, options in tasks.items()}
    if tasks is None:
        tasks = DATA_SETS[recipe.data["name"]].load(resolve_data_options(recipe)).task_names
    return {name: [name] for name in tasks}


# ---------------------------------------------------------------------------------------------------- how far they are


def state_of(run: PlannedRun) -> State:
    """Whether the run is finished, can go on from a checkpoint, or begins.

    Raises:
        OptionError: its folder holds a run with other settings, or files that a fresh run would write over.
        CheckpointError: it holds checkpoints, and none of them is complete.
    """
    folder = run.folder
    if (folder / FILE_NAME).is_file():
        _check_settings(run, read_results(folder).settings)
        return "finished"
    path = folder / RECIPE_FILE
    if path.is_file():
        settings = read_yaml(path)
        _check_settings(run, settings if isinstance(settings, Mapping) else {})
    if any(folder.glob("checkpoint-*")) or any(folder.glob(f"{checkpointing.STAGING}/checkpoint-*")):
        try:
            with folder_lock.hold(folder):
                checkpointing.last_complete_checkpoint(folder, thorough=False)  # the run itself will look closer
            return "resume"
        except checkpointing.CheckpointError:
            if any(folder.glob("checkpoint-*")):
                raise
    valued = [path.name for path in sorted(folder.glob("*")) if not _WITHOUT_VALUE.fullmatch(path.name)]
    if valued:
        raise OptionError(
            f"{folder}: holds {valued[0]!r}, but neither {FILE_NAME} nor a checkpoint to go on from: move it away to "
            "train this run from the beginning"
        )
    return "fresh"


def _check_settings(run: PlannedRun, found: Mapping[str, Any]) -> None:
    planned = as_json(run.recipe.to_dict())
    # The same folder can be called by another name: it has been moved, or the current folder is another one.
    before = {**found, "trainer": {**found.get("trainer", {}), "output_dir": planned["trainer"]["output_dir"]}}
    odd = differences(as_json(before), planned)
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise OptionError(
            f"{run.folder}: holds a run with another setting, {odd[0]}{more}: another --output begins a new comparison"
        )

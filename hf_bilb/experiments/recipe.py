"""Recipes: one YAML file says everything about a run, and every key of it is checked before anything is loaded.

A recipe has five sections:

    model:      {name: qm9_mlp, ...}        which model, and what a recipe may set of it
    data:       {name: qm9, ...}            which data set, and how it is split
    balancer:   {name: bilb, ...}           how the tasks are kept in balance
    trainer:    {output_dir: runs/x, ...}   any field of BilevelMTLTrainingArguments
    evaluation: {split: test}               what the table at the end is measured on

and, where methods of one's own shall have names in it,

    imports:    [path/to/file.py, ...]      Python files, or modules, imported first for what they register

Files and overrides are read as YAML 1.2: `1e-3` is a number, `no` and `off` are words, a key may stand only once.
Nothing heavy is imported until the cheap checks are passed.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hf_bilb.balancers.registry import balancer_module, get_balancer_spec, list_balancers, resolve_options
from hf_bilb.config.declared import UNKNOWN, check_declared, declared_fields, options_of
from hf_bilb.config.options import check_value, nearest, parse_options, shown, unknown_name
from hf_bilb.config.registry import DATA_SETS, MODELS
from hf_bilb.config.user_code import check_reference, import_sources, load_reference
from hf_bilb.config.yaml import dump_yaml, parse_override, read_yaml, set_value
from hf_bilb.errors import OptionError
from hf_bilb.experiments.packaged import packaged_name

SECTIONS = ("model", "data", "balancer", "trainer", "evaluation")
#: Lists of a user's own code: what is imported, and classes of callbacks.
IMPORTS, CALLBACKS = "imports", "callbacks"
_LISTS = (IMPORTS, CALLBACKS)

# Fields of the training arguments that something else decides; set here, they would be ignored or contradicted.
_MANAGED_TRAINER_KEYS = {
    "balancer": 'belongs in the section "balancer"',
    "task_names": "comes from the data set",
    "label_names": "comes from the data set",
    "resume_from_checkpoint": "is the option --resume of the command line",
    "do_train": "has no effect: a recipe always trains",
    "do_eval": "has no effect: see trainer.eval_strategy",
    "do_predict": "has no effect: see evaluation.split",
    "local_rank": "is set by the launcher",
}


_SEED = (lambda value: 0 <= value < 2**32, "an integer from 0 to 4294967295")
_ONE_OR_MORE = (lambda value: value >= 1, "1 or more")
# What TrainingArguments takes, and what Trainer or a library stumbles over once the data are loaded, or trains nothing.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "seed": _SEED,
    "data_seed": _SEED,
    "per_device_train_batch_size": _ONE_OR_MORE,
    "per_device_eval_batch_size": _ONE_OR_MORE,
    "gradient_accumulation_steps": _ONE_OR_MORE,
    "eval_accumulation_steps": _ONE_OR_MORE,
    "num_train_epochs": (lambda value: 0 < value < math.inf, "a number above 0"),
    "learning_rate": (lambda value: 0 <= value < math.inf, "a number, 0 or more"),
}


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What stands at the end of a run. Which model is measured is said by `trainer.load_best_model_at_end`.

    Attributes:
        split: the part of the data that the table, `results.json` and the comparison are measured on, once, at the end.
        plots: draw `losses.png` and `weights.png`.
    """

    split: Literal["test", "validation"] = "test"
    plots: bool = True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe. `name` is the file's; the sections are plain dicts with every option resolved, ready for YAML.

    `trainer` holds what the recipe sets, not the defaults of the hundred other fields.
    """

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    balancer: dict[str, Any]
    trainer: dict[str, Any]
    evaluation: EvaluationOptions
    imports: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()

    @property
    def output_dir(self) -> Path:
        """The run's folder, relative to the current one."""
        return Path(self.trainer["output_dir"])

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested plain values, in the order of `SECTIONS`; `parse_recipe` takes it back unchanged."""
        lists = {name: getattr(self, name) for name in _LISTS if getattr(self, name)}
        sections = {section: getattr(self, section) for section in SECTIONS[:-1]}
        return _plain({**lists, **sections, "evaluation": dataclasses.asdict(self.evaluation)})


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check the recipe in the file `path`, with `KEY.PATH=VALUE` overrides laid over it.

    Raises:
        OptionError: one line that names the key path (or file and line), the value and the nearest valid name.
    """
    file = Path(path)
    if not file.exists() and (packaged := packaged_name(str(path))) is not None:
        copy = f"`hf-bilb recipes copy {packaged}`"
        raise OptionError(f"{path}: there is no such recipe here; {copy} puts the one of the package into your folder")
    raw = read_yaml(file)
    if not isinstance(raw, dict):
        raise OptionError(f"{path}: a recipe is a mapping with the sections {', '.join(SECTIONS)}")
    for override in overrides:
        apply_override(raw, override)
    return parse_recipe(raw, file.stem)


def parse_recipe(raw: Mapping[str, Any], name: str) -> Recipe:
    """Check every section of `raw` and fill in the defaults; cheap sections first, the trainer's (10 s of import) last.

    What `imports` names is imported on the way.

    Raises:
        OptionError: at the first thing that is wrong.
    """
    for key, value in raw.items():
        if key not in (*SECTIONS, *_LISTS):
            raise OptionError(f"{key}: unknown section, value {shown(value)}{_nearest_path(str(key))}")
    for section in SECTIONS[:-1]:
        if raw.get(section) is None:
            raise OptionError(f"{section}: this section is missing (a recipe has {', '.join(SECTIONS)})")
    given = raw.get("evaluation")
    evaluation = parse_options(EvaluationOptions, {} if given is None else given, "evaluation")
    trainer = _mapping(raw["trainer"], "trainer")
    if trainer.get("output_dir") in (None, ""):
        raise OptionError("trainer.output_dir: is required, expected the folder of the run, such as runs/qm9_mlp_bilb")
    imports = import_sources(raw.get(IMPORTS), IMPORTS)  # before names are looked up
    callbacks = _references(raw.get(CALLBACKS), CALLBACKS)
    _check_by_source(raw)
    return Recipe(
        name=name,
        imports=imports,
        callbacks=callbacks,
        evaluation=evaluation,
        balancer=_resolve_balancer(raw["balancer"]),
        data=_resolve_data(raw["data"]),
        model=_resolve_model(raw["model"]),
        trainer=_resolve_trainer(trainer),
    )


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `read_recipe` reads back to an equal recipe."""
    return dump_yaml(recipe.to_dict())


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two nested mappings, one line a key path: `trainer.learning_rate: 0.001 -> 0.0005`."""
    lines: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        where = f"{path}{key}"
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{where}.")
        elif before != after or (key in old) != (key in new):
            lines.append(f"{where}: {shown(before)} -> {shown(after)}")
    return lines


# ---------------------------------------------------------------------------------------------------- sections


def _check_by_source(raw: Mapping[str, Any]) -> None:
    """Find what can be found without importing torch: unknown names and keys, values of a wrong type."""
    for section, registry in (("balancer", None), ("data", DATA_SETS), ("model", MODELS)):
        known = list_balancers() if registry is None else registry
        name, options = _name_and_options(raw[section], section, known)
        entry = balancer_module(name) if registry is None else registry.unread(name)
        if (section, name) != ("balancer", "torchjd"):  # whose keys are those of a class of that package
            check_declared(options, _declared(entry), section)
    _check_trainer(_mapping(raw["trainer"], "trainer"), _declared_trainer_fields())


def _declared(entry: str | None) -> dict[str, Any]:
    """The options that a registered entry takes, from its source; none for one that has no source of ours."""
    options = None if entry is None else options_of(entry)
    return {} if options is None else declared_fields(*options)


def _declared_trainer_fields() -> dict[str, Any]:
    return declared_fields("hf_bilb.trainer.arguments", "BilevelMTLTrainingArguments")


def _check_trainer(section: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    if section.get("hub_token") is not None:  # its value is not shown
        raise OptionError(
            "trainer.hub_token: a recipe is written into the run's folder and pushed, token and all; set HF_TOKEN, or "
            "log in once with `hf auth login`"
        )
    for key, value in section.items():
        path = f"trainer.{key}"
        if key in _MANAGED_TRAINER_KEYS:
            raise OptionError(f"{path}: {_MANAGED_TRAINER_KEYS[key]}, value {shown(value)}")
        check_declared({key: value}, fields, "trainer", unknown=lambda key: nearest(str(key), fields))
        if fields.get(key, UNKNOWN) is not UNKNOWN:
            _check_range(check_value(value, fields[key], path), key, path)


def _resolve_data(section: Any) -> dict[str, Any]:
    name, options = _name_and_options(section, "data", DATA_SETS)
    return {"name": name, **dataclasses.asdict(parse_options(DATA_SETS[name].options, options, "data"))}


def _resolve_model(section: Any) -> dict[str, Any]:
    name, options = _name_and_options(section, "model", MODELS)
    return {"name": name, **dataclasses.asdict(parse_options(MODELS[name].options, options, "model"))}


def _resolve_balancer(section: Any) -> dict[str, Any]:
    name, options = _name_and_options(section, "balancer", list_balancers())
    return {"name": name, **dataclasses.asdict(resolve_options(name, options, path="balancer"))}


def _resolve_trainer(section: Mapping[str, Any]) -> dict[str, Any]:
    hints = _trainer_hints()
    _check_trainer(section, hints)
    resolved: dict[str, Any] = {}
    for key, value in section.items():
        path = f"trainer.{key}"
        resolved[key] = check_value(value, hints[key], path)
        _check_enum(resolved[key], hints[key], path)
    for key, parse in _nested_trainer_options().items():
        if resolved.get(key) is not None:
            parse(resolved[key], f"trainer.{key}")
    return resolved


def _nested_trainer_options() -> dict[str, Callable[[Any, str], object]]:
    """Training arguments that are mappings with options of their own, and what checks these."""
    from hf_bilb.trainer.diagnostics import parse_diagnostics
    from hf_bilb.trainer.sampling import TaskSamplingOptions
    from hf_bilb.trainer.schedules import StepLROptions

    return {
        "diagnostics": parse_diagnostics,
        "step_lr": partial(parse_options, StepLROptions),
        "task_sampling": partial(parse_options, TaskSamplingOptions),
    }


def _check_enum(value: Any, hint: Any, path: str) -> None:
    # transformers writes `SchedulerType | str`, which any word fits; the enum says which words are meant.
    enums = [a for a in typing.get_args(hint) if isinstance(a, type) and issubclass(a, enum.Enum)]
    known = [str(member.value) for a in enums for member in a]
    if known and isinstance(value, str) and value not in known:
        raise OptionError(
            f"{path}: {shown(value)} is not valid, expected one of {', '.join(known)}{nearest(value, known)}"
        )


def _check_range(value: Any, key: str, path: str) -> None:
    if key in _RANGES and isinstance(value, (int, float)):
        fits, expected = _RANGES[key]
        if not fits(value):
            raise OptionError(f"{path}: {shown(value)} is not valid, expected {expected}")


def _trainer_hints() -> dict[str, Any]:
    from hf_bilb.trainer.arguments import BilevelMTLTrainingArguments

    hints = typing.get_type_hints(BilevelMTLTrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(BilevelMTLTrainingArguments) if field.init}


def _name_and_options(section: Any, path: str, known: Iterable[str]) -> tuple[str, dict[str, Any]]:
    options = {"name": section} if isinstance(section, str) else dict(_mapping(section, path))
    if "name" not in options:
        raise OptionError(f"{path}.name: is required, expected one of {', '.join(sorted(known))}")
    name = options.pop("name")
    if not isinstance(name, str) or name not in known:
        raise unknown_name(f"{path}.name", name, known)
    return name, options


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{path}: {shown(value)} is not valid, expected a mapping of options")
    return value


def _references(given: Any, path: str) -> tuple[str, ...]:
    """A list of `path/to/file.py:Class` or `package.module:Class`; each is imported."""
    references = check_value([] if given is None else given, list[str], path)
    for i, reference in enumerate(references):
        check_reference(reference, f"{path}[{i}]")
        load_reference(reference, f"{path}[{i}]")
    return tuple(references)


def _nearest_path(key: str) -> str:
    """The nearest section, or the nearest `section.key`: `learning_rate=1e-3` was meant for the trainer."""
    paths = _known_paths()
    last = key.rpartition(".")[2].lower()
    if last not in paths.values() and (near := nearest(key, (*SECTIONS, *_LISTS))):
        return near
    close = difflib.get_close_matches(last, sorted(set(paths.values())), n=1, cutoff=0.6)
    path = next((path for path, name in paths.items() if close and name == close[0]), None)
    return f' (did you mean "{path}"?)' if path else f" (sections: {', '.join(SECTIONS)})"


def _known_paths() -> dict[str, str]:
    """Every `section.key` of any registered model, data set and balancer -> its key; the trainer's first."""
    declared: list[tuple[str, Iterable[str]]] = [("trainer", _declared_trainer_fields())]
    for section, registry in (("data", DATA_SETS), ("model", MODELS)):
        for name in registry:
            entry = registry.unread(name)
            known = dataclasses.fields(registry[name].options) if entry is None else ()
            declared.append((section, [field.name for field in known] or _declared(entry)))
    for name in list_balancers():
        entry = balancer_module(name)
        known = dataclasses.fields(get_balancer_spec(name).options) if entry is None else ()
        declared.append(("balancer", [field.name for field in known] or _declared(entry)))
    declared.append(("evaluation", [field.name for field in dataclasses.fields(EvaluationOptions)]))
    return {f"{section}.{name}": name for section, names in declared for name in names}


# ---------------------------------------------------------------------------------------------------- overrides


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Lay `KEY.PATH=VALUE` over the nested dict `raw`, in place; the value is YAML (`[1, 2]`, `{a: 1}`, `1e-3`).

    Only the form is checked here: what the key may hold is checked with the rest of the recipe.

    Raises:
        OptionError: for an argument without `=`, a value that is no YAML, or a path through what is no mapping.
    """
    keys, value = parse_override(override)
    path, section = override.partition("=")[0], keys[0]
    if section not in (*SECTIONS, *_LISTS):
        raise OptionError(f"{path}: unknown section, value {shown(value)}{_nearest_path(path)}")
    if len(keys) > 1 and isinstance(raw.get(section), str):
        raw[section] = {"name": raw[section]}  # `balancer: bilb` is short for `balancer: {name: bilb}`
    set_value(raw, keys, value, path)


# ---------------------------------------------------------------------------------------------------- small things


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.value if isinstance(value, enum.Enum) else value

"""Every key that a recipe can have, as a page in Markdown, read off the options that are checked: docs/recipe_keys.md.

`python -m hf_bilb.experiments.recipe_keys > docs/recipe_keys.md` writes it again; a test compares.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

from transformers import TrainingArguments

from hf_bilb.config.registry import DATA_SETS, MODELS
from hf_bilb.experiments.describe import options_table
from hf_bilb.experiments.recipe import EvaluationOptions
from hf_bilb.reporting.balancer_table import OptionEntry
from hf_bilb.reporting.grid import plain_grid
from hf_bilb.trainer.arguments import BilevelMTLTrainingArguments
from hf_bilb.trainer.diagnostics import DiagnosticsOptions
from hf_bilb.trainer.early_stopping import EarlyStoppingOptions
from hf_bilb.trainer.sampling import TaskSamplingOptions
from hf_bilb.trainer.schedules import StepLROptions

_TOP = """# What recipes can say

A recipe is a YAML file with five sections, and two lists that may be left out:

```text
model:      {name: ..., ...}
data:       {name: ..., ...}
balancer:   {name: ..., ...}
trainer:    {output_dir: ..., ...}
evaluation: {split: test}
imports:    [path/to/file.py, package.module]    # imported first, for what they register
callbacks:  [path/to/file.py:Class]              # transformers.TrainerCallback classes, made without arguments
```

Any key can be set on the command line, with a YAML value: `hf-bilb train my.yaml trainer.learning_rate=1e-3`. A wrong
key or value ends the command with one line before anything is loaded. `balancer: bilb` is short for `balancer: {name:
bilb}`; the options of the balancers are listed in [methods/README.md](methods/README.md).

This page is generated: `python -m hf_bilb.experiments.recipe_keys > docs/recipe_keys.md`."""

_TRAINER = """All fields of transformers'
[TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments) can be
set, and these, which are ours:"""

#: Mappings among the training arguments, with options of their own.
_NESTED = {
    "task_sampling": TaskSamplingOptions,
    "step_lr": StepLROptions,
    "early_stopping": EarlyStoppingOptions,
    "diagnostics": DiagnosticsOptions,
}
#: Set by something else: the section `balancer`, and the data.
_MANAGED = ("balancer", "task_names")


def page() -> str:
    """The page."""
    return "\n\n".join(
        [
            _TOP,
            "## model",
            *_registered("model", MODELS),
            "## data",
            *_registered("data", DATA_SETS),
            "## trainer",
            _TRAINER,
            _table(_own_trainer_options()),
            *_nested("trainer", _NESTED),
            "## evaluation",
            _table(options_table(EvaluationOptions)),
        ]
    )


def _registered(section: str, registry: Any) -> Iterator[str]:
    for name in sorted(registry):
        options = registry[name].options
        yield f"### {section}.name: {name}"
        yield _table(options_table(options))
        hints = typing.get_type_hints(options)
        yield from _nested(
            section, {f.name: cls for f in dataclasses.fields(options) for cls in _classes(hints[f.name])}
        )


def _nested(path: str, classes: dict[str, type[Any]]) -> Iterator[str]:
    """The tables of options that are mappings, and of those in them."""
    for key, cls in classes.items():
        yield f"Keys of `{path}.{key}`:"
        yield _table(options_table(cls))
        hints = typing.get_type_hints(cls)
        inner = {f.name: c for f in dataclasses.fields(cls) for c in _classes(hints[f.name])}
        yield from _nested(f"{path}.{key}", inner)


def _classes(hint: Any) -> list[type[Any]]:
    """The dataclasses in a type, such as those of `LoraOptions | None` and `dict[str, TaskOptions]`."""
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for argument in typing.get_args(hint) for cls in _classes(argument)]


def _own_trainer_options() -> list[OptionEntry]:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    return [
        entry
        for entry in options_table(BilevelMTLTrainingArguments)
        if entry.name not in inherited and entry.name not in _MANAGED
    ]


def _table(options: list[OptionEntry]) -> str:
    if not options:
        return "No options."
    rows = [
        [f"`{o.name}`", o.default if o.default == "required" else f"`{o.default}`", o.accepts, o.meaning]
        for o in options
    ]
    return plain_grid(("key", "default", "accepts", "meaning"), rows).to_markdown()


if __name__ == "__main__":
    print(page())

"""`hf-bilb init`: from a user's own table to a recipe that trains on it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_bilb.config.options import shown
from hf_bilb.errors import OptionError
from hf_bilb.experiments.guess import TARGET_NAMES, Guess, guess_input, guess_task, is_id
from hf_bilb.experiments.inspect_table import Column, InspectedTable, inspect_table
from hf_bilb.experiments.starter_request import StarterRequest
from hf_bilb.experiments.starter_text import Inputs, Task, recipe_text
from hf_bilb.storage.folders import make_output_folder
from hf_bilb.storage.writing import write_text


@dataclass(frozen=True)
class Starter:
    """What was written: the file, the tasks with their types, the inputs."""

    recipe: Path
    tasks: tuple[Task, ...]
    inputs: Inputs


def write_starter(request: StarterRequest) -> Starter:
    """Look at a table and write a recipe that trains on it.

    Raises:
        OptionError: a table that cannot be read, a column that is not there or does not fit, nothing to predict.
        StorageError: a folder that cannot be made.

    Cost: reads the table once, as training does.
    """
    table = inspect_table(request.table, request.columns)
    tasks = _tasks(table, request)
    inputs = _inputs(table, request, tasks)
    make_output_folder(request.target.parent, "--output")
    write_text(request.target, recipe_text(request, table, tasks, inputs))
    return Starter(request.target, tasks, inputs)


# ---------------------------------------------------------------------------------------------------- tasks


def _tasks(table: InspectedTable, request: StarterRequest) -> tuple[Task, ...]:
    given = [("--text", name) for name in request.text]
    given += [("--image", request.image)] if request.image is not None else []
    columns = [table.column(name, option) for option, name in given]
    words = columns[0] if request.text else None
    names = list(request.tasks) or _usual_targets(table, [column.name for column in columns], words)
    found: dict[str, Task] = {}
    for name in names:
        column = table.column(name, "--tasks")
        if option := next((option for option, taken in given if taken == name), None):
            raise OptionError(f"--tasks: {shown(name)} is what {option} names, and cannot be predicted from itself")
        guess = guess_task(column, words)
        if guess.what is None:
            raise OptionError(f"--tasks: the column {shown(name)} is none to predict: {guess.why}")
        column = column if guess.separator is None else column.split(guess.separator)
        found[name] = Task(_task_name(name, [task.name for task in found.values()]), column, guess.what, guess.why)
    _check_separators(list(found.values()))
    return tuple(found.values())


def _check_separators(tasks: Sequence[Task]) -> None:
    listed = {task.column.separator: task.name for task in tasks if task.column.separator is not None}
    if len(listed) > 1:
        said = ", ".join(f"{separator!r} of {name!r}" for separator, name in listed.items())
        raise OptionError(f"--tasks: lists in cells need the same separator in all columns, got {said}")


def _usual_targets(table: InspectedTable, inputs: Sequence[str], words: Column | None) -> list[str]:
    """The columns that are named as labels usually are; without one, an `OptionError` says which could be labels."""
    names = [column.name for column in table.columns if column.name not in inputs]
    if found := [name for name in names if name.lower() in TARGET_NAMES]:
        return found
    guesses = {name: guess_task(table.column(name, ""), words) for name in names}
    able = {
        name: guess.what
        for name, guess in guesses.items()
        if guess.what is not None and not is_id(table.column(name, ""))
    }
    if not able:
        raise OptionError(f"--tasks: no column can be predicted; {_reasons(guesses)}{table.hint}")
    listed = ", ".join(f"{name} ({what})" for name, what in able.items())
    raise OptionError(
        f"--tasks: name the columns to predict, such as --tasks {next(iter(able))}; there are {listed}{table.hint}"
    )


def _reasons(guesses: Mapping[str, Guess]) -> str:
    return ", ".join(f"{name}: {guess.why}" for name, guess in guesses.items()) or "there is no other column"


def _task_name(column: str, taken: Sequence[str]) -> str:
    """The column's name as one that models and logs can have: letters, digits and `_`."""
    name = re.sub(r"\W+", "_", column).strip("_") or "task"
    others = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in others if other not in taken)


# ---------------------------------------------------------------------------------------------------- inputs


def _inputs(table: InspectedTable, request: StarterRequest, tasks: Sequence[Task]) -> Inputs:
    others = [column for column in table.columns if column.name not in {task.column.name for task in tasks}]
    if request.image is not None:
        named: dict[str, tuple[Column, ...]] = {"image": (_image_column(table, request.image),)}
    elif request.text:
        named = {"text": _text_columns(table, request.text, tasks)}
    else:
        return _table_inputs(others)
    used = {column.name for columns in named.values() for column in columns}
    unused = {column.name: guess_input(column).why for column in others if column.name not in used}
    return Inputs(next(iter(named)), named, unused)


def _text_columns(table: InspectedTable, names: Sequence[str], tasks: Sequence[Task]) -> tuple[Column, ...]:
    columns = tuple(table.column(name, "--text") for name in names)
    for column in columns:
        if column.kind not in ("words", "numbers", "lists"):
            raise OptionError(f"--text: the column {shown(column.name)} is no text: {guess_input(column).why}")
        if column.kind == "lists" and len(columns) > 1:
            raise OptionError(
                f"--text: {shown(column.name)} has lists of words, which are one column, got {len(names)}"
            )
    tagged = next((task for task in tasks if task.type == "token_classification"), None)
    separator = None if tagged is None else tagged.column.separator
    return columns if separator is None else tuple(column.split(separator) for column in columns)


def _image_column(table: InspectedTable, name: str) -> Column:
    """The column, after a look whether its first file is there."""
    column = table.column(name, "--image")
    if column.kind not in ("images", "words"):
        raise OptionError(f"--image: the column {shown(name)} has no paths of images: {guess_input(column).why}")
    if column.words is not None:
        first = next(word for word in column.words.known)
        if not (table.folder / first).is_file():
            where = f"{first!r} in row {column.row_of(first)}"
            raise OptionError(f"--image: there is no file {where}; paths are relative to {str(table.folder)!r}")
    return column


def _table_inputs(columns: Sequence[Column]) -> Inputs:
    guesses = {column.name: guess_input(column) for column in columns}
    named = {
        kind: tuple(column for column in columns if guesses[column.name].what == kind)
        for kind in ("numeric", "categorical")
    }
    if not any(named.values()):
        raise OptionError(f"--text: no column is a number or a category to predict from; {_reasons(guesses)}")
    left_out = {name: guess.why for name, guess in guesses.items() if guess.what is None}
    return Inputs("table", {kind: found for kind, found in named.items() if found}, left_out)

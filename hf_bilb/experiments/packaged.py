"""The recipes that come with the package: which there are, and a copy of one in a user's own folder.

They are the folder `recipes/` of the repository, and `hf_bilb/recipes/` in an installed package (setup.py). A copy says
of itself, and of the Python files that came along with it, where they lie now; nothing else is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_bilb.config.options import nearest, shown
from hf_bilb.config.yaml import flow, load_yaml, read_yaml
from hf_bilb.errors import OptionError
from hf_bilb.storage.folders import check_output_folder, make_output_folder
from hf_bilb.storage.writing import write_text

#: As the recipes write it in references and in the commands of their comments.
_PREFIX = "recipes/"
#: A folder next to them: configurations of accelerate (`hf_bilb.experiments.launch`).
ACCELERATE = "accelerate"


@dataclass(frozen=True)
class PackagedRecipe:
    """One of the package's recipes.

    Attributes:
        name: `qm9/bilb_small.yaml`, what `copy_recipe` takes.
        data, model, balancer: the names in these sections.
        summary: the first sentence of its comments.
    """

    name: str
    data: str
    model: str
    balancer: str
    summary: str


def recipes_folder() -> Path:
    """Where the package's recipes lie."""
    package = Path(str(files("hf_bilb")))
    # Not through `files("hf_bilb.recipes")`: an editable install does not find it, since it lies outside of hf_bilb/.
    return next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())


def packaged_names() -> list[str]:
    """The names of all recipes, in order."""
    folder = recipes_folder()
    paths = (path.relative_to(folder) for path in folder.glob("*/*.yaml"))
    return sorted(path.as_posix() for path in paths if path.parent.name != ACCELERATE)


def packaged_recipes() -> list[PackagedRecipe]:
    """All recipes, in the order of their names."""
    return [_described(name) for name in packaged_names()]


def _described(name: str) -> PackagedRecipe:
    file = recipes_folder() / name
    raw = read_yaml(file)
    named = {key: _name_of(raw[key]) for key in ("data", "model", "balancer")}
    return PackagedRecipe(name=name, **named, summary=_first_sentence(file.read_text(encoding="utf-8")))


def _name_of(section: Any) -> str:
    return str(section["name"] if isinstance(section, Mapping) else section)


def _first_sentence(text: str) -> str:
    lines = re.match(r"(#.*\n)*", text)
    paragraph = " ".join(line[1:].strip() for line in lines[0].split("\n#\n")[0].splitlines()) if lines else ""
    return re.split(r"(?<=[a-z)]\.) (?=[A-Z])", paragraph)[0]


def packaged_name(asked: str) -> str | None:
    """The recipe that `asked` names, with or without `recipes/` before and `.yaml` behind its name; None: none."""
    name = asked.replace("\\", "/").removeprefix("./").removeprefix(_PREFIX)
    return next((known for known in packaged_names() if name in (known, known.removesuffix(".yaml"))), None)


# ---------------------------------------------------------------------------------------------------- a copy


@dataclass(frozen=True)
class CopiedRecipe:
    """What was written: the recipe, the Python files next to it, and `data.*` paths that are not there from here."""

    recipe: Path
    code: tuple[Path, ...]
    missing: tuple[tuple[str, str], ...]


def copy_recipe(asked: str, output: str | Path | None = None, force: bool = False) -> CopiedRecipe:
    """Write a recipe of the package, and the Python files that it names, into a folder of the user's.

    Args:
        asked: the recipe's name, such as `qm9/bilb_small.yaml`.
        output: a file (`my.yaml`), or a folder, made where it is not there; None: the current folder.
        force: write over files that are there; without it, only files of the same content may be.

    Raises:
        OptionError: no such recipe, or a file that is there and would be lost.
        StorageError: a folder that cannot be written to.
    """
    name = packaged_name(asked)
    if name is None:
        hint = nearest(asked, packaged_names())
        raise OptionError(f"recipe: {shown(asked)} is not known{hint}; `hf-bilb recipes` lists all of them")
    target = recipe_file(output, Path(name).name)
    check_output_folder(target.parent, "--output")
    written = {target: "", **_code_of(name, target.parent)}
    written[target] = _rewritten(name, target, [path for path in written if path != target])
    if not force:
        _refuse_losses(written)
    make_output_folder(target.parent, "--output")
    for path, text in written.items():
        write_text(path, text)
    raw = load_yaml(written[target], str(target))
    return CopiedRecipe(target, tuple(path for path in written if path != target), tuple(_missing(raw["data"], "data")))


def recipe_file(output: str | Path | None, name: str) -> Path:
    """Where a recipe of this name goes: `output` itself where it is a `.yaml` file, else into it as a folder."""
    path = Path("." if output is None else output)
    return path if path.suffix in (".yaml", ".yml") and not path.is_dir() else path / name


def _code_of(name: str, folder: Path) -> dict[Path, str]:
    """The Python files that the recipe names: where they go -> their text."""
    text = (recipes_folder() / name).read_text(encoding="utf-8")
    sources = sorted(set(re.findall(rf"{_PREFIX}([\w/.-]+\.py)\b", text)))
    return {folder / Path(source).name: (recipes_folder() / source).read_text(encoding="utf-8") for source in sources}


def _rewritten(name: str, target: Path, code: list[Path]) -> str:
    """The recipe's text, with references to its files, and its commands, as they are from the current folder."""
    text = (recipes_folder() / name).read_text(encoding="utf-8").replace(f"{_PREFIX}{name}", _from_here(target))
    for path in code:
        text = _with_reference(text, path)
    return text


def _with_reference(text: str, path: Path) -> str:
    pattern = rf"{_PREFIX}[\w/.-]*{re.escape(path.name)}(:\w+)?"
    return re.sub(pattern, lambda found: flow(_from_here(path) + (found[1] or "")), text)


def _from_here(path: Path) -> str:
    here = Path.cwd()
    absolute = (here / path).resolve()
    return absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else absolute.as_posix()


def _refuse_losses(written: Mapping[Path, str]) -> None:
    for path, text in written.items():
        if path.is_dir():
            raise OptionError(f"--output: {shown(str(path))} is a folder")
        if path.exists() and path.read_bytes() != text.encode():
            raise OptionError(
                f"--output: {shown(str(path))} is already there: --force writes over it, another --output leaves it"
            )


def _missing(values: Any, path: str) -> Iterator[tuple[str, str]]:
    """Files and folders that a section names and that are not there: option and value."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _missing(value, f"{path}.{key}")
    elif isinstance(values, str) and path.endswith((".file", ".folder")) and not Path(values).exists():
        yield path, values

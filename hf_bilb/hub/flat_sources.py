"""The source of classes of this package as files that lie next to each other and need the package no more.

transformers runs such files with `trust_remote_code=True`: it copies the one that `auto_map` names, follows its
relative imports, and refuses packages that are not installed. So of each module there is what the classes need and
nothing else, and `from hf_bilb.losses.masked import x` is `from .hf_bilb_losses_masked import x`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_PACKAGE = "hf_bilb"
_LONGEST_LINE = 120


def file_stem(module: str) -> str:
    """`hf_bilb_losses_masked` for `hf_bilb.losses.masked`."""
    return module.replace(".", "_")


def flat_sources(
    wanted: Mapping[str, Collection[str]], header: str = "", left_out: Mapping[str, str] | None = None
) -> dict[str, str]:
    """File -> source, of the classes and of everything that they need, in turn, of this package.

    Args:
        wanted: module of this package -> names of the classes.
        header: comment at the top of each file, in which `{module}` is where it comes from.
        left_out: module -> a message. Its files are left out; where a function imports it, `ImportError(message)` is
            raised in place of that.

    Raises:
        ValueError: a module has something that does not go into such a file: statements that are run by its import, a
            module of this package that is imported whole or named by a string, a name that is not at its top level.
    """
    needs: dict[str, set[str]] = {module: set(names) for module, names in wanted.items()}
    modules: dict[str, _Module] = {}
    queue = list(needs)
    while queue:
        module = queue.pop()
        if module not in modules:
            modules[module] = _Module(module, left_out or {})
        for lower, names in modules[module].keep(needs[module]).items():
            if not names <= needs.setdefault(lower, set()):
                needs[lower] |= names
                queue.append(lower)
    return {f"{file_stem(name)}.py": module.written(header) for name, module in sorted(modules.items())}


@dataclass
class _Module:
    """A module of this package, and which of its statements are kept."""

    name: str
    left_out: Mapping[str, str]
    kept: set[ast.stmt] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.source = _source_of(self.name)
        self.lines = self.source.splitlines()
        self.tree = ast.parse(self.source)
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[ast.Import | ast.ImportFrom, ast.alias]] = {}
        for number, statement in enumerate(self.tree.body):
            self._file(number, statement)

    def _file(self, number: int, statement: ast.stmt) -> None:
        """Note the names that a statement gives."""
        if isinstance(statement, ast.Import | ast.ImportFrom):
            if getattr(statement, "module", "") != "__future__":
                self.imports.update(
                    {alias.asname or _first(alias.name): (statement, alias) for alias in statement.names}
                )
        elif names := list(_names_given(statement)):
            self.definitions.update(dict.fromkeys(names, statement))
        elif not (number == 0 and _is_text(statement)) and not _is_for_type_checkers(statement):
            raise self._refusal(statement, "a statement that its import runs")

    def _refusal(self, node: Any, what: str) -> ValueError:
        return ValueError(f"{self.name}, line {node.lineno}: {what} does not go into a file of its own")

    # --- what is kept ---------------------------------------------------------------------------------------------

    def keep(self, names: Collection[str]) -> dict[str, set[str]]:
        """Keep the definitions of `names` and what they need here; returns module -> names that they need there."""
        queue = list(names)
        lower: dict[str, set[str]] = {}
        while queue:
            name = queue.pop()
            if name in self.imports:
                self.imported.add(name)
                self._need(lower, *self.imports[name])
            elif name in self.definitions:
                statement = self.definitions[name]
                if statement not in self.kept:
                    self.kept.add(statement)
                    queue += self._names_used(statement)
                for inner in self._inner_imports(statement):
                    if inner.module not in self.left_out:
                        for alias in inner.names:
                            self._need(lower, inner, alias)
            elif name in names:
                raise ValueError(f"{self.name}: {name} is not defined at the top level")
        return lower

    def _need(self, lower: dict[str, set[str]], statement: ast.Import | ast.ImportFrom, alias: ast.alias) -> None:
        if isinstance(statement, ast.Import):
            if _first(alias.name) == _PACKAGE:
                raise self._refusal(statement, f"import {alias.name}")
        elif _first(statement.module or "") == _PACKAGE:
            assert statement.module is not None
            if _has_source(f"{statement.module}.{alias.name}"):
                raise self._refusal(statement, f"the module {alias.name} as a whole")
            lower.setdefault(statement.module, set()).add(alias.name)

    def _names_used(self, statement: ast.stmt) -> list[str]:
        """Of this module; in annotations, which are not evaluated, those of a module that is left out are none."""
        everywhere = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        run = {node.id for node in _without_annotations(statement) if isinstance(node, ast.Name)}
        for node in ast.walk(statement):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_module_name(node.value):
                raise self._refusal(node, f"the text {node.value!r}")
        names = []
        for name in sorted(everywhere):
            if name in self.imports and self._is_left_out(name):
                if name in run:
                    raise self._refusal(statement, f"{name} of a module that is left out")
            elif name in self.imports or name in self.definitions:
                names.append(name)
        return names

    def _is_left_out(self, name: str) -> bool:
        statement, _ = self.imports[name]
        return isinstance(statement, ast.ImportFrom) and statement.module in self.left_out

    def _inner_imports(self, statement: ast.stmt) -> list[ast.ImportFrom]:
        """Imports of this package in functions."""
        inner = [node for node in ast.walk(statement) if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in inner:
            if isinstance(node, ast.Import) and any(_first(alias.name) == _PACKAGE for alias in node.names):
                raise self._refusal(node, "import of the package")
        return [n for n in inner if isinstance(n, ast.ImportFrom) and _first(n.module or "") == _PACKAGE]

    # --- what is written ------------------------------------------------------------------------------------------

    def written(self, header: str) -> str:
        """The file."""
        parts = [header.format(module=self.name)] if header else []
        first = self.tree.body[0]
        top = f"{ast.get_source_segment(self.source, first)}\n\n" if _is_text(first) else ""
        parts.append(f"{top}from __future__ import annotations")
        text = "\n\n".join([*parts, *self._written_imports()])
        was_short = False
        for statement in (one for one in self.tree.body if one in self.kept):
            short = isinstance(statement, ast.Assign | ast.AnnAssign)
            text += ("\n" if short and was_short else "\n\n" if short else "\n\n\n") + self._written(statement)
            was_short = short
        return text + "\n"

    def _written_imports(self) -> list[str]:
        """In three groups, as they stand in the module: the standard library's, of other packages, of this one."""
        groups: tuple[list[str], ...] = ([], [], [])
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names = [alias for alias in statement.names if (alias.asname or _first(alias.name)) in self.imported]
                if names:
                    home = _first(getattr(statement, "module", None) or names[0].name)
                    place = 0 if home in sys.stdlib_module_names else 2 if home == _PACKAGE else 1
                    groups[place].append(_import_line(statement, names))
        return ["\n".join(group) for group in groups if group]

    def _written(self, statement: ast.stmt) -> str:
        """A statement as it stands, with the comment above it, and with the imports in it made relative."""
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(one.lineno for one in decorators)])
        while first > 1 and self.lines[first - 2].startswith("#") and not self.lines[first - 2].startswith("# ---"):
            first -= 1
        assert statement.end_lineno is not None
        lines: list[str | None] = list(self.lines[first - 1 : statement.end_lineno])
        for node in self._inner_imports(statement):
            assert node.end_lineno is not None and node.module is not None
            message = self.left_out.get(node.module)
            new = _import_line(node, node.names) if message is None else f"raise ImportError({json.dumps(message)})"
            indented = "\n".join(" " * node.col_offset + line for line in new.splitlines())
            places = range(node.lineno - first, node.end_lineno - first + 1)
            lines[places[0]], lines[places[0] + 1 : places[-1] + 1] = indented, [None] * (len(places) - 1)
        return "\n".join(line for line in lines if line is not None)


def _import_line(statement: ast.Import | ast.ImportFrom, names: list[ast.alias]) -> str:
    words = [one.name if one.asname is None else f"{one.name} as {one.asname}" for one in names]
    if isinstance(statement, ast.Import):
        return f"import {', '.join(words)}"
    module = statement.module or ""
    home = f".{file_stem(module)}" if _first(module) == _PACKAGE else module
    line = f"from {home} import {', '.join(words)}"
    return (
        line if len(line) <= _LONGEST_LINE else f"from {home} import (\n    {(',' + chr(10) + '    ').join(words)},\n)"
    )


def _without_annotations(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _without_annotations(child)


def _names_given(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_for_type_checkers(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.If) and isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
    )


def _is_module_name(text: str) -> bool:
    return text == _PACKAGE or (text.startswith(f"{_PACKAGE}.") and text.replace(".", "_").isidentifier())


def _first(name: str) -> str:
    return name.partition(".")[0]


def _has_source(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    loader: Any = None if spec is None else spec.loader
    source = None if loader is None else loader.get_source(module)
    if source is None:
        raise ValueError(f"{module}: has no source")
    return str(source)

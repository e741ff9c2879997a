"""The options that a class declares, read from its source: what is wrong in a recipe is said before torch is imported.

Importing a data set, a model or `TrainingArguments` takes seconds, and most mistakes are a misspelled key or a value of
the wrong type. Whatever cannot be told from the source alone (a range, a type that is made at run time) is left to the
check of the class itself, which comes afterwards in any case.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

from hf_bilb.config.options import check_value, nearest, shown
from hf_bilb.errors import OptionError

#: The type of an option that the source does not tell.
UNKNOWN: Any = object()

_PLAIN: dict[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "None": None,
    "dict": dict,
    "list": list,
}
_GENERIC: dict[str, Any] = {
    "Literal": Literal,
    "Optional": Optional,
    "Union": Union,
    "tuple": tuple,
    "list": list,
    "dict": dict,
}
#: What a field may be made by.
_FIELD_MAKERS = ("bounded", "field")
# transformers makes these names on demand, too.
_ELSEWHERE = {("transformers", "TrainingArguments"): "transformers.training_args"}


class _NotTold(Exception):  # no error: a control flow of this file
    """The source does not tell."""


def declared_fields(module: str, class_name: str) -> dict[str, Any]:
    """The fields of a dataclass in their order: name -> type, or `UNKNOWN`; empty where the class is not found."""
    try:
        return {name: kind for name, kind, _ in _fields(module, class_name)}
    except (_NotTold, OSError, SyntaxError):
        return {}


def options_of(entry: str, keyword: str = "options") -> tuple[str, str] | None:
    """Module and name of the options class of a registered entry, `module` or `module:NAME`.

    It is the argument `options` of what is assigned to `SPEC`, or NAME, or of the decorator of a class.
    """
    module, _, attribute = entry.partition(":")
    try:
        calls = list(_calls(_tree(module), attribute or "SPEC"))
    except (_NotTold, OSError, SyntaxError):
        return None
    for call in calls:
        for argument in call.keywords:
            if argument.arg == keyword and isinstance(argument.value, ast.Name):
                return module, argument.value.id
    return None


def check_declared(
    values: Mapping[str, Any],
    fields: Mapping[str, Any],
    path: str,
    unknown: Callable[[str], str] | None = None,
) -> None:
    """Raise `OptionError` for a key that is no field, or a value that is not of its type; as `parse_options` would.

    Args:
        values: what a recipe says. fields: of `declared_fields`; empty: nothing is known, nothing is checked.
        path: of the section.
        unknown: what is said after an unknown key; default: the nearest one, or all of them.
    """
    if not fields:
        return
    for key, value in values.items():
        if key not in fields:
            hint = nearest(str(key), fields) or f" (known: {', '.join(fields)})" if unknown is None else unknown(key)
            raise OptionError(f"{path}.{key}: unknown option, value {shown(value)}{hint}")
        if fields[key] is not UNKNOWN:
            check_value(value, fields[key], f"{path}.{key}")


# ---------------------------------------------------------------------------------------------------- sources


@functools.cache
def _tree(module: str) -> ast.Module:
    top, *inner = module.split(".")
    found = importlib.util.find_spec(top)  # of a top-level package: imports nothing
    if found is None or found.origin is None:
        raise _NotTold
    folder = Path(found.origin).parent.joinpath(*inner)
    file = folder.with_suffix(".py") if inner and folder.with_suffix(".py").is_file() else folder / "__init__.py"
    return ast.parse(file.read_text(encoding="utf-8"))


def _calls(tree: ast.Module, attribute: str) -> Iterator[ast.Call]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if any(isinstance(target, ast.Name) and target.id == attribute for target in node.targets):
                yield node.value
        elif isinstance(node, ast.ClassDef):
            yield from (decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call))


def _fields(module: str, class_name: str) -> Iterator[tuple[str, Any, bool]]:
    """Name and type of each field, and whether it is required."""
    home, node = _definition(module, class_name)
    if not isinstance(node, ast.ClassDef):
        raise _NotTold
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _fields(home, base.id)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_field(line):
            yield line.target.id, _type_or_unknown(home, line.annotation), _is_required(line.value)


def _is_field(line: ast.AnnAssign) -> bool:
    if "ClassVar" in ast.unparse(line.annotation):
        return False
    value = line.value
    arguments = value.keywords if isinstance(value, ast.Call) else []
    return not any(a.arg == "init" and isinstance(a.value, ast.Constant) and a.value.value is False for a in arguments)


def _is_required(value: ast.expr | None) -> bool:
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name) or value.func.id not in _FIELD_MAKERS:
        return value is None
    return not value.args and not any(a.arg in ("default", "default_factory") for a in value.keywords)


@functools.cache
def _definition(module: str, name: str) -> tuple[str, ast.AST]:
    """Where `name` of a module is defined, and its node: a class, or the value that is assigned to it."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_ELSEWHERE.get((node.module, alias.name), node.module), alias.name)
    raise _NotTold


# ---------------------------------------------------------------------------------------------------- types


def _type_or_unknown(module: str, annotation: ast.AST) -> Any:
    try:
        return _type(module, annotation)
    except (_NotTold, OSError, SyntaxError, TypeError):
        return UNKNOWN


def _type(module: str, node: ast.AST) -> Any:
    if isinstance(node, ast.Constant):
        return _type(module, ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_type(module, node.left), _type(module, node.right)]  # noqa: UP007  # made of values
    if isinstance(node, ast.Name):
        if node.id in _PLAIN:
            return _PLAIN[node.id]
        home, value = _definition(module, node.id)
        if isinstance(value, ast.ClassDef):
            return _options_class(home, node.id)
        return _type(home, value)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in _GENERIC:
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return Literal[tuple(ast.literal_eval(value) for value in inner)]
        arguments = tuple(... if _is_ellipsis(value) else _type(module, value) for value in inner)
        return _GENERIC[node.value.id][arguments if len(arguments) > 1 else arguments[0]]
    raise _NotTold


@functools.cache
def _options_class(module: str, name: str) -> type[Any]:
    """A dataclass with the fields of the one in the source; it knows types, and no ranges."""
    _, node = _definition(module, name)
    if not isinstance(node, ast.ClassDef) or not any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        raise _NotTold
    fields: list[Any] = []
    for key, kind, required in _fields(module, name):
        default = dataclasses.MISSING if required else None
        fields.append((key, Any if kind is UNKNOWN else kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(name, fields, kw_only=True)


def _is_ellipsis(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...

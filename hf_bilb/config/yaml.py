"""YAML 1.2 (core schema), read and written; and overrides `KEY.PATH=VALUE`, whose values are YAML, too.

`1e-3` is a number, `no` and `off` are words, a key may stand only once, and no Python object is ever built.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_bilb.config.options import nearest, shown
from hf_bilb.errors import OptionError

# No recipe comes near these; beyond them a document is a mistake, or an attack.
DEEPEST = 30
MOST_VALUES = 100_000
LONGEST_NUMBER = 400
_TOO_DEEP = f"is nested deeper than {DEEPEST} levels"


def read_yaml(file: Path) -> Any:
    """What the file holds; raises `OptionError` as `load_yaml` does, and where it is missing or no text in UTF-8."""
    return load_yaml(_read_text(file), str(file))


def load_yaml(text: str, source: str) -> Any:
    """Read YAML 1.2 (core schema), refusing a key that stands twice and Python objects.

    Raises:
        OptionError: one line with `source`, the line number and the problem.
    """
    try:
        loader = _Loader(text)  # in the try block: it refuses control characters when it is built
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise OptionError(f"{source}{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise OptionError(f"{source}: {error}") from None
    except (ValueError, OverflowError) as error:  # PyYAML takes every escape for a character: "\\UFFFFFFFF" is none
        raise OptionError(f"{source}: is no YAML: {error}") from None


def dump_yaml(values: Any) -> str:
    """Nested plain values as YAML that `load_yaml` reads back to equal ones, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def flow(value: Any) -> str:
    """A plain value on one line, as it may stand behind a key: `bilb`, `"a: b"`, `[0.2, 0.8]`, `{seed: 0}`."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if "\n" not in text else json.dumps(value)  # text of several lines; JSON is YAML


# ---------------------------------------------------------------------------------------------------- overrides


def parse_override(override: str) -> tuple[list[str], Any]:
    """`KEY.PATH=VALUE` -> the keys and the value, which is YAML (`[1, 2]`, `{a: 1}`, `1e-3`).

    Raises:
        OptionError: for an argument without `=`, a path that is too long, or a value that is no YAML.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise OptionError(
            f"{shown(override)} is no override, expected KEY.PATH=VALUE, such as trainer.learning_rate=5e-4"
        )
    if len(keys) > DEEPEST:
        raise OptionError(f"{path}: {_TOO_DEEP}")
    return keys, load_yaml(text, f"override {path}")


def set_value(values: dict[str, Any], keys: Sequence[str], value: Any, path: str) -> None:
    """Set the value at the end of `keys` in nested dicts, in place; dicts that are missing on the way are made.

    Raises:
        OptionError: for the path `path`, which goes through what is no mapping.
    """
    target = values
    for depth, key in enumerate(keys[:-1], 1):
        inner = target.get(key)
        if inner is None:
            inner = target[key] = {}
        if not isinstance(inner, dict):
            raise OptionError(
                f"{path}: {'.'.join(keys[:depth])} is {shown(inner)}, no mapping to set {keys[depth]!r} in"
            )
        target = inner
    target[keys[-1]] = value


# ---------------------------------------------------------------------------------------------------- the reader

_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2. PyYAML reads YAML 1.1, where 1e-3 is a string, `no` is false and 1:30 is ninety.
_CORE_SCHEMA: tuple[tuple[str, str, str], ...] = (
    (f"{_TAG}bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (f"{_TAG}null", r"~|null|Null|NULL|", "~nN\0"),
    (f"{_TAG}int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (f"{_TAG}merge", r"<<", "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first_characters in _CORE_SCHEMA:
        for character in first_characters:
            table.setdefault("" if character == "\0" else character, []).append((tag, re.compile(f"^(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    """Builds the values of the core schema and nothing else: no dates, sets, bytes or Python objects."""

    def get_single_node(self) -> yaml.Node | None:
        """The document, before anything is built of it; see `_Extent`."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _Extent().of(node)
        return node

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A part of the document; stops at once where it is nested too deep, which costs PyYAML the square of it."""
        if self._level > DEEPEST:
            raise yaml.composer.ComposerError(None, None, _TOO_DEEP, self.peek_event().start_mark)
        self._level += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_core(self, node: yaml.ScalarNode) -> Any:
        """A scalar of the core schema, also where its tag is written out (`!!int x`)."""
        text = str(self.construct_scalar(node))
        name = node.tag.removeprefix(_TAG)
        if not _CORE_PATTERNS[node.tag].fullmatch(text):
            raise _problem(f"{shown(text)} is no !!{name}", node)
        if len(text) > LONGEST_NUMBER:
            raise _problem(f"{shown(text)} is longer than any number ({LONGEST_NUMBER} characters)", node)
        if name == "float" and math.isinf(float(_floated(text))) and "inf" not in text.lower():
            raise _problem(f"{shown(text)} is beyond all floating-point numbers (infinity is .inf)", node)
        return _CORE_VALUES[name](text)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """Text that can stand in a file name and be written into a file."""
        text = str(self.construct_scalar(node))
        if odd := next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None):
            raise _problem(f"{shown(text)} holds the character U+{ord(odd):04X}, which no text may hold", node)
        return text


def _floated(text: str) -> str:
    return text.lower().replace(".inf", "inf").replace(".nan", "nan")


_CORE_PATTERNS = {tag: re.compile(pattern) for tag, pattern, _ in _CORE_SCHEMA}
_CORE_VALUES: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    "float": lambda text: float(_floated(text)),
}
_Loader.yaml_implicit_resolvers = _resolvers()
_Loader.yaml_constructors = {
    **{f"{_TAG}{name}": _Loader.construct_core for name in _CORE_VALUES},
    f"{_TAG}str": _Loader.construct_yaml_str,
    f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{_TAG}map": yaml.SafeLoader.construct_yaml_map,
    None: yaml.SafeLoader.construct_undefined,
}


class _Extent:
    """Looks through a document with its aliases followed: keys stand once, and it ends, soon enough.

    A few lines of aliases within aliases stand for billions of values, and for any number of levels.
    """

    def __init__(self) -> None:
        self._known: dict[yaml.Node, tuple[int, int] | None] = {}  # None: not finished yet

    def of(self, node: yaml.Node) -> tuple[int, int]:
        """The number of values in `node` and of its levels; raises `yaml.MarkedYAMLError`."""
        if node in self._known:
            known = self._known[node]
            if known is None:
                raise _problem("an alias stands within what it is an alias of", node)
            return known
        self._known[node] = None
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            parts = [self.of(part) for pair in node.value for part in pair]
        else:
            parts = [self.of(part) for part in node.value] if isinstance(node, yaml.SequenceNode) else []
        size = 1 + sum(size for size, _ in parts)
        levels = 1 + max((levels for _, levels in parts), default=0)
        if levels > DEEPEST:
            raise _problem(_TOO_DEEP, node)
        if size > MOST_VALUES:
            raise _problem(f"stands for more than {MOST_VALUES:,} values", node)
        self._known[node] = size, levels
        return size, levels


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
            if key.value in first:
                raise _problem(f"the key {_quoted(key.value)} stands twice (first in line {first[key.value]})", key)
            first[key.value] = key.start_mark.line + 1


def _quoted(key: str) -> str:
    return f'"{key if len(key) <= 80 else key[:77] + "..."}"'


def _problem(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


# ---------------------------------------------------------------------------------------------------- the writer


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# Quotes what either version of YAML would take for something else than a string.
_Dumper.yaml_implicit_resolvers = {
    character: [*_resolvers().get(character, []), *yaml.SafeDumper.yaml_implicit_resolvers.get(character, [])]
    for character in {*_resolvers(), *yaml.SafeDumper.yaml_implicit_resolvers}
}


# ---------------------------------------------------------------------------------------------------- files


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [path.name for path in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise OptionError(f"{file}: there is no such recipe{nearest(file.name, near)}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{file}: cannot be read, expected text in UTF-8: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise OptionError(f"{file}: cannot be read: {error}") from None

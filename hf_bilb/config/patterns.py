"""Parts of a model by name: `encoder`, `head_*`, `encoder.layer.0`, `*.bias`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from hf_bilb.config.options import nearest
from hf_bilb.errors import OptionError

_LISTED = 12


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` means the parameter `name`: the name itself, or a module that it is in, at any depth.

    `*` and `?` stand for any characters, as in file names, `[ab]` for one of those. So `encoder` means every parameter
    of a module of that name, wherever it stands (also within a wrapper such as an adapter model), and `head_*` those of
    all heads.
    """
    parts = name.split(".")
    return any(
        fnmatchcase(".".join(parts[start:end]), pattern)
        for start in range(len(parts))
        for end in range(start + 1, len(parts) + 1)
    )


def check_patterns(patterns: Iterable[str], names: Sequence[str], path: str) -> None:
    """Raise `OptionError` for the first of `patterns` that means none of the parameters `names`."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            parts = {part for name in names for part in _paths(name)}
            hint = nearest(pattern, sorted(parts)) or _first_parts(names)
            raise OptionError(f"{path}: {pattern!r} means no parameter of the model{hint}")


def _first_parts(names: Sequence[str]) -> str:
    """What the model consists of: the outermost modules, at most `_LISTED`."""
    parts = list(dict.fromkeys(name.partition(".")[0] for name in names))
    more = ", ..." if len(parts) > _LISTED else ""
    return f" (its parts: {', '.join(parts[:_LISTED])}{more})"


def _paths(name: str) -> list[str]:
    """The modules that the parameter `name` is in, and itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]

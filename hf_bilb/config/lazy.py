"""Names of a package that are imported when they are asked for: importing torch and transformers takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def lazy_attribute(package: str, name: str, modules: Mapping[str, str]) -> Any:
    """For a package's `__getattr__`: the attribute `name` of `modules[name]`.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(modules[name]), name)

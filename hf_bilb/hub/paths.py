"""What a run says of the machine that it ran on, taken out of what is shared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_HOMES = ("/home/", "/Users/", "/root", "~")


def without_machine(value: Any) -> Any:
    """Nested plain values with the last name of each path in place of the path, and without tokens of the Hub.

    Relative paths stay, but for those that lead out of their folder (`../shared/x.csv`).
    """
    if isinstance(value, Mapping):
        return {key: without_machine(inner) for key, inner in value.items() if not _is_token(key, inner)}
    if isinstance(value, (list, tuple)):
        return [without_machine(inner) for inner in value]
    return base_name(value) if isinstance(value, str) and is_of_machine(value) else value


def is_of_machine(text: str) -> bool:
    """Whether a text is a path that only this machine knows."""
    if "\n" in text or "://" in text:
        return False
    if PureWindowsPath(text).drive and PureWindowsPath(text).is_absolute():
        return True
    if text.startswith(("../", "..\\", *_HOMES)):
        return True
    path = PurePosixPath(text)
    # `/r/pics` may be the name of a class.
    return path.is_absolute() and len(path.parts) > 1 and (len(path.parts) > 3 or Path(path.parent).is_dir())


def base_name(text: str) -> str:
    """`train.csv` for `/data/train.csv`, `network.py:build` for `/me/network.py:build`."""
    return PureWindowsPath(text).name if "\\" in text else PurePosixPath(text).name or text


def _is_token(key: Any, value: Any) -> bool:
    return str(key).endswith("token") and isinstance(value, str) and value.startswith("hf_")

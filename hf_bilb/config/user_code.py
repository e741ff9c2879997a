"""A user's own code in a recipe: `path/to/file.py` or `package.module`, or a name in one, `path/to/file.py:name`.

It runs with the rights of whoever starts the run: a recipe that names files is to be read like the files.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_bilb.config.options import nearest, shown
from hf_bilb.errors import OptionError

_own_files: set[str] = set()  # of what was imported here, as it stands in tracebacks


def check_reference(reference: str, path: str) -> None:
    """Raise `OptionError` for the option `path` unless `reference` has the form of one; imports nothing."""
    source, _, name = reference.rpartition(":")
    if not source or not name.isidentifier():
        raise OptionError(
            f"{path}: {shown(reference)} is not valid, expected path/to/file.py:function or package.module:function"
        )


def load_reference(reference: str, path: str) -> Callable[..., Any]:
    """Import what `reference` names; files are seen from the current folder.

    Raises:
        OptionError: for the option `path`: no such file, module or function, or one that cannot be imported.
    """
    source, _, name = reference.rpartition(":")
    module = import_source(source, path)
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    found = getattr(module, name, None)
    if found is None:
        raise OptionError(f"{path}: {source} has no {shown(name)}{nearest(name, known)}")
    if not callable(found):
        raise OptionError(f"{path}: {name!r} in {source} is {type(found).__name__}, expected a function or class")
    return found


def import_sources(given: Any, path: str) -> tuple[str, ...]:
    """Import each of a list of files and modules, for the option `path`; returns their names.

    Raises:
        OptionError: something else than a list of names (null is an empty one), or one that cannot be imported.
    """
    sources = [] if given is None else given
    if not isinstance(sources, (list, tuple)) or not all(isinstance(source, str) and source for source in sources):
        expected = "a list of files (path/to/file.py) or modules (package.module)"
        raise OptionError(f"{path}: {shown(given)} is not valid, expected {expected}")
    for i, source in enumerate(sources):
        import_source(source, f"{path}[{i}]")
    return tuple(sources)


def import_source(source: str, path: str) -> ModuleType:
    """The module that `source`, `path/to/file.py` or `package.module`, is imported as; a file once in a process.

    Raises:
        OptionError: for the option `path`: no such file or module, or one that cannot be imported.
    """
    is_file = source.endswith(".py")
    try:
        module = _import_file(Path(source), path) if is_file else importlib.import_module(source)
    except _NoSuchFile:
        raise
    except (Exception, SystemExit) as error:  # a script that calls sys.exit() when it is imported
        where = f" (line {line})" if (line := _line_of(error, source)) else ""
        what = f"{type(error).__name__}: {error}"
        raise OptionError(f"{path}: {source} cannot be imported: {what}{where}") from error
    _own_files.update(file for file in (vars(module).get("__file__"),) if file)
    return module


def _line_of(error: BaseException, source: str) -> int | None:
    """Where in the file `source` its import failed."""
    if isinstance(error, SyntaxError):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _is_file(frame.filename, source)]
    return lines[-1] if lines else None


def _is_file(filename: str, source: str) -> bool:
    return source.endswith(".py") and filename == os.path.abspath(source)


def own_code(error: BaseException) -> str | None:
    """`file.py:12` where an error passed through code that a recipe names, the line nearest to the error; else None."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _own_files]
    if not frames:
        return None
    file, here = Path(frames[-1].filename), Path.cwd()
    return f"{file.relative_to(here) if file.is_relative_to(here) else file}:{frames[-1].lineno}"


class _NoSuchFile(OptionError):
    """Said in full already."""


def _import_file(file: Path, path: str) -> ModuleType:
    if not file.is_file():
        near = nearest(file.name, [one.name for one in file.parent.glob("*.py")] if file.parent.is_dir() else [])
        raise _NoSuchFile(f"{path}: there is no file {shown(str(file))}{near}, seen from {str(Path.cwd())!r}")
    file = Path(os.path.abspath(file))  # in the Hub's cache a link, to a file without the suffix .py
    if (before := _imported_from(file)) is not None:
        return before
    name = f"hf_bilb_reference_{file.stem}_{zlib.crc32(str(file).encode()):08x}"  # two files may have one name
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # a file's, by its suffix .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _imported_from(file: Path) -> ModuleType | None:
    """The module that `file` has become, under whatever name; run a second time, it would register a second time."""
    for module in list(sys.modules.values()):
        origin = vars(module).get("__file__") if isinstance(module, ModuleType) else None
        if isinstance(origin, str) and origin.endswith(file.name) and Path(origin).resolve() == file.resolve():
            return module
    return None

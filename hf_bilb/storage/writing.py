"""Files that are there whole or not at all: written aside in the same folder, brought to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; after an error neither it nor a half file is left.

    What `path` held before stays until then. Cost: waits for the disk (`fsync`).
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, with `\\n` at the ends of lines on every system; see `written_aside`."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes `folder` at the end; after an error nothing of it is left.

    What `folder` held before stays until then. Its files are brought to the disk by whoever writes them.
    """
    folder = Path(os.path.abspath(folder))  # `.` has no name of its own
    aside, former = (folder.with_name(f".{folder.name}.{os.getpid()}{ending}") for ending in ("", ".former"))
    aside.mkdir()
    try:
        yield aside
        if folder.exists():
            folder.replace(former)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)

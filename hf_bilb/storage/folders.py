"""Folders that are written to, looked at before the work that shall be written there begins."""

from __future__ import annotations

import os
from pathlib import Path

from hf_bilb.config.options import shown
from hf_bilb.errors import StorageError

_LONGEST_NAME = 255  # bytes, of the usual file systems


def check_output_folder(folder: str | Path, key: str) -> None:
    """See whether files can be written into `folder`, which may not be there yet; nothing is written.

    Args:
        folder: of the output.
        key: the option it stands in, for the message.

    Raises:
        StorageError: it, or what it would lie in, is no folder or may not be written to.
    """
    path = Path(folder)
    if "\0" in str(path) or any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        raise StorageError(f"{key}: {shown(str(folder))} is no name that a folder can have")
    there = next(one for one in (path.absolute(), *path.absolute().parents) if os.path.lexists(one))
    cause = None
    if not there.exists():
        cause = "is a link to what is not there"
    elif not there.is_dir():
        cause = "is a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        cause = "may not be written to"
    if cause is not None:
        which = "which" if there == path.absolute() else f"since {shown(str(there))}"
        raise StorageError(f"{key}: {shown(str(folder))} cannot be written to, {which} {cause}, expected a folder")


def make_output_folder(folder: str | Path, key: str) -> None:
    """Make `folder` with all that it lies in, after `check_output_folder`; the same errors."""
    check_output_folder(folder, key)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{key}: {shown(str(folder))} cannot be made: {error.strerror or error}") from None

"""JSON files: an object a line, or a list of objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_bilb.config.options import shown
from hf_bilb.data.own.text_files import UNREADABLE, ending, open_text, reading, state
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import datasets


def read_json(file: Path) -> datasets.Dataset | None:
    """The rows; None: there are none.

    Raises:
        OptionError: the file is damaged, or not of rows; names the row.
    """
    with reading(file):
        return _read(file)


def _read(file: Path) -> datasets.Dataset | None:
    import datasets

    with open_text(file) as stream:
        first = next((line.strip() for line in stream if line.strip()), "")
        is_only_line = not any(line.strip() for line in stream)
    if not first:
        return None
    if first.startswith("{") and (is_only_line or not _is_json(first)):
        _check_object(file, may_be_row=is_only_line and ending(file) != ".json")
    try:
        return datasets.Dataset.from_json(str(file), dataset_name=f"file_{state(file)}")
    except (*UNREADABLE, datasets.exceptions.DatasetsError):
        _check_json_lines(file)
        raise


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _check_object(file: Path, may_be_row: bool) -> None:
    """Raise `OptionError` for a file that is one object which holds all rows, or all columns.

    A line of JSON lines may be a row of lists, such as words and their tags: then only a lone list of objects is wrong.
    """
    with open_text(file) as stream:
        try:
            found = json.load(stream)
        except json.JSONDecodeError:
            return  # rows of which one is damaged
    where = f"data: {file}: is one object, expected one for each row, in a list or one a line"
    for key, value in found.items():
        are_rows = isinstance(value, list) and any(isinstance(row, dict) for row in value)
        if are_rows and not (may_be_row and len(found) > 1):
            raise OptionError(f"{where}; its rows are the list {key!r}: save that alone")
    if not may_be_row and _are_columns(list(found.values())):
        raise OptionError(f"{where}; it holds columns: save rows, in pandas by to_json(file, orient='records')")


def _are_columns(values: list[Any]) -> bool:
    """Whether they are as pandas writes columns: all are lists, or objects, of one length."""
    nested = [value for value in values if isinstance(value, list | dict)]
    return len(nested) == len(values) and len(set(map(len, nested))) == 1


def _check_json_lines(file: Path) -> None:
    """Raise `OptionError` for the first line that is no JSON object, if the file is not one value altogether."""
    with open_text(file) as stream:
        for number, line in enumerate((line for line in stream if line.strip()), 1):
            if number == 1 and line.lstrip().startswith("["):
                return
            try:
                value = json.loads(line.strip())
            except json.JSONDecodeError as error:
                raise OptionError(
                    f"data: {file}, row {number}: is no JSON: {error.msg}, character {error.pos + 1}"
                ) from None
            if not isinstance(value, dict):
                raise OptionError(f"data: {file}, row {number}: {shown(value)} is no JSON object with columns")

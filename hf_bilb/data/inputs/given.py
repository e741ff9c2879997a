"""What a user hands over, as a `Table`: files, lists, dicts, a pandas DataFrame, a `datasets.Dataset`."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_bilb.config.options import nearest, shown
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.files import Table, read_table
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import datasets

#: The name of what is no file, in messages.
INPUTS = "the inputs"


def is_file(inputs: Any) -> bool:
    """Whether `inputs` names a file, or a folder that `datasets` saved."""
    return isinstance(inputs, os.PathLike) or (isinstance(inputs, str) and Path(inputs).expanduser().exists())


def as_table(inputs: Any, csv: CsvOptions, columns: Sequence[str]) -> Table:
    """The rows of `inputs`.

    Args:
        inputs: a file; a `datasets.Dataset` or a pandas DataFrame; a list of dicts, or a dict of lists; a list of
            values, or of tuples of them, of the columns in their order.
        csv: how text files are read, and which words mean an empty cell.
        columns: what values without names are called.

    Raises:
        OptionError: something else; no rows.
    """
    if is_file(inputs):
        return read_table(Path(inputs).expanduser(), csv)
    table = Table(INPUTS, _as_dataset(inputs, columns), Path(), csv)
    if not len(table.rows):
        raise OptionError(f"{INPUTS}: there are no rows")
    return table


def check_column(column: str, known: Collection[str], where: str) -> None:
    """Raise `OptionError` where a table has no such column; names the nearest one, or those that it has."""
    if column not in known:
        hint = nearest(column, known) or f" (it has {', '.join(known) or 'none'})"
        raise OptionError(f"{where}: has no column {column!r}, which the model reads{hint}")


def _as_dataset(inputs: Any, columns: Sequence[str]) -> datasets.Dataset:
    import datasets
    import pandas as pd

    if isinstance(inputs, datasets.Dataset):
        return inputs
    if isinstance(inputs, pd.DataFrame):
        return _of_columns({str(name): inputs[name] for name in inputs.columns})
    if isinstance(inputs, Mapping):
        return _of_columns({str(name): list(values) for name, values in inputs.items()})
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        given = f"no file {shown(inputs)}" if isinstance(inputs, str) else f"a {type(inputs).__name__}"
        raise OptionError(f"{INPUTS}: got {given}, expected a file, a list, a pandas DataFrame or a datasets.Dataset")
    rows = list(inputs)
    if rows and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(str(name) for row in rows for name in row)
        return _of_columns({name: [row.get(name) for row in rows] for name in names})
    return _of_columns(_named(rows, columns))


def _named(rows: list[Any], columns: Sequence[str]) -> dict[str, list[Any]]:
    """Values without names, as the columns that the model reads."""
    if len(columns) == 1:
        return {columns[0]: rows}
    for number, row in enumerate(rows, 1):
        if isinstance(row, str | bytes) or not isinstance(row, Sequence) or len(row) != len(columns):
            raise OptionError(
                f"{INPUTS}, row {number}: expected {len(columns)} values ({', '.join(columns)}), got {shown(row)}"
            )
    return {name: [row[place] for row in rows] for place, name in enumerate(columns)}


def _of_columns(columns: Mapping[str, Any]) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    if len({len(values) for values in columns.values()}) > 1:
        raise OptionError(f"{INPUTS}: the columns differ in length")
    return datasets.Dataset(pa.table({name: _array(values) for name, values in columns.items()}))


def _array(values: Any) -> Any:
    """A column; values of several types become text, as the cells of a file are."""
    import pandas as pd
    import pyarrow as pa

    if isinstance(values, pd.Series) and isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(object)
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return pa.array([_as_text(value) for value in values], pa.string())


def _as_text(value: Any) -> str | None:
    if value is None or value != value:  # NaN, which is another way to say that a cell is empty
        return None
    return json.dumps(value) if isinstance(value, list | tuple) else str(value)

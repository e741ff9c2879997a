"""Files with the rows that were given and, as further columns, what a model says of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_bilb.config.options import shown
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.given import as_table
from hf_bilb.data.inputs.images import image_files
from hf_bilb.data.inputs.kinds import ImageInputs, SceneInputs
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.files import is_csv
from hf_bilb.errors import OptionError, StorageError
from hf_bilb.storage.folders import check_output_folder
from hf_bilb.storage.writing import written_aside

if TYPE_CHECKING:
    import datasets
    import pandas as pd


def check_output(output: Path, source: Path, force: bool) -> None:
    """Raise `OptionError` or `StorageError` where `output` cannot be, or shall not be, written."""
    if not is_table(output):
        known = ", ".join(_WRITERS)
        raise OptionError(f"--output: {shown(str(output))} is of no known kind, expected a name that ends in {known}")
    if output.is_dir():
        raise OptionError(f"--output: {shown(str(output))} is a folder")
    if output.exists() and source.exists() and output.samefile(source):
        raise OptionError(f"--output: {shown(str(output))} is the file that is read")
    if output.exists() and not force:
        raise OptionError(f"--output: {shown(str(output))} is already there; --force writes over it")
    if not output.parent.is_dir():
        raise OptionError(f"--output: there is no folder {shown(str(output.parent))}")
    check_output_folder(output.parent, "--output")


def read_rows(file: Path, data_format: DataFormat) -> datasets.Dataset:
    """The rows of a file as they are; of images alone the names of their files. Raises as `read_table`."""
    if isinstance(data_format.inputs, ImageInputs | SceneInputs) and (files := image_files(file)) is not None:
        import datasets

        return datasets.Dataset.from_dict({data_format.inputs.column: [one.name for one in files]})
    return as_table(file, data_format.csv, ()).rows


def is_table(output: Path) -> bool:
    """Whether `write_rows` knows files of this ending."""
    return output.suffix.lower() in _WRITERS


def check_free(columns: list[str], added: list[str], name: str) -> None:
    """Raise `OptionError` where a column that is to be added is there already."""
    for column in added:
        if column in columns:
            raise OptionError(f"{name}: has a column {column!r} already; --prefix gives the predictions other names")


def csv_of_output(file: Path, csv: CsvOptions) -> CsvOptions:
    """How a text file with the rows of `file` is written: as that is, which was read so; else in the usual way."""
    return csv if is_csv(file) else CsvOptions()


def write_rows(rows: datasets.Dataset, added: Mapping[str, list[Any]], output: Path, csv: CsvOptions) -> None:
    """Write the rows with further columns, aside and then renamed.

    Args:
        rows, added, output: see above.
        csv: encoding, delimiter and decimal sign of text files, so that the numbers that are added are written as those
            that are there.

    Raises:
        OptionError: a column or a class has a character that the encoding lacks.
        StorageError: it cannot be written.
    """
    frame = rows.with_format("pandas")[:].reset_index(drop=True)
    for name, values in added.items():
        frame[name] = values
    try:
        with written_aside(output) as aside:
            _WRITERS[output.suffix.lower()](frame, aside, csv)
    except UnicodeEncodeError as error:
        missing = shown(error.object[error.start : error.end])
        raise OptionError(
            f"--output: {output}: {missing} cannot be written in {csv.encoding}, as the file that is read is; a .jsonl "
            "or .parquet file takes it"
        ) from None
    except OSError as error:
        raise StorageError(f"--output: {output}: cannot be written: {error.strerror or error}") from None


def _write_csv(frame: pd.DataFrame, path: Path, csv: CsvOptions) -> None:
    frame.map(_cell).to_csv(
        path,
        index=False,
        sep=csv.delimiter or ",",
        decimal=csv.decimal,
        encoding=csv.encoding,
        lineterminator="\n",
    )


def _write_tsv(frame: pd.DataFrame, path: Path, csv: CsvOptions) -> None:
    _write_csv(frame, path, dataclasses.replace(csv, delimiter="\t"))


def _write_jsonl(frame: pd.DataFrame, path: Path, csv: CsvOptions) -> None:
    frame.map(_plain).to_json(path, orient="records", lines=True, force_ascii=False)


def _write_parquet(frame: pd.DataFrame, path: Path, csv: CsvOptions) -> None:
    frame.to_parquet(path, index=False)


_WRITERS: dict[str, Callable[[Any, Path, CsvOptions], None]] = {
    ".csv": _write_csv,
    ".tsv": _write_tsv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def _plain(value: Any) -> Any:
    """Arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _cell(value: Any) -> Any:
    """A list as JSON, which the data set `table` reads; an object, too."""
    value = _plain(value)
    return json.dumps(value, ensure_ascii=False, default=_nested) if isinstance(value, list | dict) else value


def _nested(value: Any) -> Any:
    """What JSON has no form for, in a list or an object: arrays as lists, dates and the like as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)

"""Tables from files and from the hub, read by `datasets`: one `Table` for each file."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hf_bilb.config.options import nearest
from hf_bilb.data.checks import loading_from_hub
from hf_bilb.data.own.csv_files import TABS, check_cells, read_csv
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.json_files import read_json
from hf_bilb.data.own.options import Patterns, SourceOptions
from hf_bilb.data.own.text_files import ending, reading, state
from hf_bilb.data.own.words import MISSING, word_of
from hf_bilb.data.splits import PARTS
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import datasets

_FORMATS = {
    **dict.fromkeys((".csv", ".data", ".test", ".txt", *TABS), "csv"),
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    ".parquet": "parquet",
}
#: Split of a set on the hub, or in a folder -> the part that it becomes.
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
           "dev": "validation", "test": "test"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Attributes:
        name: of the file, or of the set and its split, for messages.
        rows: its rows; the cells of text files are strings, as they stand there.
        folder: that the paths in it are relative to.
        csv: how cells of text are read, and what means an empty one.
    """

    name: str
    rows: datasets.Dataset
    folder: Path
    csv: CsvOptions = field(default_factory=CsvOptions)

    @cached_property
    def missing(self) -> frozenset[str]:
        """What means an empty cell, as it may stand there, and as the word that it becomes (`word_of`)."""
        return MISSING | {*self.csv.missing, *map(word_of, self.csv.missing)}

    @cached_property
    def features(self) -> datasets.Features:
        """The types of the columns, as `datasets` has them; it copies them whenever it is asked."""
        return self.rows.features

    def place(self, row: int) -> str:
        """A row for messages; the first one is 1."""
        return f"{self.name}, row {row + 1}"


def read_tables(options: SourceOptions) -> dict[str, list[Table]]:
    """The tables of each part that is given; `train` is among them.

    Raises:
        OptionError: a pattern that means no file, a file in two parts, or one that is damaged, has no rows, or one with
            too few cells, or is of a kind that is not known.
    """
    if options.hub is not None:
        return _read_hub(options.hub, options.path, options.csv)
    assert options.files is not None  # OwnDataOptions asks for one of the two
    where = f"{options.path}.files"
    if isinstance(options.files, dict):
        patterns = {part: options.files[part] for part in PARTS if part in options.files}
        found = {part: find_files(given, f"{where}.{part}") for part, given in patterns.items()}
    elif isinstance(options.files, str) and _is_saved(Path(options.files).expanduser(), "dataset_dict.json"):
        return _read_saved_dict(Path(options.files).expanduser(), where, options.csv)
    else:
        found = {"train": find_files(options.files, where)}
    _check_different(found, where)
    return {part: [read_checked(file, part, options.csv) for file in files] for part, files in found.items()}


def read_table(file: Path, csv: CsvOptions) -> Table:
    """The rows of one file of any kind that is known, or of a folder that `datasets` saved (of its test part).

    Raises:
        OptionError: it is not there, is damaged, has no rows or one with too few cells, or is of a kind that is not
            known.
    """
    check_there(file)
    return read_checked(file, "test", csv)


def check_there(file: Path) -> None:
    """Raise `OptionError` where there is no such file; names the nearest one in its folder."""
    if not file.exists():
        raise OptionError(f"there is no file {str(file)!r}{_nearest_file(file)}")


def _nearest_file(file: Path) -> str:
    return nearest(file.name, [one.name for one in file.parent.iterdir()] if file.parent.is_dir() else [])


# --- which files --------------------------------------------------------------------------------------------------


def find_files(given: Patterns, where: str) -> list[Path]:
    """The files that paths and patterns mean; raises `OptionError` for one that means none."""
    patterns = (given,) if isinstance(given, str) else given
    files: dict[Path, None] = {}
    for pattern in patterns:
        files.update(dict.fromkeys(_matching(pattern, where)))
    if not files:
        raise OptionError(f"{where}: is empty, expected paths or patterns of files")
    return list(files)


def _matching(pattern: str, where: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.exists():
        return [path]
    found = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        raise OptionError(f"{where}: {pattern!r} matches no file{_nearest_file(path)}, seen from {str(Path.cwd())!r}")
    return found


def _check_different(found: Mapping[str, list[Path]], where: str) -> None:
    owners: dict[Path, str] = {}
    for part, files in found.items():
        for file in files:
            if (other := owners.setdefault(file.resolve(), part)) != part:
                raise OptionError(f"{where}: {str(file)!r} is in two parts, {other} and {part}")


# --- one file -----------------------------------------------------------------------------------------------------


def read_checked(file: Path, part: str, csv: CsvOptions) -> Table:
    """The same as `read_file`, and raises `OptionError` for a row of a text file that has too few cells, too."""
    table = read_file(file, part, csv)
    if is_csv(file):
        check_cells(file, csv, table.rows)
    return table


def read_file(file: Path, part: str, csv: CsvOptions) -> Table:
    """The rows of one file, or of a folder that `datasets` saved; `part` is taken where that has several.

    Raises:
        OptionError: the file is damaged, has no rows or is of a kind that is not known.
    """
    if file.is_dir():
        return _read_saved(file, part, csv)
    kind = _FORMATS.get(ending(file))
    if kind is None:
        raise OptionError(
            f"data: {file} is of no known kind, expected {', '.join(_FORMATS)}, or packed (.gz, .xz, .bz2)"
        )
    if kind == "csv":
        rows = read_csv(file, csv)
    else:
        rows = read_json(file) if kind == "json" else _read_parquet(file)
    return Table(str(file), _not_empty(rows, str(file)), file.parent, csv)


def is_csv(file: Path) -> bool:
    """Whether it is a text file of rows and cells, by its name."""
    return file.is_file() and _FORMATS.get(ending(file)) == "csv"


def _not_empty(rows: datasets.Dataset | None, name: str) -> datasets.Dataset:
    if rows is None or not len(rows):
        raise OptionError(f"data: {name} has no rows")
    return rows


def _read_parquet(file: Path) -> datasets.Dataset | None:
    import datasets
    import pyarrow.parquet

    with reading(file):
        if not pyarrow.parquet.read_metadata(file).num_rows:
            return None
        return datasets.Dataset.from_parquet(str(file), dataset_name=f"file_{state(file)}")


# --- folders that `datasets` saved, and the hub -------------------------------------------------------------------


def _is_saved(folder: Path, file: str) -> bool:
    return (folder / file).is_file()


def _read_saved(folder: Path, part: str, csv: CsvOptions) -> Table:
    import datasets

    if _is_saved(folder, "dataset_dict.json"):
        tables = _read_saved_dict(folder, f"data.files.{part}", csv, part)
        return tables[part][0]
    if not _is_saved(folder, "state.json"):
        files = str(folder / "*.csv")
        raise OptionError(
            f"data: {folder} is a folder that was not saved by `datasets`, expected files, such as {files!r}"
        )
    with reading(folder):
        rows = datasets.Dataset.load_from_disk(str(folder))
    return Table(str(folder), _not_empty(rows, str(folder)), folder, csv)


def _read_saved_dict(folder: Path, where: str, csv: CsvOptions, part: str = "train") -> dict[str, list[Table]]:
    import datasets

    with reading(folder):
        splits = datasets.DatasetDict.load_from_disk(str(folder))
    return _parts_of(splits, str(folder), where, folder, csv, part)


def _read_hub(hub: str, path: str, csv: CsvOptions) -> dict[str, list[Table]]:
    import datasets

    name, _, config = hub.partition(":")
    with loading_from_hub(name, f"{path}.hub: {hub!r} cannot be loaded"):
        splits = datasets.load_dataset(name, config or None)
    return _parts_of(splits, hub, f"{path}.hub", Path(), csv, "train")


def _parts_of(
    splits: Mapping[str, datasets.Dataset], name: str, where: str, folder: Path, csv: CsvOptions, needed: str
) -> dict[str, list[Table]]:
    parts: dict[str, list[Table]] = {}
    for split, rows in splits.items():
        part = _SPLITS.get(split)
        if part is not None and part not in parts:
            of_split = f"{name}, {split}"
            parts[part] = [Table(of_split, _not_empty(rows, of_split), folder, csv)]
    if needed not in parts:
        raise OptionError(f"{where}: {name!r} has no split {needed!r} (it has {', '.join(splits)})")
    return {part: parts[part] for part in PARTS if part in parts}

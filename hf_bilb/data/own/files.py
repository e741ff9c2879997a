"""Tables from files and from the hub, read by `datasets`: one `Table` for each file."""

from __future__ import annotations

import bz2
import contextlib
import csv
import glob
import gzip
import itertools
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hf_bilb.config.options import nearest, shown
from hf_bilb.data.cache import short_hash
from hf_bilb.data.checks import loading_from_hub
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.options import Patterns, SourceOptions
from hf_bilb.data.own.words import MISSING, word_of
from hf_bilb.data.splits import PARTS
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import datasets

_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_TABS = (".tsv", ".tab")
_FORMATS = {
    **dict.fromkeys((".csv", ".data", ".test", ".txt", *_TABS), "csv"),
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    ".parquet": "parquet",
}
#: Split of a set on the hub, or in a folder -> the part that it becomes.
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
           "dev": "validation", "test": "test"}  # fmt: skip
#: What files that are damaged, or of another kind than their names say, raise.
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, NotImplementedError, StopIteration, lzma.LZMAError)
_LONGEST_CELL = 2**31 - 1  # that `csv` takes on every system
_OF_PANDAS = "Error tokenizing data. C error: "


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Attributes:
        name: of the file, or of the set and its split, for messages.
        rows: its rows; the cells of text files are strings, as they stand there.
        folder: that the paths in it are relative to.
        missing: words that mean an empty cell.
    """

    name: str
    rows: datasets.Dataset
    folder: Path
    missing: frozenset[str] = MISSING

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
        return _read_hub(options.hub, options.path)
    assert options.files is not None  # OwnDataOptions asks for one of the two
    where, missing = f"{options.path}.files", missing_words(options.csv)
    if isinstance(options.files, dict):
        patterns = {part: options.files[part] for part in PARTS if part in options.files}
        found = {part: _find(given, f"{where}.{part}") for part, given in patterns.items()}
    elif isinstance(options.files, str) and _is_saved(Path(options.files).expanduser(), "dataset_dict.json"):
        return _read_saved_dict(Path(options.files).expanduser(), where, missing)
    else:
        found = {"train": _find(options.files, where)}
    _check_different(found, where)
    tables = {part: [read_file(file, part, options.csv, missing) for file in files] for part, files in found.items()}
    for file, table in zip(itertools.chain(*found.values()), itertools.chain(*tables.values()), strict=True):
        if not file.is_dir() and _FORMATS[_ending(file)] == "csv":
            with _reading(file):
                _check_cells(table, options.csv)
    return tables


def read_table(file: Path, csv_options: CsvOptions) -> Table:
    """The rows of one file of any kind that is known, or of a folder that `datasets` saved (of its test part).

    Raises:
        OptionError: it is not there, is damaged, has no rows or is of a kind that is not known.
    """
    check_there(file)
    return read_file(file, "test", csv_options, missing_words(csv_options))


def missing_words(options: CsvOptions) -> frozenset[str]:
    """Words that mean an empty cell: as they stand in a file, and as all files have them."""
    return MISSING | {*options.missing, *map(word_of, options.missing)}


def check_there(file: Path) -> None:
    """Raise `OptionError` where there is no such file; names the nearest one in its folder."""
    if not file.exists():
        near = [one.name for one in file.parent.iterdir()] if file.parent.is_dir() else []
        raise OptionError(f"there is no file {str(file)!r}{nearest(file.name, near)}")


# --- which files --------------------------------------------------------------------------------------------------


def _find(given: Patterns, where: str) -> list[Path]:
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
        near = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise OptionError(
            f"{where}: {pattern!r} matches no file{nearest(path.name, near)}, seen from {str(Path.cwd())!r}"
        )
    return found


def _check_different(found: Mapping[str, list[Path]], where: str) -> None:
    owners: dict[Path, str] = {}
    for part, files in found.items():
        for file in files:
            if (other := owners.setdefault(file.resolve(), part)) != part:
                raise OptionError(f"{where}: {str(file)!r} is in two parts, {other} and {part}")


# --- one file -----------------------------------------------------------------------------------------------------


def read_file(file: Path, part: str, csv_options: CsvOptions, missing: frozenset[str] = MISSING) -> Table:
    """The rows of one file, or of a folder that `datasets` saved; `part` is taken where that has several.

    Raises:
        OptionError: the file is damaged, has no rows or is of a kind that is not known.
    """
    if file.is_dir():
        return _read_saved(file, part, missing)
    kind = _FORMATS.get(_ending(file))
    if kind is None:
        raise OptionError(
            f"data: {file} is of no known kind, expected {', '.join(_FORMATS)}, or packed (.gz, .xz, .bz2)"
        )
    with _reading(file):
        if kind == "csv":
            rows = _read_csv(file, csv_options)
        else:
            rows = _read_json(file) if kind == "json" else _read_parquet(file)
    return Table(str(file), _not_empty(rows, str(file)), file.parent, missing)


def _not_empty(rows: datasets.Dataset | None, name: str) -> datasets.Dataset:
    if rows is None or not len(rows):
        raise OptionError(f"data: {name} has no rows")
    return rows


def _ending(file: Path) -> str:
    name = Path(file.stem) if file.suffix in _OPENERS else file
    return name.suffix.lower()


def _open(file: Path, newline: str = "") -> IO[str]:
    opener: Callable[..., IO[str]] = _OPENERS.get(file.suffix, open)
    return opener(file, "rt", encoding="utf-8-sig", newline=newline)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns an error of reading into one line; `datasets` would also write some of its own."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    except OptionError:
        raise
    except (*_UNREADABLE, csv.Error, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split()).removeprefix(_OF_PANDAS)
        advice = "; save it as UTF-8" if isinstance(error.__cause__ or error, UnicodeError) else ""
        raise OptionError(f"data: {file} cannot be read: {cause or type(error).__name__}{advice}") from None
    finally:
        csv.field_size_limit(limit)
        datasets.logging.set_verbosity(verbosity)


def _read_csv(file: Path, options: CsvOptions) -> datasets.Dataset | None:
    """Every cell as text: what is a number, and what is missing, is decided column by column."""
    import datasets

    layout, comments = _layout(file, options)
    header, is_first_row, has_rows = _header(file, options.columns, layout, comments)
    if not has_rows:
        return None
    return datasets.Dataset.from_csv(
        str(file),
        features=datasets.Features({name: datasets.Value("string") for name in header}),
        names=header,
        header=None if is_first_row else 0,
        skiprows=comments,
        na_filter=False,
        encoding="utf-8-sig",
        # A carriage return alone ends no row, where rows end with a line feed.
        lineterminator=None if _has_windows_lines(file) else "\n",
        dataset_name=f"file_{_state(file)}",
        **layout,
    )


def _layout(file: Path, options: CsvOptions) -> tuple[dict[str, Any], int]:
    """How the cells of a file are parted, and how many comments stand at its top."""
    tabs = _ending(file) in _TABS
    quotes = not tabs if options.quotes is None else options.quotes
    layout: dict[str, Any] = {
        "sep": options.delimiter or ("\t" if tabs else ","),
        "quoting": csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        "skipinitialspace": quotes,  # so that a quote after a space is one
    }
    with _open(file) as stream:
        comments = sum(1 for _ in itertools.takewhile(lambda line: line[:1] == options.comment, stream))
    return layout, comments


def _check_cells(table: Table, options: CsvOptions) -> None:
    """Raise `OptionError` for the first row of a text file that has fewer cells than there are columns."""
    import pyarrow.compute

    file, expected = Path(table.name), len(table.features)
    last = table.rows.data.column(expected - 1)
    if not pyarrow.compute.any(pyarrow.compute.equal(last, "")).as_py():  # pandas fills short rows with empty cells
        return
    layout, comments = _layout(file, options)
    has_names = not _header(file, options.columns, layout, comments)[1]
    windows = _has_windows_lines(file)
    with _open(file, newline="" if windows else "\n") as stream:
        # What ends no row for pandas shall end none for `csv`.
        lines = stream if windows else (line.replace("\r\n", "\n").replace("\r", " ") for line in stream)
        rows = filter(None, _cells(itertools.islice(lines, comments, None), layout))
        for number, cells in enumerate(itertools.islice(rows, int(has_names), None), 1):
            if len(cells) < expected:
                raise _wrong_number(file, number, len(cells), expected)


def _wrong_number(file: Path, row: int, found: int, expected: int, hint: str = "") -> OptionError:
    return OptionError(f"data: {file}, row {row}: has {found} cells, expected {expected}, one for each column{hint}")


def other_delimiter(file: Path) -> str | None:
    """The delimiter of a text file whose first line is a single name with the usual one; None: it is the usual one, or
    no such file."""
    if not file.is_file() or _FORMATS.get(_ending(file)) != "csv":
        return None
    with _reading(file), _open(file) as stream:
        layout, _ = _layout(file, CsvOptions())
        return _delimiter_in(next(filter(None, _cells(stream, layout)), []))


def delimiter_hint(names: Sequence[str]) -> str:
    """For a file that became one column because it has another delimiter."""
    other = _delimiter_in(names)
    return f"; is data.csv.delimiter {other!r}?" if other else ""


def _delimiter_in(names: Sequence[str]) -> str | None:
    """A delimiter in the only name that a first line seems to have."""
    return next((one for one in ";\t|," if one in names[0]), None) if len(names) == 1 else None


def _cells(lines: Iterable[str], layout: Mapping[str, Any]) -> Iterator[list[str]]:
    return csv.reader(
        lines, delimiter=layout["sep"], quoting=layout["quoting"], skipinitialspace=layout["skipinitialspace"]
    )


def _state(file: Path) -> str:
    """Names the rows of a file in the cache of `datasets`, which by itself takes a file for unchanged whose path and
    time of change are the same: so they are after `rsync -t` and `cp -p`."""
    facts = file.stat()
    return short_hash(f"{facts.st_size} {facts.st_ctime_ns} {facts.st_ino}")


def _has_windows_lines(file: Path) -> bool:
    with _open(file, newline="\n") as stream:
        line = stream.readline()
    return line.endswith("\r\n") or not line.endswith("\n")


def _header(
    file: Path, columns: tuple[str, ...] | None, layout: Mapping[str, Any], comments: int
) -> tuple[list[str], bool, bool]:
    """The columns' names, whether the first line is a row, and whether there is one."""
    with _open(file) as stream:
        lines = _cells(itertools.islice(stream, comments, None), layout)
        top = [name.strip() for name in next(filter(None, lines), [])]
        is_row = columns is not None and 2 * len(set(columns) & set(top)) <= len(columns)
        header = list(columns) if columns is not None and is_row else top
        first = top if is_row and top else next((cells for cells in lines if cells), None)
    if repeated := {name for name in header if header.count(name) > 1}:
        raise OptionError(f"data: {file}: the column {min(repeated)!r} stands twice in the first line")
    # pandas would take the first cells for the rows' names, and give every column the values of its neighbour.
    if first is not None and len(first) > len(header):
        raise _wrong_number(file, 1, len(first), len(header), delimiter_hint(header))
    return header, is_row, first is not None


def _read_json(file: Path) -> datasets.Dataset | None:
    import datasets

    with _open(file) as stream:
        if not any(line.strip() for line in stream):
            return None
    try:
        return datasets.Dataset.from_json(str(file), dataset_name=f"file_{_state(file)}")
    except (*_UNREADABLE, datasets.exceptions.DatasetsError):
        _check_json_lines(file)
        raise


def _check_json_lines(file: Path) -> None:
    """Raise `OptionError` for the first line that is no JSON object, if the file is not one value altogether."""
    with _open(file) as stream:
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


def _read_parquet(file: Path) -> datasets.Dataset | None:
    import datasets
    import pyarrow.parquet

    if not pyarrow.parquet.read_metadata(file).num_rows:
        return None
    return datasets.Dataset.from_parquet(str(file), dataset_name=f"file_{_state(file)}")


# --- folders that `datasets` saved, and the hub -------------------------------------------------------------------


def _is_saved(folder: Path, file: str) -> bool:
    return (folder / file).is_file()


def _read_saved(folder: Path, part: str, missing: frozenset[str]) -> Table:
    import datasets

    if _is_saved(folder, "dataset_dict.json"):
        tables = _read_saved_dict(folder, f"data.files.{part}", missing, part)
        return tables[part][0]
    if not _is_saved(folder, "state.json"):
        files = str(folder / "*.csv")
        raise OptionError(
            f"data: {folder} is a folder that was not saved by `datasets`, expected files, such as {files!r}"
        )
    with _reading(folder):
        rows = datasets.Dataset.load_from_disk(str(folder))
    return Table(str(folder), _not_empty(rows, str(folder)), folder, missing)


def _read_saved_dict(folder: Path, where: str, missing: frozenset[str], part: str = "train") -> dict[str, list[Table]]:
    import datasets

    with _reading(folder):
        splits = datasets.DatasetDict.load_from_disk(str(folder))
    return _parts_of(splits, str(folder), where, folder, missing, part)


def _read_hub(hub: str, path: str) -> dict[str, list[Table]]:
    import datasets

    name, _, config = hub.partition(":")
    with loading_from_hub(name, f"{path}.hub: {hub!r} cannot be loaded"):
        splits = datasets.load_dataset(name, config or None)
    return _parts_of(splits, hub, f"{path}.hub", Path(), MISSING, "train")


def _parts_of(
    splits: Mapping[str, datasets.Dataset], name: str, where: str, folder: Path, missing: frozenset[str], needed: str
) -> dict[str, list[Table]]:
    parts: dict[str, list[Table]] = {}
    for split, rows in splits.items():
        part = _SPLITS.get(split)
        if part is not None and part not in parts:
            of_split = f"{name}, {split}"
            parts[part] = [Table(of_split, _not_empty(rows, of_split), folder, missing)]
    if needed not in parts:
        raise OptionError(f"{where}: {name!r} has no split {needed!r} (it has {', '.join(splits)})")
    return {part: parts[part] for part in PARTS if part in parts}

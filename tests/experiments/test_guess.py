"""What `hf-bilb init` takes a column for, whatever the kind of file is."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from hf_bilb.errors import OptionError
from hf_bilb.experiments import inspect_table as inspection
from hf_bilb.experiments.guess import group_column, guess_input, guess_task
from hf_bilb.experiments.inspect_table import InspectedTable, inspect_table

ROWS = 60


def table_of(folder: Path, columns: dict[str, Sequence[Any]]) -> InspectedTable:
    pd.DataFrame(columns).to_csv(folder / "t.csv", index=False)
    return inspect_table(folder / "t.csv")


def cycle(*values: Any) -> list[Any]:
    return [values[i % len(values)] for i in range(ROWS)]


@pytest.mark.parametrize(
    ("name", "values", "task", "given"),
    [
        ("x", cycle(0, 1), "classification", "numeric"),
        ("x", cycle(-1, 1), "classification", "numeric"),
        ("x", cycle(1, 2, 3, 4, 5), "classification", "numeric"),
        ("x", cycle(*(10 * i for i in range(20))), "classification", "numeric"),  # 20 values, 3 rows each
        ("x", cycle(*(10 * i for i in range(21))), "regression", "numeric"),
        ("x", cycle(0.5, 1.5), "regression", "numeric"),
        ("x", [i / 7 for i in range(ROWS)], "regression", "numeric"),
        ("x", [100 + i for i in range(ROWS)], "regression", None),  # counted through
        ("x", [100 + 2 * i for i in range(ROWS)], "regression", "numeric"),
        ("user_id", cycle(3, 8, 9), "classification", None),
        ("x", cycle(*(70_000_000_000_000_000_000 + i for i in range(25))), "regression", None),  # account numbers
        ("x", cycle("a", "b", "c"), "classification", "categorical"),
        ("x", cycle(True, False), "classification", "categorical"),
        ("x", cycle("2024", "2024x", "2025"), "classification", "categorical"),  # few: no spoilt numbers
        ("x", [f"name {i}" for i in range(ROWS)], None, None),
        ("x", cycle(*(f"one two three four five six seven {i}" for i in range(25))), "classification", None),
        ("x", cycle("2024-01-31", "2024-02-01", "2024-03-01"), "classification", None),
        ("x", cycle(7), None, None),
        ("x", cycle(None), None, None),
    ],
)
def test_what_a_column_is_taken_for(
    name: str, values: list[Any], task: str | None, given: str | None, tmp_path: Path
) -> None:
    column = table_of(tmp_path, {name: values, "other": range(ROWS)}).columns[0]
    assert guess_task(column).what == task
    assert guess_input(column).what == given


def test_a_word_among_numbers_is_said_with_its_row(tmp_path: Path) -> None:
    values = [str(1.5 * i) for i in range(ROWS)]
    values[17] = "about 9"
    column = table_of(tmp_path, {"x": values, "y": cycle(1, 2)}).columns[0]
    assert guess_task(column).why == guess_input(column).why == "numbers, but row 18 holds 'about 9'"


def test_paths_of_files_are_no_classes(tmp_path: Path) -> None:
    table = table_of(
        tmp_path, {"mask": cycle("a/1.png", "a/2.PNG"), "array": cycle("x.npy", "y.npy"), "y": cycle("a", "b.png")}
    )
    why = "paths of files; of masks write a task of type segmentation, of arrays dense_regression"
    guesses = [guess_task(column) for column in table.columns]
    assert [(guess.what, guess.why) for guess in guesses[:2]] == [(None, why)] * 2
    assert guesses[2].what == "classification"


def test_words_that_mean_no_value_among_numbers(tmp_path: Path) -> None:
    table = table_of(
        tmp_path, {"x": [*(1.5 * i for i in range(ROWS - 2)), "NA", "?"], "country": cycle("NA", "DE", "?", "FR")}
    )
    assert table.csv.missing == ("?", "NA")
    x, country = table.columns
    assert (x.kind, x.missing) == ("numbers", 2) and country.missing == 30  # a word is missing in all columns, or none
    alone = table_of(tmp_path, {"country": cycle("NA", "DE"), "y": cycle(1, 2)})
    assert alone.csv.missing == () and alone.columns[0].missing == 0


def test_lists_are_labels_of_words_or_of_rows(tmp_path: Path) -> None:
    words = [["a", "b"], ["c"], ["a", "d", "e"]] * 5
    columns = {
        "words": words,
        "tags": [["X" if word == "a" else "O" for word in row] for row in words],
        "numbers": [[1 if word == "a" else 0 for word in row] for row in words],
        "topics": [["p", "q"], [], ["q"]] * 5,
        "vectors": [[0.5, 1.5], [1.0, 2.0], [0.1, 0.2]] * 5,
    }
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "t.parquet"))
    table = inspect_table(tmp_path / "t.parquet")
    text = table.column("words", "")
    by_name = {column.name: guess_task(column, text).what for column in table.columns}
    assert by_name["tags"] == by_name["numbers"] == "token_classification"
    assert by_name["topics"] == "multi_label" and by_name["vectors"] is None
    assert guess_task(table.column("tags", "")).what == "multi_label"  # of texts that are no lists
    assert table.column("tags", "").counts == {"O": 20, "X": 10}
    assert table.column("topics", "").missing == 0


# --- kinds of files --------------------------------------------------------------------------------------------------

COLUMNS = {"n": [1.5, None, 3.0, 4.0] * 5, "w": ["a", "b", None, "b"] * 5, "i": [0, 1, 1, None] * 5}


def _json_lines(path: Path) -> None:
    rows = [dict(zip(COLUMNS, values, strict=True)) for values in zip(*COLUMNS.values(), strict=True)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _packed(path: Path) -> None:
    path.write_bytes(lzma.compress(pd.DataFrame(COLUMNS).to_csv(index=False).encode()))


def _dict(path: Path) -> None:
    part = datasets.Dataset.from_dict(COLUMNS)
    datasets.DatasetDict({"test": part.select(range(3)), "train": part}).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "t.csv": lambda path: pd.DataFrame(COLUMNS).to_csv(path, index=False),
    "semicolons.csv": lambda path: pd.DataFrame(COLUMNS).to_csv(path, index=False, sep=";"),
    "t.tsv": lambda path: pd.DataFrame(COLUMNS).to_csv(path, index=False, sep="\t"),
    "t.csv.xz": _packed,
    "t.jsonl": _json_lines,
    "t.parquet": lambda path: datasets.Dataset.from_dict(COLUMNS).to_parquet(str(path)),
    "folder": lambda path: datasets.Dataset.from_dict(COLUMNS).save_to_disk(str(path)),
    "parts": _dict,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_says_the_same(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    table = inspect_table(tmp_path / name)
    assert [column.name for column in table.columns] == list(COLUMNS) and table.num_rows == table.all_rows == 20
    assert [column.kind for column in table.columns] == ["numbers", "words", "numbers"]
    assert [column.missing for column in table.columns] == [5, 5, 5]
    assert [column.counts for column in table.columns] == [
        {"1.5": 5, "3": 5, "4": 5},
        {"b": 10, "a": 5},
        {"1": 10, "0": 5},
    ]
    assert table.csv.delimiter == (";" if name == "semicolons.csv" else None)


def test_of_a_long_table_the_first_rows_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "MOST_ROWS", 10)
    table = table_of(tmp_path, {"x": cycle(*range(20)), "y": cycle(1, 2)})
    assert (table.num_rows, table.all_rows) == (10, ROWS) and len(table.columns[0].counts) == 10


def test_rows_that_belong_together(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        {
            "row_id": range(ROWS),
            "patient": cycle(*range(20)),
            "sex": cycle("f", "m"),
            "grid": cycle(*range(20)),
        },
    )
    assert group_column(table, ()) == "patient"
    assert group_column(table, {"patient"}) is None  # row_id has a row for each value; grid is no id


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("t.csv", "", "has no rows"),
        ("t.csv", "a,b\n", "has no rows"),
        ("t.xlsx", "x", "is of no known kind"),
        ("t.jsonl", '{"a": 1}\n[2]\n', "row 2"),
    ],
)
def test_tables_that_cannot_be_read(name: str, text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=line):
        inspect_table(tmp_path / name)


def test_codes_with_leading_zeros_are_words(tmp_path: Path) -> None:
    codes = ["01067", "10115", "80331", "20095"] * 10
    column = table_of(tmp_path, {"zip": codes, "price": ["0", "10", "0.5", "7"] * 10}).columns[0]
    assert column.kind == "words"
    assert guess_input(column).what == "categorical" and guess_task(column).what == "classification"


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_is_found_though_texts_hold_commas(delimiter: str, tmp_path: Path) -> None:
    rows = [["id", "text", "label"], *([i, f"one, two, {i}", i % 2] for i in range(40))]
    (tmp_path / "t.csv").write_text("\n".join(delimiter.join(map(str, row)) for row in rows))
    table = inspect_table(tmp_path / "t.csv")
    assert table.csv.delimiter == delimiter
    assert [column.name for column in table.columns] == ["id", "text", "label"]


def test_a_file_that_is_no_utf_8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("a,b\nüber,1\n".encode("cp1252"))
    with pytest.raises(OptionError, match=r"t.csv cannot be read: 'utf-8' codec .*; save it as UTF-8$"):
        inspect_table(tmp_path / "t.csv")

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
    why = "numbers, but row 18 holds 'about 9'; if it means no value, list it in csv.missing"
    assert guess_task(column).why == guess_input(column).why == why


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


def test_a_file_in_an_encoding_that_is_not_found_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("имя,b\nпривет,1\n".encode("koi8-r"))
    line = r"t.csv cannot be read: 'utf-8' codec .*; data.csv.encoding is 'utf-8', set the file's own$"
    with pytest.raises(OptionError, match=line):
        inspect_table(tmp_path / "t.csv")


# --- how text files are written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_the_encoding_is_found(encoding: str, tmp_path: Path) -> None:
    rows = [f"Zoë {i},a longer text in plain letters,{i % 2}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["näme,text,y", *rows]), encoding=encoding)
    table = inspect_table(tmp_path / "t.csv")
    assert table.csv.encoding == encoding and table.columns[0].name == "näme"


#: Cells of a file with semicolons -> the decimal sign, and the first two numbers.
DECIMALS: dict[str, tuple[dict[str, list[str]], str, list[float]]] = {
    "commas": ({"n": ["3,5", "-4,25"]}, ",", [3.5, -4.25]),
    "commas and thousands": ({"n": ["1.234,5", "1.234.567,25"]}, ",", [1234.5, 1234567.25]),
    "thousands alone, next to commas": ({"n": ["1.234", "987"], "m": ["3,5", "4,5"]}, ",", [1234.0, 987.0]),
    "one that could be thousands": ({"n": ["1,234", "3,5"]}, ",", [1.234, 3.5]),
    "points": ({"n": ["3.5", "4.25"]}, ".", [3.5, 4.25]),
    "points next to commas": ({"n": ["3.5", "4.25"], "m": ["3,5", "4,5"]}, ".", [3.5, 4.25]),
    "points that part no thousands": ({"n": ["0.123", "0.456"], "m": ["3,5", "4,5"]}, ".", [0.123, 0.456]),
    "missing words": ({"n": ["3,5", "k.A.", "4,5"]}, ",", [3.5, float("nan")]),
}


@pytest.mark.parametrize("what", DECIMALS)
def test_the_decimal_sign_is_found(what: str, tmp_path: Path) -> None:
    cells, decimal, numbers = DECIMALS[what]
    frame = pd.DataFrame({name: cycle(*values) for name, values in cells.items()} | {"y": cycle(1, 2)})
    frame.to_csv(tmp_path / "t.csv", index=False, sep=";")
    table = inspect_table(tmp_path / "t.csv")
    column = table.columns[0]
    assert table.csv.decimal == decimal and column.kind == "numbers" and column.numbers is not None
    assert column.numbers[:2].tolist() == pytest.approx(numbers, nan_ok=True)


@pytest.mark.parametrize("values", [("1,234", "5,678"), ("1,2,3", "4,5"), ("1,5 m", "2,5 m")])
def test_commas_that_may_be_something_else_are_no_decimal_ones(values: tuple[str, str], tmp_path: Path) -> None:
    """Thousands, lists, words."""
    pd.DataFrame({"n": cycle(*values), "y": cycle(1, 2)}).to_csv(tmp_path / "t.csv", index=False, sep=";")
    table = inspect_table(tmp_path / "t.csv")
    assert table.csv.decimal == "." and table.columns[0].kind == "words"


def test_the_delimiter_of_a_file_without_names_and_with_decimal_commas(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("".join(f"{i % 7},5;{i % 3},25;{'ab'[i % 2]}\n" for i in range(ROWS)))
    table = inspect_table(tmp_path / "t.csv", ("n", "m", "c"))
    assert (table.csv.delimiter, table.csv.decimal, table.csv.columns) == (";", ",", ("n", "m", "c"))
    assert table.num_rows == ROWS and table.hint == ""
    first = table.columns[0].numbers
    assert first is not None and first[:3].tolist() == [0.5, 1.5, 2.5]


def test_semicolons_in_some_cells_are_no_delimiter(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,tags\n" + "".join(f"one; two,{'a;b' if i % 2 else 'a'}\n" for i in range(20)))
    table = inspect_table(tmp_path / "t.csv")
    assert table.csv.delimiter is None and [column.name for column in table.columns] == ["text", "tags"]


def test_a_semicolon_in_a_name_is_no_delimiter(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("size; in m,y\n" + "".join(f"{i},{i % 2}\n" for i in range(20)))
    assert [column.name for column in inspect_table(tmp_path / "t.csv").columns] == ["size; in m", "y"]


def test_a_first_line_of_values_is_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("".join(f"{i / 7:.3f},{i},a\n" for i in range(ROWS)))
    assert inspect_table(tmp_path / "t.csv").hint == "; if its first line is a row, name the columns in --columns"
    with pytest.raises(OptionError, match=r"row 1: has 3 cells, expected 2, one for each column$"):
        inspect_table(tmp_path / "t.csv", ("a", "b"))
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(OptionError, match=r"^--columns: says nothing for .*t.jsonl, whose columns have names$"):
        inspect_table(tmp_path / "t.jsonl", ("a", "b"))


@pytest.mark.parametrize(
    ("values", "what", "separator"),
    [
        (("red|blue", "red", "blue|old", "red|old", "blue"), "multi_label", "|"),
        (("red;blue", "red", "blue;old", "red;old", "blue"), "multi_label", ";"),
        (("red, blue", "red", "blue, old", "red, old", "blue"), "multi_label", ","),
        (("red", "blue", "red|"), "classification", None),
        (("yes", "no"), "classification", None),
    ],
)
def test_lists_in_cells_are_labels(values: tuple[str, ...], what: str, separator: str | None, tmp_path: Path) -> None:
    column = table_of(tmp_path, {"x": cycle(*values), "y": range(ROWS)}).columns[0]
    guess = guess_task(column)
    assert (guess.what, guess.separator) == (what, separator)
    if separator is not None:
        assert column.split(separator).counts == {"red": 36, "blue": 36, "old": 24}


def test_names_with_commas_are_no_lists(tmp_path: Path) -> None:
    """Each value of a list stands in several cells."""
    column = table_of(tmp_path, {"x": cycle(*(f"name {i}, place {i}" for i in range(8))), "y": range(ROWS)}).columns[0]
    assert guess_task(column).separator is None


def test_words_and_tags_in_cells(tmp_path: Path) -> None:
    table = table_of(tmp_path, {"text": cycle("the cat sat", "a dog"), "tags": cycle("O B O", "O B")})
    text, tags = table.columns
    assert guess_task(tags, text).what == "token_classification" and guess_task(tags, text).separator == " "


def test_two_spellings_are_said(tmp_path: Path) -> None:
    column = table_of(tmp_path, {"x": cycle("yes", "no", "Yes"), "y": range(ROWS)}).columns[0]
    assert guess_task(column).why == "words, 3 different values, 'yes' and 'Yes' among them: are they one?"


def test_objects_are_no_images(tmp_path: Path) -> None:
    rows = [{"meta": {"path": "a", "size": i}, "pairs": [[i], [1, 2]], "y": i % 2} for i in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    meta, pairs, _ = inspect_table(tmp_path / "t.jsonl").columns
    assert guess_input(meta).why == guess_input(pairs).why == "lists of lists, or objects"
    assert guess_task(meta).why == "lists of lists, or objects, no labels"

"""Text files as people have them: encodings, decimal commas, lists in a cell, first lines; pandas reads them, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import MultiLabelBinarizer

from hf_bilb.config.yaml import load_yaml
from hf_bilb.data.inputs.kinds import LabelColumns
from hf_bilb.data.inputs.labels import read_known_labels
from hf_bilb.data.own.columns import numbers, texts, word_lists, words
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.files import Table, read_table
from hf_bilb.data.own.json_files import read_json
from hf_bilb.data.own.text_files import guess_encoding
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import TaskType
from tests.data.glue_files import write_encoder
from tests.data.own.tables import labels, load, three_parts, write_csv, write_jsonl

NAN = np.nan
GERMAN = CsvOptions(delimiter=";", decimal=",")
FRAME = pd.DataFrame(
    {
        "Straße": ["Köln, am Rhein", 'Zoë "Z", in a house', "à côté; là, in the street", "ö"],
        "n": [1.5, -2.25, NAN, 1_234_567.875],
        "last": ["x", None, "y", None],
    }
)


def table_of(file: Path, **csv: Any) -> Table:
    return read_table(file, CsvOptions(**csv))


# --- decimal commas ---------------------------------------------------------------------------------------------------


def german(value: float, digits: int) -> str:
    """As a German spreadsheet writes it: `-1.234,50`."""
    return f"{value:,.{digits}f}".translate(str.maketrans(",.", ".,"))


def test_numbers_are_those_that_pandas_reads(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    cells = [german(value, int(draw.integers(0, 5))) for value in draw.normal(0, 1e5, 200)]
    cells += ["4,1", "-4,1", "+4,1", ",5", "7", "-0", "0,001", "1,5e3", "-2E-2", "1.000", "1.000.000", "12.345,678"]
    file = tmp_path / "a.csv"
    file.write_text("n;x\n" + "".join(f"{cell};1\n" for cell in cells))
    expected = pd.read_csv(file, sep=";", decimal=",", thousands=".")["n"]
    assert expected.dtype == float and np.array_equal(numbers(read_table(file, GERMAN), "n"), expected)


@pytest.mark.parametrize(
    "cell", ["4.1", "0.123", "0.123,4", "1.23,4", "1234.567", "1.234.56", "1,2,3", "1,", "1.234,", "e5", "1 234,5"]
)
def test_what_is_no_number_with_a_decimal_comma(cell: str, tmp_path: Path) -> None:
    """`0.123` is not read as 123, as pandas would with thousands='.'."""
    file = tmp_path / "a.csv"
    file.write_text(f"n;x\n1,5;1\n{cell};1\n")
    with pytest.raises(OptionError) as error:
        numbers(read_table(file, GERMAN), "n")
    place = f"data: {file}, row 2: column 'n' is '{cell}'"
    assert str(error.value) == f"{place}, expected a number with a decimal comma, as data.csv.decimal says"


@pytest.mark.parametrize(
    ("cell", "hint"),
    [
        ("4,1", "; is data.csv.decimal ','?"),
        ("1.234,5", "; is data.csv.decimal ','?"),
        ("1,234", "; write thousands without commas; is data.csv.decimal ','?"),
        ("1,234.5", "; write thousands without commas"),
        ("1,234,567", "; write thousands without commas"),
        ("4,1,2", ""),
        ("4 EUR", ""),
    ],
)
def test_commas_in_a_number_are_said(cell: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f'n,x\n1.5,1\n"{cell}",1\n')
    with pytest.raises(OptionError) as error:
        numbers(table_of(file), "n")
    assert str(error.value) == f"data: {file}, row 2: column 'n' is '{cell}', expected a number{hint}"


def test_a_number_is_the_same_word_in_all_kinds_of_files(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [{"c": 4.1, "y": 1}, {"c": 1000, "y": 2}, {"c": 1, "y": 3}])
    (tmp_path / "a.csv").write_text("c;y\n4,1;1\n1.000;2\n1;3\n")
    data = load(
        files={**three_parts(str(tmp_path / "a.csv")), "train": train},
        csv={"delimiter": ";", "decimal": ","},
        inputs={"categorical": ["c"]},
        tasks={"y": {"type": "regression"}},
    )
    assert [data.train[row]["categorical"].item() for row in range(3)] == [2, 3, 1]  # in the order of their numbers
    assert [data.test[row]["categorical"].item() for row in range(3)] == [2, 3, 1]


def test_a_text_keeps_its_commas_and_points(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("t;n\n1.234,5;1\n")
    assert texts(read_table(tmp_path / "a.csv", GERMAN), "t") == ["1.234,5"]


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings(encoding: str, end: str, packed: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.csv{packed}"
    FRAME.to_csv(file, index=False, sep=";", decimal=",", encoding=encoding, lineterminator=end)
    table = table_of(file, delimiter=";", decimal=",", encoding=encoding.removesuffix("-sig"))
    assert table.rows.column_names == list(FRAME.columns)
    assert texts(table, "Straße") == list(FRAME["Straße"])
    assert np.array_equal(numbers(table, "n"), FRAME["n"], equal_nan=True)
    assert guess_encoding(file) == encoding.removesuffix("-sig")


@pytest.mark.parametrize(
    ("written", "read", "said"),
    [
        ("cp1252", "utf-8", "byte 0xdf in position 4: invalid continuation byte; is data.csv.encoding 'cp1252'?"),
        ("utf-16", "utf-8", "can't decode byte 0xff in position 0: invalid start byte; is data.csv.encoding 'utf-16'?"),
        ("utf-8", "utf-16", "UTF-16 stream does not start with BOM; is data.csv.encoding 'utf-8'?"),
        ("utf-8", "ascii", "byte 0xc3 in position 4: ordinal not in range(128); is data.csv.encoding 'utf-8'?"),
        ("utf-16", "cp1252", "its text holds NUL; is data.csv.encoding 'utf-16'?"),
        ("koi8-r", "utf-8", "invalid continuation byte; data.csv.encoding is 'utf-8', set the file's own"),
    ],
)  # fmt: skip
def test_a_file_in_another_encoding_is_one_line(written: str, read: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    text = FRAME.to_csv(index=False, sep=";") if written != "koi8-r" else "имя;n\nпривет;1\n"
    file.write_bytes(text.encode(written))
    with pytest.raises(OptionError) as error:
        table_of(file, delimiter=";", encoding=read)
    assert str(error.value).startswith(f"data: {file} cannot be read: ") and str(error.value).endswith(said)


def test_utf_8_that_is_read_as_another_encoding_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of these no byte is an error, so that names and categories would be other ones without a word."""
    file = tmp_path / "a.csv"
    FRAME.to_csv(file, index=False, sep=";", encoding="utf-8")
    table_of(file, delimiter=";", encoding="cp1252")
    assert f"data.csv.encoding: is 'cp1252', but {file} looks like utf-8: its letters" in caplog.text
    caplog.clear()
    FRAME.to_csv(file, index=False, sep=";", encoding="cp1252")
    table_of(file, delimiter=";", encoding="cp1252")
    assert not caplog.records


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (b"a,b\n1,2\n", "utf-8"),
        ("name\nRené".encode("latin-1"), "cp1252"),
        (b"", "utf-8"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\xfd\xfc", None),
        ("имя,привет\n".encode("cp1251"), None),
        (b"a,b\n" + b"x,1\n" * 1000 + b"x\0,2\n", "utf-8"),  # a stray zero
        (("é" * 5 + "a" * (2**20 - 11) + "ü").encode(), "utf-8"),  # a letter on both sides of where a read ends
    ],
)
def test_guessed_encodings(data: bytes, encoding: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    assert guess_encoding(tmp_path / "a.csv") == encoding


# --- lists in a cell --------------------------------------------------------------------------------------------------

TAGS = [["red", "blue"], ["red"], [], None, ["old", "blue", "red"], ["old"]]


@pytest.mark.parametrize(("separator", "delimiter"), [("|", ","), (";", ","), (",", ","), (",", ";"), (" ", ",")])
def test_lists_with_a_separator(separator: str, delimiter: str, tmp_path: Path) -> None:
    """Also one that is the delimiter, in quoted cells. An empty cell is no label, `[]` a row without any."""
    cells = ["" if tags is None else separator.join(tags) or "[]" for tags in TAGS]
    cells[0] = cells[0].replace(separator, f"{separator} ")  # white space is no part of a value
    frame = pd.DataFrame({"x": range(len(TAGS)), "tags": cells})
    frame.to_csv(tmp_path / "a.csv", index=False, sep=delimiter)
    data = load(
        files=three_parts(str(tmp_path / "a.csv")),
        csv={"delimiter": delimiter, "list_separator": separator},
        inputs={"numeric": ["x"]},
        tasks={"tags": {"type": "multi_label"}},
    )
    known = [tags for tags in TAGS if tags is not None]
    binarizer = MultiLabelBinarizer().fit(known)
    assert data.model_arguments["tasks"]["tags"].names == tuple(binarizer.classes_)
    assert np.array_equal(labels(data), binarizer.transform(known))
    assert np.isnan(labels(data, "test")[3]).all() and len(data.test) == 6


def test_a_file_whose_lists_look_like_yes_and_no_is_measured_as_lists(tmp_path: Path) -> None:
    """A test file with one short list in each cell, all of them `0` or `1`."""
    (tmp_path / "a.csv").write_text("x,tags\n1,0\n2,1\n3,\n")
    table = table_of(tmp_path / "a.csv", list_separator="|")
    task = TaskType("multi_label", 3, ("0", "1", "2"))
    found = read_known_labels(table, {"tags": task}, {"tags": LabelColumns(("tags",))})
    assert np.array_equal(found.values, [[1, 0, 0], [0, 1, 0], [NAN] * 3], equal_nan=True)


def test_yes_and_no_of_one_column_are_no_lists(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,ad,tags\n1,yes,a|b\n2,no,b\n3,Yes,a\n")
    data = load(
        files=three_parts(str(tmp_path / "a.csv")),
        csv={"list_separator": "|"},
        inputs={"numeric": ["x"]},
        tasks={"ad": {"type": "multi_label"}, "tags": {"type": "multi_label"}},
    )
    assert labels(data).tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("separator", [" ", "|", "| "])
def test_words_and_their_tags_in_cells(separator: str, tmp_path: Path) -> None:
    encoder = str(write_encoder(tmp_path / "encoder"))
    rows = [
        {"words": ["the", "cat", "sat"], "tags": ["O", "B-animal", "O"]},
        {"words": ["a", "dog"], "tags": ["O", "B-animal"]},
    ]
    as_cells = [{name: separator.join(values) for name, values in row.items()} for row in rows]
    pd.DataFrame(as_cells).to_csv(tmp_path / "a.csv", index=False)
    options = {"inputs": {"text": "words"}, "tasks": {"tags": {"type": "token_classification"}}, "tokenizer": encoder}
    found = load(files=three_parts(str(tmp_path / "a.csv")), csv={"list_separator": separator[0]}, **options)
    expected = load(files=three_parts(write_jsonl(tmp_path / "a.jsonl", rows)), **options)
    table = table_of(tmp_path / "a.csv", list_separator=separator[0])
    assert word_lists(table, "words") == [row["words"] for row in rows]
    for row in range(2):
        for name, values in expected.train[row].items():
            assert np.array_equal(found.train[row][name], values), name


def test_numbers_with_decimal_commas_in_lists(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x;sizes\n1;1,5|2\n2;2,0\n")
    tasks = {"sizes": {"type": "multi_label"}}
    csv = {"delimiter": ";", "decimal": ",", "list_separator": "|"}
    data = load(files=three_parts(str(tmp_path / "a.csv")), csv=csv, inputs={"numeric": ["x"]}, tasks=tasks)
    assert data.model_arguments["tasks"]["sizes"].names == ("1.5", "2")


# --- first lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "is_row"),
    [
        ("a,b,c,d,e", False),
        ("c,a", False),  # some of the columns, as in a file to predict on
        ("a,b,new", False),
        ("a,b,c,d,e,new,newer", False),
        ("1,2,3,4,5", True),
        ("a,2,3,4,5", True),  # a value that is a name by chance
        ("a,b,3,4,5", True),
    ],
)
def test_whether_a_first_line_is_one_of_names(first: str, is_row: bool, tmp_path: Path) -> None:
    number = first.count(",") + 1
    (tmp_path / "a.csv").write_text(f"{first}\n" + ",".join("9" * number) + "\n")
    table = table_of(tmp_path / "a.csv", columns=tuple("abcde"))
    assert table.rows.column_names == (list("abcde") if is_row else first.split(","))
    assert len(table.rows) == 1 + is_row


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1.5,3.5,x\n2,3,y\n", "has no column 'y' (it has 1.5, 3.5, x); if its first line is a row, name the columns "
         "in data.csv.columns"),
        ("1,2,x\n2,3,y\n", "has no column 'y' (it has 1, 2, x); if its first line is a row, name the columns in "
         "data.csv.columns"),
        ("a,2020,b\n1,2,3\n", "has no column 'y' (it has a, 2020, b)"),
        ("a;b;c\n1;2;3\n", "has no column 'y' (it has a;b;c; is data.csv.delimiter ';'?)"),
    ],
)  # fmt: skip
def test_what_a_first_line_may_be_is_said(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    file = str(tmp_path / "a.csv")
    with pytest.raises(OptionError) as error:
        load(files=file, inputs={"numeric": ["a"]}, tasks={"y": {"type": "regression"}})
    assert str(error.value) == f"data.tasks.y.column: {file} {line}"


def test_commas_in_the_names_of_a_file_with_another_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a, in m;b\n1;2\n")
    with pytest.raises(OptionError, match=r"row 1: has 1 cells, expected 2, .*; is data.csv.delimiter ';'\?$"):
        table_of(tmp_path / "a.csv")


def test_the_same_value_twice_in_a_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("0.5,0.5,x\n1,2,y\n")
    with pytest.raises(OptionError) as error:
        table_of(tmp_path / "a.csv")
    assert str(error.value) == (
        f"data: {tmp_path / 'a.csv'}: the column '0.5' stands twice in the first line; if its first line is a row, "
        "name the columns in data.csv.columns"
    )


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"encoding": "utf-9"}, "encoding: 'utf-9' is not known (did you mean \"utf-8\"?)"),
        ({"encoding": "hex"}, "encoding: 'hex' is not known, expected one such as utf-8, utf-16, cp1252, latin-1"),
        ({"list_separator": "||"}, "list_separator: '||' is not valid, expected one character"),
        ({"delimiter": ""}, "delimiter: '' is not valid, expected one character"),
        ({"columns": ("a", "b", "a")}, "columns: 'a' stands twice"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError) as error:
        CsvOptions(**options)
    assert str(error.value) == line


# --- JSON -------------------------------------------------------------------------------------------------------------

ONE = "is one object, expected one for each row, in a list or one a line"
SMALL = pd.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "z"]})


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_objects(indent: int | None, tmp_path: Path) -> None:
    SMALL.to_json(tmp_path / "a.json", orient="records", indent=indent)
    assert read_json(tmp_path / "a.json").to_pandas().equals(SMALL)


def test_one_row_of_lists_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"words": ["a", "b"], "tags": ["O", "O"]}\n')
    assert read_json(tmp_path / "a.jsonl").to_list() == [{"words": ["a", "b"], "tags": ["O", "O"]}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"version": 1, "data": [{"a": 1}, {"a": 2}]}, "its rows are the list 'data': save that alone"),
        ({"a": [1, 2], "b": [3, 4]}, "it holds columns: save rows, in pandas by to_json(file, orient='records')"),
        (json.loads(SMALL.to_json()), "it holds columns: save rows, in pandas by to_json(file, orient='records')"),
    ],
)
def test_json_that_is_one_object(found: Any, said: str, indent: int | None, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(found, indent=indent))
    with pytest.raises(OptionError) as error:
        read_json(file)
    assert str(error.value) == f"data: {file}: {ONE}; {said}"


def test_nested_values_are_no_labels_and_no_images(tmp_path: Path) -> None:
    rows = [{"x": 1, "pairs": [[0, 1], [2]], "meta": {"path": "a", "size": 2}, "y": 1}] * 4
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    for name, type_, line in (
        ("pairs", "multi_label", "column 'pairs' holds lists of list<item: int64>, expected lists of words"),
        ("pairs", "classification", "column 'pairs' holds lists, expected words or numbers"),
        ("meta", "classification", "column 'meta' holds struct<path: string, size: int64>, expected words or numbers"),
    ):
        with pytest.raises(OptionError) as error:
            load(files=file, inputs={"numeric": ["x"]}, tasks={name: {"type": type_}})
        assert str(error.value) == f"data: {file}: {line}"


# --- spellings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "pair"),
    [
        (["yes", "Yes", "no"], ("Yes", "yes")),
        (["y", "n", "YES"], ("YES", "y")),
        (["O", "B-per", "B-PER"], ("B-PER", "B-per")),
        (["yes", "no", "maybe"], None),
        (["n", "y", "n"], None),
        (["true", "True", "FALSE"], None),  # one class in every kind of file
    ],
)
def test_two_spellings_of_one_class_are_said(
    cells: list[str], pair: tuple[str, str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = three_parts(write_csv(tmp_path / "a.csv", "x,c\n" + "\n".join(f"{n},{c}" for n, c in enumerate(cells))))
    load(files=files, inputs={"numeric": ["x"]}, tasks={"c": {"type": "classification"}})
    if pair is None:
        assert not caplog.records
        return
    first, second = pair
    (message,) = (record.message for record in caplog.records)
    said, _, classes = message.partition("; for one, set classes: ")
    assert said == f"data.tasks.c: {first!r} and {second!r} of column 'c' are two classes"
    assert load_yaml(classes.removesuffix(", and the others"), "") == {first: [first, second]}
    caplog.clear()
    rest = {cell: [cell] for cell in cells if cell not in pair}
    task = {"type": "classification", "classes": {first: pair, **rest}}
    load(files=files, inputs={"numeric": ["x"]}, tasks={"c": task})
    assert not caplog.records


def test_words_of_a_table_with_points_are_what_they_were(tmp_path: Path) -> None:
    """Without `decimal: ','` nothing is made of a comma."""
    (tmp_path / "a.csv").write_text('c,x\n"4,1",1\n4.10,2\n')
    assert words(table_of(tmp_path / "a.csv"), "c").known == ("4,1", "4.10")

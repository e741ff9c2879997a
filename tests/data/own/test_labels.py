"""What becomes a label, of each type of task, in each kind of file."""

from __future__ import annotations

import gzip
import lzma
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.utils.class_weight import compute_class_weight

from hf_bilb.data.own.columns import numbers, texts, words_of
from hf_bilb.data.own.files import Table
from hf_bilb.losses.task_types import TaskType
from tests.data.own.tables import labels, load, three_parts, write_csv, write_jsonl

ROWS: list[dict[str, Any]] = [
    {"age": 30, "stars": 1, "topic": "cats", "ad": True, "spam": 0, "kinds": ["new", "red"]},
    {"age": 40, "stars": 2.5, "topic": "dogs", "ad": False, "spam": 1, "kinds": []},
    {"age": None, "stars": None, "topic": None, "ad": None, "spam": None, "kinds": None},
    {"age": 50, "stars": 4, "topic": "ants", "ad": False, "spam": 1, "kinds": ["red"]},
    {"age": 60, "stars": None, "topic": "dogs", "ad": True, "spam": None, "kinds": ["new"]},
]
TASKS: dict[str, Any] = {
    "stars": {"type": "regression", "unit": "stars", "standardize": False},
    "topic": {"type": "classification"},
    "flags": {"type": "multi_label", "columns": ["ad", "spam"]},
    "kinds": {"type": "multi_label"},
}
NAN = np.nan
#: stars, topic, ad, spam, new, red; the row without any label is left out.
LABELS = [
    [1.0, 1, 1, 0, 1, 1],
    [2.5, 2, 0, 1, 0, 0],
    [4.0, 0, 0, 1, 0, 1],
    [NAN, 2, 1, NAN, 1, 0],
]


def csv_of(separator: str = ",") -> str:
    """As pandas writes the rows: True, 0.0, lists as Python writes them, empty cells."""
    return pd.DataFrame(ROWS).to_csv(index=False, sep=separator)


def write(folder: Path, kind: str) -> str:
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_jsonl(file, ROWS)
    if kind == "parquet":
        pd.DataFrame(ROWS).to_parquet(file)
    elif kind == "csv.xz":
        file.write_bytes(lzma.compress(csv_of().encode("utf-8-sig")))
    elif kind == "csv.gz":
        file.write_bytes(gzip.compress(csv_of().encode()))
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(file)
    else:
        file.write_text(csv_of("\t" if kind == "tsv" else ","))
    return str(file)


@pytest.mark.parametrize("kind", ["csv", "csv.xz", "csv.gz", "jsonl", "parquet", "saved"])
def test_labels_are_the_same_in_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path, kind)
    parts = {"validation": write_jsonl(tmp_path / "v.jsonl", ROWS), "test": write_jsonl(tmp_path / "t.jsonl", ROWS)}
    data = load(files={"train": file, **parts}, inputs={"numeric": ["age"]}, tasks=TASKS)
    assert np.array_equal(labels(data), np.float32(LABELS), equal_nan=True)
    # Rows without a label stay in the other parts.
    assert np.array_equal(labels(data, "test"), np.float32([*LABELS[:2], [NAN] * 6, *LABELS[2:]]), equal_nan=True)
    assert data.model_arguments["tasks"] == {
        "stars": TaskType("regression", unit="stars"),
        "topic": TaskType("classification", 3, ("ants", "cats", "dogs")),
        "flags": TaskType("multi_label", 2, ("ad", "spam")),
        "kinds": TaskType("multi_label", 2, ("new", "red")),
    }
    assert data.label_names == ("labels",) and data.task_names == tuple(TASKS)


def test_a_run_is_told_how_many_labels_there_are(tmp_path: Path) -> None:
    data = load(files=three_parts(write(tmp_path, "csv")), inputs={"numeric": ["age"]}, tasks=TASKS)
    assert data.summary == "\n".join(
        [
            "       train  validation  test",
            "rows       4           5     5",
            "stars      3           3     3  regression, in stars",
            "topic      4           4     4  classification, 3 classes",
            "flags      4           4     4  multi_label, 2 labels",
            "kinds      4           4     4  multi_label, 2 labels",
            "1 training rows have no label of any task and are left out",
        ]
    )


def test_numbers_are_standardised_by_the_training_part(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", "x,y,z\n1,10,2\n2,,2\n3,40,2\n")
    test = write_csv(tmp_path / "test.csv", "x,y,z\n1,100,3\n")
    files = {"train": train, "validation": three_parts(train)["test"], "test": test}
    data = load(files=files, inputs={"numeric": ["x"]}, tasks={"both": {"type": "regression", "columns": ["y", "z"]}})
    task = data.model_arguments["tasks"]["both"]
    # Of 10 and 40: mean 25, deviation 15; a constant is divided by 1.
    assert task == TaskType("regression", 2, ("y", "z"), means=(25.0, 2.0), stds=(15.0, 1.0))
    assert labels(data).tolist()[0] == [-1.0, 0.0] and np.isnan(labels(data)[1, 0])
    assert labels(data, "test").tolist() == [[5.0, 1.0]]


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (["10", "9", "1.0", "1"], ("1", "9", "10")),  # by their numbers; 1.0 is 1
        (["b", " a ", "10", "a"], ("10", "a", "b")),
        (["True", "False", "True", "False"], ("False", "True")),
    ],
)
def test_classes_are_sorted(tmp_path: Path, cells: list[str], classes: tuple[str, ...]) -> None:
    file = write_csv(tmp_path / "a.csv", "x,c\n" + "\n".join(f"1,{cell}" for cell in cells))
    data = load(files=three_parts(file), inputs={"numeric": ["x"]}, tasks={"c": {"type": "classification"}})
    assert data.model_arguments["tasks"]["c"].names == classes
    assert labels(data)[:, 0].tolist() == [classes.index("1" if cell == "1.0" else cell.strip()) for cell in cells]


def test_given_classes_keep_their_order_and_make_a_word_of_none(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "x,pain\n1,None\n2,high\n3,\n4,low")
    task = {"type": "classification", "classes": ["None", "low", "high", "unbearable"]}
    data = load(files=three_parts(file), inputs={"numeric": ["x"]}, tasks={"pain": task})
    assert labels(data)[:, 0].tolist() == [0.0, 2.0, 1.0]
    assert data.model_arguments["tasks"]["pain"].size == 4


def test_several_values_may_mean_one_class(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "x,stars\n1,5\n2,1\n3,\n4,4.0\n5,2\n6,nan")
    groups = {"poor": [1, 2], "good": [4, 5]}
    task = {"type": "classification", "classes": groups, "class_weights": "balanced"}
    data = load(files=three_parts(file), inputs={"numeric": ["x"]}, tasks={"stars": task})
    assert labels(data)[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
    stars = data.model_arguments["tasks"]["stars"]
    assert stars.names == ("poor", "good") and stars.class_weights == (1.0, 1.0)


def test_several_tags_may_mean_one_label(tmp_path: Path) -> None:
    rows = [{"x": 1, "tags": ["cat", "lion"]}, {"x": 2, "tags": ["dog"]}, {"x": 3, "tags": []}, {"x": 4, "tags": None}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    task = {"type": "multi_label", "classes": {"dogs": ["dog", "wolf"], "cats": ["cat", "lion"]}}
    data = load(files=three_parts(file), inputs={"numeric": ["x"]}, tasks={"tags": task})
    assert labels(data).tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_classes_that_a_data_set_declares_are_taken_in_its_order(tmp_path: Path) -> None:
    features = datasets.Features({"x": datasets.Value("int64"), "c": datasets.ClassLabel(names=["no", "yes", "ah"])})
    rows = datasets.Dataset.from_dict({"x": [1, 2, 3], "c": [1, 0, -1]}, features=features)
    datasets.DatasetDict(train=rows, dev=rows, test=rows).save_to_disk(tmp_path / "saved")
    data = load(files=str(tmp_path / "saved"), inputs={"numeric": ["x"]}, tasks={"c": {"type": "classification"}})
    assert data.model_arguments["tasks"]["c"].names == ("no", "yes", "ah")
    assert labels(data)[:, 0].tolist() == [1.0, 0.0]  # -1: hidden, as in test sets on the hub
    assert len(data.validation) == len(data.test) == 3


def test_a_set_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        pd.DataFrame(ROWS).to_parquet(tmp_path / f"{part}-00000-of-00001.parquet")
    data = load(hub=str(tmp_path), inputs={"numeric": ["age"]}, tasks=TASKS)
    assert np.array_equal(labels(data), np.float32(LABELS), equal_nan=True) and len(data.test) == 5


def test_class_weights(tmp_path: Path) -> None:
    values = ["a"] * 6 + ["b"] * 3 + ["c"]
    text = "x,c,p\n" + "\n".join(f"1,{value},{int(value == 'a')}" for value in values)
    given = {"type": "classification", "class_weights": [1, 2, 3]}
    tasks = {
        "balanced": {"type": "classification", "column": "c", "class_weights": "balanced"},
        "given": {**given, "column": "c"},
        "p": {"type": "multi_label", "class_weights": "balanced"},
    }
    data = load(files=three_parts(write_csv(tmp_path / "a.csv", text)), inputs={"numeric": ["x"]}, tasks=tasks)
    found = data.model_arguments["tasks"]
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=values)
    assert found["balanced"].class_weights == pytest.approx(expected)
    assert found["given"].class_weights == (1, 2, 3)
    assert found["p"].class_weights == pytest.approx([4 / 6])  # negative / positive, as BCEWithLogitsLoss has it


def test_words_for_an_empty_cell_and_other_delimiters(tmp_path: Path) -> None:
    text = "1;good;?\n2;n/a;3\n3;bad;4\n4;good;5"
    options = {"delimiter": ";", "columns": ["x", "c", "y"], "missing": ["?", "n/a"]}
    tasks = {"c": {"type": "classification"}, "y": {"type": "regression", "standardize": False}}
    file = write_csv(tmp_path / "a.txt", text)
    data = load(files=three_parts(file), csv=options, inputs={"numeric": ["x"]}, tasks=tasks)
    assert np.array_equal(labels(data), np.float32([[1, NAN], [NAN, 3], [0, 4], [1, 5]]), equal_nan=True)


def test_quotes_of_tab_separated_files_mean_nothing(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.tsv", 'x\tc\n1\t"a\n2\tb"\n3\t"a')
    data = load(files=three_parts(file), inputs={"numeric": ["x"]}, tasks={"c": {"type": "classification"}})
    assert data.model_arguments["tasks"]["c"].names == ('"a', 'b"')


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_stands_above_the_rows(tmp_path: Path, end: str) -> None:
    """Comments; and names of columns, which `columns` may give all the same."""
    rows = ["1,a", "2,b", "3,a"]
    tops = {"plain": [], "names": ["x , c"], "remark": ["# made by, hand", "# twice"], "both": ["#", "x,c"]}
    for name, top in tops.items():
        (tmp_path / f"{name}.data").write_bytes(end.join([*top, *rows]).encode())
    for name in tops:
        data = load(
            files=three_parts(str(tmp_path / f"{name}.data")),
            csv={"columns": ["x", "c"], "comment": "#"},
            inputs={"numeric": ["x"]},
            tasks={"c": {"type": "classification"}},
        )
        assert labels(data)[:, 0].tolist() == [0.0, 1.0, 0.0], name


def test_a_carriage_return_within_a_cell_ends_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"c\tx\n one\rtwo\t1\nthree\t2\n")
    data = load(
        files=three_parts(str(tmp_path / "a.tsv")), inputs={"numeric": ["x"]}, tasks={"c": {"type": "classification"}}
    )
    assert data.model_arguments["tasks"]["c"].names == ("one\rtwo", "three")


def test_numbers_and_categories(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", "n,m,c,d,y\n1,5,b,10,1\n3,,a,9,2\n,5,,9,3\n5,7,a,,4")
    test = write_csv(tmp_path / "test.csv", "n,m,c,d,y\n3,,new,10.0,1")
    files = {"train": train, "validation": three_parts(train)["test"], "test": test}
    inputs = {"numeric": ["n", "m"], "categorical": ["c", "d"]}
    data = load(files=files, inputs=inputs, tasks={"y": {"type": "regression"}})
    batch = data.data_collator([data.train[place] for place in range(4)])
    n = np.array([1, 3, NAN, 5])
    expected = (n - 3) / np.std([1, 3, 5])
    assert batch["numeric"][:, 0].numpy() == pytest.approx(expected, nan_ok=True)
    assert batch["categorical"].tolist() == [[2, 2], [1, 1], [0, 1], [1, 0]]
    assert data.test[0]["categorical"].tolist() == [0, 2]  # not known in training; 10.0 is 10
    arguments = data.model_arguments
    assert arguments["categories"] == {"c": ["a", "b"], "d": ["9", "10"]}
    assert arguments["numeric_names"] == ["n", "m"] and arguments["numeric_means"] == pytest.approx([3, 17 / 3])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_minus_100_is_a_missing_class_but_a_number(tmp_path: Path, kind: str) -> None:
    """As in integer labels of PyTorch and Hugging Face."""
    frame = pd.DataFrame({"x": [1, 2, 3, 4], "c": [1, -100, 0, 1], "b": [1, 0, -100, 1], "y": [5, -100, 7, 8]})
    file = str(tmp_path / f"a.{kind}")
    frame.to_csv(file, index=False) if kind == "csv" else frame.to_json(file, orient="records", lines=True)
    tasks = {
        "c": {"type": "classification"},
        "b": {"type": "multi_label"},
        "y": {"type": "regression", "standardize": False},
    }
    data = load(files=three_parts(file), inputs={"numeric": ["x"]}, tasks=tasks)
    assert data.model_arguments["tasks"]["c"].size == 2
    expected = [[1, 1, 5], [NAN, 0, -100], [0, NAN, 7], [1, 1, 8]]
    assert np.array_equal(labels(data), np.float32(expected), equal_nan=True)


def test_minus_100_is_missing_among_declared_classes() -> None:
    table = Table("rows", datasets.Dataset.from_dict({}), Path())
    found = words_of(pa.array([1, -100, 0, None]), datasets.ClassLabel(names=["no", "yes"]), table)
    assert found.codes.tolist() == [1, -1, 0, -1] and found.known == ("no", "yes")


def test_minus_100_is_a_class_where_the_recipe_says_so(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "x,c\n1,-100\n2,5\n3,-100.0")
    task = {"type": "classification", "classes": [-100, 5]}
    data = load(files=three_parts(file), inputs={"numeric": ["x"]}, tasks={"c": task})
    assert labels(data)[:, 0].tolist() == [0, 1, 0]


def test_columns_of_rows_in_another_order() -> None:
    rows = datasets.Dataset.from_dict({"x": [1, 2, 3, 4], "c": ["a", "b", None, "d"]}).select([3, 0, 2])
    table = Table("rows", rows, Path())
    assert numbers(table, "x").tolist() == [4, 1, 3] and texts(table, "c") == ["d", "a", ""]


def test_a_column_is_read_without_a_copy_of_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` copies for each column makes wide tables quadratic in their columns."""
    table = Table("rows", datasets.Dataset.from_dict({f"c{number}": [1, 2] for number in range(50)}), Path())
    copies = []
    monkeypatch.setattr("copy.deepcopy", lambda value, *_: copies.append(value) or value)
    assert [numbers(table, f"c{number}").sum() for number in range(50)] == [3.0] * 50
    assert len(copies) <= 1


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_empty_last_cells_and_lines_are_no_short_rows(tmp_path: Path, end: str) -> None:
    cells = ["x,c,y", '1,"a', 'b",', "", "2,c\rd," if end == "\n" else "2,c,", "3,c,7"]
    (tmp_path / "a.csv").write_bytes(end.join([*cells, ""]).encode())
    file = three_parts(str(tmp_path / "a.csv"))
    tasks = {"y": {"type": "regression", "standardize": False}}
    data = load(files=file, inputs={"numeric": ["x"]}, tasks=tasks)
    assert len(data.test) == 3 and labels(data)[:, 0].tolist() == [7]


def test_the_same_value_is_the_same_category_in_all_kinds_of_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["truth", "day", "time", "name", "number", "whole", "small"]
    given = [
        [True, "2020-01-01", "2020-01-01T10:00:00", "Zo\u00eb", 1.5, 3, 0.1],
        [False, "2020-01-02", "2020-01-02T11:30:00", "Ana", 2.25, 4, 0.3],
    ]
    jsonl = write_jsonl(
        tmp_path / "a.jsonl", [dict(zip(names, row, strict=True)) | {"y": n} for n, row in enumerate(given)]
    )
    text = ["true,2020-01-01 00:00:00,2020-01-01 10:00:00.000,Zoe\u0308,1.5,3.0,0.1,0",
            "FALSE,2020-01-02,2020-01-02 11:30:00,Ana,2.25,4,0.3,1"]  # fmt: skip
    csv = write_csv(tmp_path / "a.csv", "\n".join([",".join([*names, "y"]), *text]))
    frame = pd.DataFrame(given, columns=names).assign(y=[0, 1])
    frame["number"] = [Decimal("1.50"), Decimal("2.25")]
    frame["small"] = frame["small"].astype("float32")
    for column in ("day", "time"):
        frame[column] = pd.to_datetime(frame[column])
    frame.to_parquet(tmp_path / "a.parquet")
    files = {"train": jsonl, "validation": csv, "test": str(tmp_path / "a.parquet")}
    data = load(files=files, inputs={"categorical": names}, tasks={"y": {"type": "regression"}})
    for part in (data.train, data.validation, data.test):
        assert (part[0]["categorical"] + part[1]["categorical"]).tolist() == [3] * len(names)  # 1 and 2
        assert part[0]["categorical"].tolist() == data.train[0]["categorical"].tolist()
    assert "training part" not in caplog.text


def test_numbers_with_leading_zeros_and_versions_stay_different_words(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "x,y\n01067,1\n1067,2\n1.1,3\n1.10,4")
    data = load(files=three_parts(file), inputs={"categorical": ["x"]}, tasks={"y": {"type": "regression"}})
    assert len(data.model_arguments["categories"]["x"]) == 4


def test_values_that_training_lacks_and_empty_columns_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_csv(tmp_path / "train.csv", "c,d,n,m,y\na,,1,,1\nb,,2,,2")
    test = write_csv(tmp_path / "test.csv", "c,d,n,m,y\nx,,1,,1\nx,,2,,2\n,,2,,3")
    files = {"train": train, "validation": three_parts(train)["test"], "test": test}
    inputs = {"categorical": ["c", "d"], "numeric": ["n", "m"]}
    load(files=files, inputs=inputs, tasks={"y": {"type": "regression"}})
    assert [record.message for record in caplog.records] == [
        "data.inputs: column 'm' has no value in the training part; it is the same in all rows",
        "data.inputs: column 'd' has no value in the training part; it is the same in all rows",
        "data.inputs.categorical: 2 of 3 rows of the test part have a value in column 'c' that no row of the training "
        "part has, such as 'x'; the model sees it as missing",
    ]


def test_a_long_cell_beside_an_empty_one(tmp_path: Path) -> None:
    """Longer than the 131,072 characters that `csv` takes unless it is told otherwise."""
    file = write_csv(tmp_path / "a.csv", f"x,t,y\n1,{'a' * 200_000},1\n2,b,\n3,c,5")
    data = load(files=three_parts(file), inputs={"numeric": ["x"]}, tasks={"y": {"type": "regression"}})
    assert len(data.test) == 3


def test_an_empty_line_at_the_top_is_passed_over(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "x,c\n1,a\n2,b")
    Path(file).write_text("\n\n" + Path(file).read_text())
    data = load(files=three_parts(file), inputs={"numeric": ["x"]}, tasks={"c": {"type": "classification"}})
    assert labels(data)[:, 0].tolist() == [0, 1]


def test_a_class_that_may_mean_an_empty_cell_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = three_parts(write_csv(tmp_path / "a.csv", "x,c\n1,a\n2,?\n3,N/A\n4,b"))
    options = {"files": files, "inputs": {"numeric": ["x"]}}
    load(**options, tasks={"c": {"type": "classification"}})
    said = "data.tasks.c: '?', 'N/A' of column 'c' is a class; if it means an empty cell, set data.csv.missing: "
    assert said + '["?", "N/A"]' in caplog.text
    caplog.clear()
    load(**options, csv={"missing": ["?", "N/A"]}, tasks={"c": {"type": "classification"}})
    load(**options, tasks={"c": {"type": "classification", "classes": ["a", "b", "?", "N/A"]}})
    assert not caplog.records


def test_a_part_without_labels_of_a_task_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write_csv(tmp_path / "train.csv", "x,y,z\n1,5,1\n3,4,2\n")
    test = write_csv(tmp_path / "test.csv", "x,y,z\n1,5,\n3,4,\n")
    files = {"train": train, "validation": three_parts(train)["test"], "test": test}
    data = load(files=files, inputs={"numeric": ["x"]}, tasks={name: {"type": "regression"} for name in ("y", "z")})
    assert "data.tasks.z: no row of the test part has a label; it is not measured there" in caplog.text
    assert "y_mae" in data.trivial_metrics and "z_mae" not in data.trivial_metrics

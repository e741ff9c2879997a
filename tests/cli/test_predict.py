"""`hf-bilb predict` and `hf-bilb evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from click.testing import CliRunner, Result

import hf_bilb
from hf_bilb.cli import main
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.errors import OptionError
from hf_bilb.inference.tables import write_rows
from tests.inference import runs
from tests.inference.runs import Run


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.table_run(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.tags_run(tmp_path_factory.mktemp("tags"))


READERS = {
    "csv": pd.read_csv,
    "jsonl": lambda path: pd.read_json(path, lines=True),
    "parquet": pd.read_parquet,
}


@pytest.mark.parametrize("ending", READERS)
def test_predictions_stand_next_to_the_rows(ending: str, run: Run, tmp_path: Path) -> None:
    output = tmp_path / f"out.{ending}"
    done = call("predict", run.folder, run.test, "--output", output, "--device", "cpu")
    assert done.exit_code == 0, done.output
    found, given = READERS[ending](output), pd.read_json(run.test, lines=True)
    expected = hf_bilb.load(run.folder, device="cpu").predict(run.test).to_pandas().add_prefix("predicted_")
    assert list(found.columns) == [*given.columns, *expected.columns]
    pd.testing.assert_frame_equal(found[expected.columns], expected, check_dtype=False)
    pd.testing.assert_frame_equal(found[given.columns], given, check_dtype=False)
    assert f"wrote {output}: 21 rows" in done.output and [path.name for path in tmp_path.iterdir()] == [output.name]


def test_lists_in_a_csv_are_json(tags: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    assert call("predict", tags.folder, tags.test, "--output", output, "--all-classes").exit_code == 0
    found = pd.read_csv(output)
    expected = hf_bilb.load(tags.folder).predict(tags.test)["tags"]
    assert [json.loads(cell) for cell in found["predicted_tags"]] == expected
    assert "predicted_first_probability_book" in found


def test_lists_of_lists_and_objects_in_a_csv_are_json(run: Run, tmp_path: Path) -> None:
    rows = [{"age": 30, "hours": 40, "job": "a", "pairs": [[0, 1], [2]], "meta": {"ids": [1, 2], "from": None}}]
    (tmp_path / "new.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert call("predict", run.folder, tmp_path / "new.jsonl", "--output", tmp_path / "out.csv").exit_code == 0
    found = pd.read_csv(tmp_path / "out.csv")
    assert [json.loads(found[name][0]) for name in ("pairs", "meta")] == [rows[0]["pairs"], rows[0]["meta"]]


def test_a_letter_that_the_encoding_of_the_file_lacks(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"x": ["1,5"]})
    csv = CsvOptions(encoding="cp1252", delimiter=";", decimal=",")
    write_rows(rows, {"p": [0.25]}, tmp_path / "out.csv", csv)
    assert (tmp_path / "out.csv").read_bytes() == b"x;p\n1,5;0,25\n"
    with pytest.raises(OptionError) as error:
        write_rows(rows, {"p": ["имя"]}, tmp_path / "new.csv", csv)
    assert str(error.value) == (
        f"--output: {tmp_path / 'new.csv'}: 'имя' cannot be written in cp1252, as the file that is read is; a .jsonl "
        "or .parquet file takes it"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_language_model(tmp_path: Path) -> None:
    run = runs.language_run(tmp_path)
    output = tmp_path / "out.jsonl"
    assert call("predict", run.folder, run.test, "--output", output, "--max-new-tokens", 3).exit_code == 0
    assert "predicted_response" in pd.read_json(output, lines=True)
    done = call("evaluate", run.folder, run.test)
    assert done.exit_code == 2 and "results.json" in done.output


def test_a_measured_table(run: Run) -> None:
    done = call("evaluate", run.folder, run.test, "--device", "cpu")
    assert done.exit_code == 0 and "pay   MAE       EUR" in done.output
    done = call("evaluate", run.folder, run.test, "--device", "cpu", "--json")
    measured = hf_bilb.load(run.folder, device="cpu").evaluate(run.test)
    assert json.loads(done.output)["metrics"] == measured


def test_what_is_wrong_is_one_line(run: Run, tmp_path: Path) -> None:
    there = tmp_path / "there.csv"
    there.write_text("old")
    renamed = tmp_path / "renamed.csv"
    renamed.write_text("Age,hours,job\n1,2,a\n")
    twice = tmp_path / "twice.csv"
    twice.write_text("age,hours,job,predicted_pay\n1,2,a,3\n")
    new = tmp_path / "new.csv"
    for arguments, said in (
        ((run.folder, run.test, "--output", there), "is already there; --force writes over it"),
        ((run.folder, there, "--output", there, "--force"), "is the file that is read"),
        ((run.folder, run.test, "--output", tmp_path / "x.xlsx"), "is of no known kind, expected a name that ends in"),
        ((run.folder, run.test, "--output", tmp_path / "no" / "x.csv"), "there is no folder"),
        ((run.folder, "nowhere.csv", "--output", new), "there is no file 'nowhere.csv'"),
        ((run.folder, renamed, "--output", new), "has no column 'age', which the model reads (did you mean \"Age\"?)"),
        ((run.folder, twice, "--output", new), "has a column 'predicted_pay' already; --prefix gives"),
        ((tmp_path, run.test, "--output", new), "holds no model"),
    ):
        done = call("predict", *arguments)
        assert done.exit_code == 2 and said in done.output and done.output.count("\n") == 1, done.output
    assert there.read_text() == "old" and not new.exists()
    assert call("predict", run.folder, twice, "--output", new, "--prefix", "new_").exit_code == 0
    assert call("predict", run.folder, run.test, "--output", there, "--force").exit_code == 0
    assert there.read_text() != "old"

"""The same rows give the same predictions, whatever they come in; what is wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import hf_bilb
from hf_bilb.errors import OptionError
from hf_bilb.inference.loaded import LoadedModel
from hf_bilb.inference.predictions import Predictions
from hf_bilb.losses.task_types import TaskType
from tests.inference import runs
from tests.inference.runs import Run

Rows = list[dict[str, object]]


def loaded_of(run: Run) -> tuple[LoadedModel, Rows, Predictions]:
    loaded = hf_bilb.load(run.folder, device="cpu")
    assert isinstance(loaded, LoadedModel)
    rows = [json.loads(line) for line in run.test.read_text().splitlines()]
    return loaded, rows, loaded.predict(run.test)


def assert_same(found: Predictions, expected: Predictions) -> None:
    assert len(found) == len(expected)
    for task in expected:
        assert np.array_equal(found.outputs[task], expected.outputs[task]), task


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Rows, Predictions]:
    return loaded_of(runs.table_run(tmp_path_factory.mktemp("table")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Rows, Predictions]:
    return loaded_of(runs.text_run(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.image_run(tmp_path_factory.mktemp("image"))


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "jsonl"])
def test_files(ending: str, table: tuple[LoadedModel, Rows, Predictions], tmp_path: Path) -> None:
    loaded, rows, expected = table
    frame, file = pd.DataFrame(rows), tmp_path / f"rows.{ending}"
    write = {
        "csv": lambda: frame.to_csv(file, index=False),
        "tsv": lambda: frame.to_csv(file, index=False, sep="\t"),
        "parquet": lambda: frame.to_parquet(file),
        "jsonl": lambda: frame.to_json(file, orient="records", lines=True),
    }
    write[ending]()
    assert_same(loaded.predict(file), expected)
    assert_same(loaded.predict(str(file)), expected)


def test_containers(table: tuple[LoadedModel, Rows, Predictions]) -> None:
    loaded, rows, expected = table
    frame = pd.DataFrame(rows)
    named = {"age": frame["age"], "hours": frame["hours"], "job": frame["job"]}
    in_order = [(row["age"], row["hours"], row["job"]) for row in rows]
    words = [{key: None if value is None else str(value) for key, value in row.items()} for row in rows]
    for given in (
        rows,
        frame,
        frame.sample(frac=1, random_state=0).sort_index(),
        frame.assign(job=frame["job"].astype("category")),
        datasets.Dataset.from_pandas(frame),
        {key: list(values) for key, values in named.items()},
        in_order,
        words,
        [{**row, "hours": str(row["hours"]) if number % 2 else row["hours"]} for number, row in enumerate(rows)],
    ):
        assert_same(loaded.predict(given), expected)


def test_missing_and_unknown_cells(table: tuple[LoadedModel, Rows, Predictions]) -> None:
    """As for training: a category that was never seen is a missing one, and a missing number is its own input."""
    loaded, _, _ = table
    found = loaded.predict([{"age": None, "hours": 1, "job": "zzz"}, {"age": float("nan"), "hours": 1, "job": None}])
    assert_same_rows(found, 0, 1)
    mean = loaded.format.inputs.means[0]
    other = loaded.predict([{"age": mean, "hours": 1, "job": None}])
    assert not np.array_equal(other.outputs["pay"][0], found.outputs["pay"][0])


def assert_same_rows(found: Predictions, one: int, other: int) -> None:
    for outputs in found.outputs.values():
        np.testing.assert_allclose(outputs[one], outputs[other], rtol=1e-5)  # rows of a batch round in their own way


def test_texts(text: tuple[LoadedModel, Rows, Predictions]) -> None:
    loaded, rows, expected = text
    assert_same(loaded.predict(rows), expected)
    assert_same(loaded.predict([(row["title"], row["body"]) for row in rows]), expected)
    assert_same(loaded.predict([[row["title"], row["body"]] for row in rows]), expected)
    assert_same(loaded.predict(pd.DataFrame(rows)[["body", "title"]]), expected)
    empty = loaded.predict([("good", ""), {"title": "good", "body": None}][:1])
    assert_same(loaded.predict([{"title": "good", "body": None}]), empty)


def test_images(image_run: Run) -> None:
    loaded, rows, expected = loaded_of(image_run)
    paths = [image_run.test.parent / str(row["file"]) for row in rows]
    opened = [Image.open(path) for path in paths]
    held = datasets.Dataset.from_dict({"file": [str(path) for path in paths]}).cast_column("file", datasets.Image())
    for given in (
        paths,
        [str(path) for path in paths],
        opened,
        [{"file": image} for image in opened],
        pd.DataFrame({"file": paths}),
        [path.read_bytes() for path in paths],
        held,
    ):
        assert_same(loaded.predict(given), expected)


def test_batches_change_nothing_but_the_last_bits(text: tuple[LoadedModel, Rows, Predictions]) -> None:
    loaded, rows, expected = text
    for task, outputs in loaded.predict(rows, batch_size=3).outputs.items():
        np.testing.assert_allclose(outputs, expected.outputs[task], rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_one_line(
    table: tuple[LoadedModel, Rows, Predictions], text: tuple[LoadedModel, Rows, Predictions], image_run: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    of_table, rows, _ = table
    images = hf_bilb.load(image_run.folder, device="cpu")
    (tmp_path / "bad.csv").write_text("age,hours,job\n1,2,a\nx,2,a\n")
    (tmp_path / "no.png").write_text("none")
    for loaded, given, said in (
        (of_table, [{"age": 1, "Hours": 2, "job": "a"}], "the inputs: has no column 'hours', which the model reads "
         '(did you mean "Hours"?)'),
        (of_table, tmp_path / "bad.csv", "bad.csv, row 2: column 'age' is 'x', expected a number"),
        (of_table, tmp_path / "bda.csv", f"there is no file '{tmp_path / 'bda.csv'}' (did you mean \"bad.csv\"?)"),
        (of_table, [(1, 2)], "the inputs, row 1: expected 3 values (age, hours, job), got (1, 2)"),
        (of_table, [], "the inputs: there are no rows"),
        (of_table, 3, "the inputs: got a int, expected a file, a list, a pandas DataFrame or a datasets.Dataset"),
        (text[0], "a text", "the inputs: got no file 'a text', expected a file, a list"),
        (text[0], ["a text"], "the inputs: expected pairs of texts, got single ones (title, body)"),
        (images, ["nowhere.png"], "the inputs, row 1: image 'nowhere.png': there is no file 'nowhere.png'"),
        (images, [tmp_path / "no.png"], "does not decode: 4 bytes that are no image"),
        (images, [3], "the inputs, row 1: got a int, expected a path or an image"),
        (images, [{"flie": 3}], "the inputs, row 1: has no column 'file', which the model reads (did you mean"),
    ):  # fmt: skip
        with pytest.raises(OptionError) as raised:
            loaded.predict(given)
        assert said in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(OptionError, match="batch_size: 0 is not valid"):
        of_table.predict(rows, batch_size=0)
    with pytest.raises(OptionError, match="row 1: column 'town' is 'west', which is no class of the model"):
        of_table.evaluate([{**rows[0], "town": "west"}])
    with pytest.raises(OptionError, match="the inputs: has no column 'pay'"):
        of_table.evaluate([{key: rows[0][key] for key in ("age", "hours", "job")}])


def test_a_task_without_its_column_is_not_measured(table: tuple[LoadedModel, Rows, Predictions]) -> None:
    loaded, rows, _ = table
    whole = loaded.evaluate(rows)
    part = loaded.evaluate([{key: value for key, value in row.items() if key != "pay"} for row in rows])
    assert part == {key: value for key, value in whole.items() if not key.startswith("pay")}


# --- tables of predictions ----------------------------------------------------------------------------------------


def test_columns_by_type() -> None:
    import torch

    tasks = {
        "place": TaskType("regression", 2, ("x", "y"), means=(1.0, 2.0), stds=(10.0, 100.0)),
        "kind": TaskType("classification", 3, ("a", "b", "c")),
        "on": TaskType("multi_label"),
        "flags": TaskType("multi_label", 2, ("p", "q")),
        "tags": TaskType("token_classification", 2, ("O", "B")),
    }
    found = {
        "place": [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, -1.0]])],
        "kind": [torch.tensor([[0.0, np.log(2.0), 0.0], [3.0, 0.0, 0.0]])],
        "on": [torch.tensor([[0.0], [-1.0]])],
        "flags": [torch.tensor([[1.0, -1.0], [-1.0, -1.0]])],
        "tags": [torch.tensor([[9.0, 0.0], [0.0, np.log(3.0)], [5.0, 0.0]]), torch.tensor([[0.0, 0.0]])],
    }
    made = Predictions.of(tasks, found, [np.array([1, -1]), np.array([], np.int64)])
    assert len(made) == 2 and list(made) == list(tasks) and dict(made).keys() == tasks.keys()
    assert made["place"].tolist() == [[11.0, 202.0], [1.0, -98.0]]
    assert made["kind"].tolist() == ["b", "a"] and made["on"].tolist() == [True, False]
    first, second = made.to_records(all_classes=True)
    assert first["place_x"] == 11.0 and first["kind"] == "b" and first["kind_probability"] == pytest.approx(0.5)
    assert first["kind_probability_a"] == pytest.approx(0.25)
    assert first["flags"] == ["p"] and second["flags"] == []
    assert first["flags_probability_p"] == pytest.approx(1 / (1 + np.exp(-1)))
    assert first["tags"] == ["B", None] and second["tags"] == []
    assert first["tags_probability"] == [pytest.approx(0.75), None]
    assert list(made.to_pandas().columns) == [
        "place_x", "place_y", "kind", "kind_probability", "on", "on_probability", "flags", "flags_probability_p",
        "flags_probability_q", "tags", "tags_probability",
    ]  # fmt: skip
    with pytest.raises(KeyError, match='did you mean "kind"'):
        made["kinds"]

"""Tasks with rows of their own, joined into one set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_bilb.errors import OptionError
from hf_bilb.trainer.sampling import example_tasks
from tests.data.glue_files import write_encoder
from tests.data.own.tables import labels, load, write_csv, write_jsonl


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Any]:
    """Films are texts with a class, pairs have a score; words have tags."""
    films = [f"the film {word},{word}" for word in ("good", "bad") for _ in range(20)]
    pairs = [f"the cat,a dog,{row}" for row in range(30)]
    words = [{"words": ["the", "cat"], "tags": ["O", "B-animal"]}] * 10
    return {
        "film": {
            "type": "classification",
            "column": "label",
            "files": write_csv(tmp_path / "films.csv", "\n".join(["text,label", *films])),
            "inputs": {"text": "text"},
        },
        "same": {
            "type": "regression",
            "files": write_csv(tmp_path / "pairs.csv", "\n".join(["one,two,same", *pairs])),
            "inputs": {"text": ["one", "two"]},
            "split": {"test": 0.2},
            "standardize": False,
        },
        "tags": {
            "type": "token_classification",
            "files": write_jsonl(tmp_path / "words.jsonl", words),
            "inputs": {"text": "words"},
        },
    }


def test_every_row_has_the_labels_of_its_task(tmp_path: Path, tasks: dict[str, Any]) -> None:
    data = load(tasks=tasks, tokenizer=str(write_encoder(tmp_path / "encoder")), split={"validation": 0.2})
    assert [len(part) for part in (data.train, data.validation, data.test)] == [28 + 21 + 7, 8 + 3 + 2, 4 + 6 + 1]
    ids = data.train.task_ids
    assert np.array_equal(ids, np.repeat([0, 1, 2], [28, 21, 7]))
    assert np.array_equal(example_tasks(data.train, data.task_names).numpy(), ids)  # what the task sampler reads
    assert np.array_equal(~np.isnan(labels(data)), np.eye(3, 2, dtype=bool)[ids])
    tagged = [(data.train[row]["tag_labels"] >= 0).any() for row in range(len(ids))]
    assert np.array_equal(tagged, ids == 2)
    batch = data.data_collator([data.train[row] for row in (0, 30, 55)])
    assert "task_ids" not in batch and data.task_item_counts(batch).tolist() == [1, 1, 2]


def test_the_rows_of_a_task_do_not_depend_on_the_others(tmp_path: Path, tasks: dict[str, Any]) -> None:
    tokenizer = str(write_encoder(tmp_path / "encoder"))
    data = load(tasks=tasks, tokenizer=tokenizer)
    alone = load(tasks={"same": tasks["same"]}, tokenizer=tokenizer)
    assert not alone.train.task_ids.any()
    assert np.array_equal(labels(alone)[:, 0], labels(data)[data.train.task_ids == 1][:, 1])


def test_tables_are_standardised_together(tmp_path: Path) -> None:
    one = write_csv(tmp_path / "one.csv", "x,c,y\n" + "\n".join(f"{n},a,{n}" for n in range(10)))
    two = write_csv(tmp_path / "two.csv", "x,c,z\n" + "\n".join(f"{n},b,{n}" for n in range(100, 110)))
    tasks = {"y": {"type": "regression", "files": one}, "z": {"type": "regression", "files": two}}
    data = load(tasks=tasks, inputs={"numeric": ["x"], "categorical": ["c"]})
    assert data.model_arguments["categories"] == {"c": ["a", "b"]}
    batch = data.train[list(range(16))]
    assert batch["numeric"].mean().item() == pytest.approx(0, abs=1e-6)
    assert batch["numeric"].std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert batch["categorical"][:, 0].tolist() == [1] * 8 + [2] * 8


def write_customers(folder: Path, name: str, num_rows: int, column: str = "customer") -> str:
    rows = [f"{customer},{customer}" for customer in np.random.default_rng(1).permutation(np.arange(num_rows) % 40)]
    return write_csv(folder / f"{name}.csv", "\n".join([f"{column},{name}", *rows]))


def customers(data: Any, part: str, task: int) -> set[int]:
    """Each label is the row's customer."""
    found = labels(data, part)[getattr(data, part).task_ids == task, task]
    return set(found.astype(int).tolist())


def test_a_group_is_in_the_same_part_in_all_tasks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    number = {"type": "regression", "standardize": False}
    tasks = {
        "a": {**number, "files": write_customers(tmp_path, "a", 300)},
        "b": {**number, "files": write_customers(tmp_path, "b", 90, "client")},
    }
    tasks["a"]["inputs"], tasks["b"]["inputs"] = {"text": "customer"}, {"text": "client"}
    split = {"validation": 0.2, "test": 0.3, "seed": 3}
    tasks["a"]["split"] = {**split, "group_by": "customer"}
    tasks["b"]["split"] = {**split, "group_by": "client"}
    tokenizer = str(write_encoder(tmp_path / "encoder"))
    data = load(tasks=tasks, tokenizer=tokenizer)
    parts = ("train", "validation", "test")
    found = [customers(data, part, 0) | customers(data, part, 1) for part in parts]
    assert all(found) and sum(map(len, found)) == len(set.union(*found)) == 40
    # Shares of 40 groups, within three standard deviations.
    assert abs(len(found[1]) - 8) < 3 * 2.6 and abs(len(found[2]) - 12) < 3 * 2.9
    assert "group_by" not in caplog.text
    alone = load(tasks={"b": tasks["b"]}, tokenizer=tokenizer)  # as `compare --stl` trains it
    assert [customers(alone, part, 0) for part in parts] == [customers(data, part, 1) for part in parts]
    tasks["b"]["split"]["seed"] = 4
    load(tasks=tasks, tokenizer=tokenizer)
    assert (
        "data.tasks.a.split.group_by: " in caplog.text and "in the test part of data.tasks.b, such as " in caplog.text
    )


def test_too_few_groups_for_a_part(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "x,g,y\n" + "\n".join(f"{row},{row % 3},1" for row in range(30)))
    task = {"type": "regression", "files": file, "split": {"group_by": "g", "test": 0.01}}
    with pytest.raises(OptionError) as error:
        load(tasks={"y": task}, inputs={"numeric": ["x"]})
    said = "none of the 3 groups falls into the test part; set another seed, or larger shares"
    assert str(error.value) == f"data.tasks.y.split.group_by: {said}"


def test_a_file_that_one_task_trains_on_and_another_is_measured_on_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = (write_csv(tmp_path / f"{name}.csv", "x,y,z\n1,2,3\n2,3,4\n3,4,5") for name in ("one", "two"))
    tasks = {
        "y": {
            "type": "regression",
            "files": {"train": one, "validation": two},
        },  # a row of `one` is drawn for its test part
        "z": {"type": "regression", "files": {"train": two, "test": one}},
    }
    load(tasks=tasks, inputs={"numeric": ["x"]})
    assert f"data.tasks.y: 2 rows of {one} are in the training part and in the test part of data.tasks.z" in caplog.text
    caplog.clear()
    same = {name: {"type": "regression", "files": one} for name in ("y", "z")}
    load(tasks=same, inputs={"numeric": ["x"]})
    assert "in the training part" not in caplog.text

"""Tasks with rows of their own, joined into one set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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

"""`hub: owner/name[:config]` of the data set `table`, over HTTP: from the Hub to a trained model; what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from huggingface_hub import constants, metadata_load
from huggingface_hub.utils import _http

from hf_bilb.config.options import parse_options
from hf_bilb.config.yaml import dump_yaml, load_yaml
from hf_bilb.data.own.files import Table, read_tables
from hf_bilb.data.own.options import OwnDataOptions
from hf_bilb.errors import OptionError
from tests.hub.runs import error_line, run, use, write_recipe
from tests.hub.server import Hub

SET = "datasets/somebody/people"
CARD = b"""---
configs:
- config_name: young
  data_files: [{split: train, path: young/train-*}, {split: dev, path: young/dev.parquet}]
- config_name: old
  data_files: [{split: train, path: old.parquet}]
---
"""


@pytest.fixture
def sets(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, known to `datasets`, whose caches are empty."""
    address = "/datasets/{repo_id}/resolve/{revision}/{path}"
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", hub.endpoint + address)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return hub


def read(name: str) -> dict[str, list[Table]]:
    values = {"hub": name, "inputs": {"numeric": ["age"]}, "tasks": {"pay": {"type": "regression"}}}
    (source,) = parse_options(OwnDataOptions, values, "data").sources()
    return read_tables(source)


def refused(name: str) -> str:
    with pytest.raises(OptionError) as raised:
        read(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def parquet(ages: list[int]) -> bytes:
    file = io.BytesIO()
    pd.DataFrame({"age": ages, "pay": [100.0 * age for age in ages]}).to_parquet(file)
    return file.getvalue()


def test_a_run_with_a_set_of_the_hub(sets: Hub, tmp_path: Path) -> None:
    """Splits by the names of the files; what the recipe has from the Hub is what it has from the files."""
    recipe: dict[str, Any] = _recipe(tmp_path)
    rows = list(csv.reader((tmp_path / "people.csv").read_text().splitlines()))
    parts = {"train": rows[1:301], "test": rows[301:]}
    for part, own in parts.items():
        text = "\n".join(",".join(row) for row in (rows[0], *own)) + "\n"
        sets.repos.setdefault(SET, {})[f"{part}.csv"] = text.encode()
        (tmp_path / f"{part}.csv").write_text(text)
    recipe["data"]["split"] = {"validation": 0.1, "seed": 5}
    measured = {}
    for key, value in {"hub": "somebody/people", "files": {part: f"{tmp_path}/{part}.csv" for part in parts}}.items():
        data = {**{k: v for k, v in recipe["data"].items() if k != "files"}, key: value}
        trainer = {**recipe["trainer"], "output_dir": str(tmp_path / key)}
        (tmp_path / "mine.yaml").write_text(dump_yaml({**recipe, "data": data, "trainer": trainer}))
        done = run("train", tmp_path / "mine.yaml")
        assert done.exit_code == 0, done.output
        results = json.loads((tmp_path / key / "results.json").read_text())
        assert results["about"]["rows"] == {"train": 270, "validation": 30, "test": 100}
        measured[key] = results["metrics"]
    assert measured["hub"] == measured["files"]
    head = metadata_load(tmp_path / "hub" / "README.md")
    assert head is not None and head["datasets"] == ["somebody/people"]


def _recipe(folder: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = load_yaml(write_recipe(folder).read_text(), "")
    return recipe


def test_configurations_of_parquet_files(sets: Hub) -> None:
    sets.repos[SET] = {
        "README.md": CARD, "young/train-0.parquet": parquet([1, 2]), "young/train-1.parquet": parquet([3]),
        "young/dev.parquet": parquet([4]), "old.parquet": parquet([90]),
    }  # fmt: skip
    young = read("somebody/people:young")
    assert {part: table.rows["age"][:] for part, (table,) in young.items()} == {"train": [1, 2, 3], "validation": [4]}
    assert young["train"][0].place(1) == "somebody/people:young, train, row 2"
    assert read("somebody/people:old")["train"][0].rows["age"][:] == [90]
    assert refused("somebody/people:midle").endswith("BuilderConfig 'midle' not found. Available: ['young', 'old']")
    line = refused("somebody/people")
    assert line.startswith("data.hub: 'somebody/people' cannot be loaded: Config name is missing") and "'young'" in line


def test_a_set_without_a_training_split(sets: Hub) -> None:
    sets.repos[SET] = {"test.csv": b"age,pay\n1,2\n"}
    assert refused("somebody/people") == "data.hub: 'somebody/people' has no split 'train' (it has test)"


def test_a_private_set_needs_a_token(sets: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    sets.repos[SET] = {"train.csv": b"age,pay\n1,2\n"}
    sets.private.add(SET)
    use(sets, monkeypatch, token=None)
    line = refused("somebody/people")
    assert line.startswith("data.hub: 'somebody/people' cannot be loaded: ")
    assert line.endswith("A private one needs a token: set HF_TOKEN, or log in with `hf auth login`.")
    use(sets, monkeypatch)
    assert len(read("somebody/people")["train"][0].rows) == 1


def test_a_set_that_is_not_there(sets: Hub, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    data = {**{key: value for key, value in recipe["data"].items() if key != "files"}, "hub": "somebody/peple"}
    (tmp_path / "mine.yaml").write_text(dump_yaml({**recipe, "data": data}))
    done = run("train", tmp_path / "mine.yaml")
    assert done.exit_code == 2 and error_line(done) == (
        "data.hub: 'somebody/peple' cannot be loaded: Dataset 'somebody/peple' doesn't exist on the Hub or cannot be "
        "accessed."
    )
    assert refused("some body").startswith("data.hub: 'some body' cannot be loaded: Repo id must use")


def test_without_a_network_the_line_comes_soon(sets: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was loaded before is taken from the cache."""
    sets.repos[SET] = {"train.csv": b"age,pay\n1,2\n"}
    read("somebody/people")
    sets.stop()
    waited: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", waited.append)
    line = refused("somebody/other")
    assert line.startswith("data.hub: 'somebody/other' cannot be loaded: the Hub cannot be reached (")
    assert len(read("somebody/people")["train"][0].rows) == 1
    assert waited == [], "it has tried again"
    assert datasets.config.HF_HUB_OFFLINE is False
    sets.start_again()
    assert refused("somebody/other").endswith("doesn't exist on the Hub or cannot be accessed.")

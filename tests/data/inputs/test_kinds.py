"""Rows of a user's become what the data set itself makes of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hf_bilb.data import TaskData
from hf_bilb.data.images.celeba import CelebaOptions, load_celeba
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.molecules.molecule_net import MoleculeNetOptions, load_tox21
from hf_bilb.data.tables.adult import LAYOUT, AdultOptions, load_adult
from hf_bilb.data.tables.sarcos import FEATURES, SarcosOptions, load_sarcos
from hf_bilb.data.text.glue import GlueOptions, load_glue
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.inference.saved import FILE, model_files, read_saved
from hf_bilb.losses.task_types import TaskType
from tests.data.celeba_files import name_of, write_celeba
from tests.data.glue_files import write_encoder, write_glue
from tests.data.test_molecule_net import MADE_UP, write_csv
from tests.data.test_tabular import adult_lines, sarcos_table, write


def again(data: TaskData) -> DataFormat:
    """The format as a file holds it."""
    assert data.format is not None
    return DataFormat.from_dict(json.loads(json.dumps(data.format.to_dict())), "file")


def encoded(data: TaskData, inputs: Any, tokenizer: Any = None) -> dict[str, Any]:
    """All rows as one batch."""
    found = again(data).encode(inputs, tokenizer)
    return found.collator([found.rows[row] for row in range(len(found))])


def batch_of(data: TaskData, part: str = "test") -> dict[str, Any]:
    rows: Any = getattr(data, part)
    return data.data_collator([rows[row] for row in range(len(rows))])


def assert_inputs(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, column in expected.items():
        if name not in ("labels", "task_ids"):
            same = torch.equal(found[name], column) if isinstance(column, torch.Tensor) else found[name] == column
            assert same, name
    assert "labels" not in found


def test_adult(tmp_path: Path) -> None:
    write(tmp_path / "adult.data", adult_lines(60, seed=0))
    write(tmp_path / "adult.test", [["|1x3 Cross validator"], *adult_lines(20, seed=1, stop=".")])
    data = load_adult(AdultOptions(str(tmp_path)))
    frame = pd.DataFrame(adult_lines(20, seed=1), columns=LAYOUT.columns)
    assert_inputs(encoded(data, frame), batch_of(data))
    with pytest.raises(OptionError, match="row 1: column 'age' is empty, expected a number"):
        encoded(data, frame.assign(age=None))


def test_sarcos(tmp_path: Path) -> None:
    np.savez(tmp_path / "sarcos.npz", data=sarcos_table())
    data = load_sarcos(SarcosOptions(file=str(tmp_path / "sarcos.npz")))
    everything = encoded(data, pd.DataFrame(sarcos_table()[:, :21], columns=FEATURES))["features"]
    known = {tuple(row) for row in everything.tolist()}
    assert {tuple(row) for row in batch_of(data)["features"].tolist()} <= known
    task = again(data).tasks["joint_3"]
    assert task == TaskType("regression", means=(data.model_arguments["label_means"][2],),
                            stds=(data.model_arguments["label_stds"][2],))  # fmt: skip


def test_faces(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    data = load_celeba(CelebaOptions(folder=str(tmp_path), image_size=16, cache_dir=str(tmp_path / "cache")))
    paths = [tmp_path / "img_align_celeba" / name_of(row) for row in range(17, 23)]
    assert_inputs(encoded(data, paths), batch_of(data))


@pytest.mark.skipif(importlib.util.find_spec("rdkit") is None, reason="needs rdkit")
def test_molecules(tmp_path: Path) -> None:
    from hf_bilb.data.molecules.molecule_net import TOX21_TASKS

    write_csv(tmp_path / "tox21.csv", TOX21_TASKS, missing=0.0)
    data = load_tox21(MoleculeNetOptions(str(tmp_path / "tox21.csv"), split="random", cache_dir=str(tmp_path / "cache"),
                                         num_workers=1))  # fmt: skip
    chosen = [MADE_UP[row] for row in data.test.rows]  # type: ignore[attr-defined]
    assert_inputs(encoded(data, chosen), batch_of(data))
    with pytest.raises(OptionError, match="the inputs, row 2: 'C1' is no SMILES that RDKit can read"):
        encoded(data, ["C", "C1"])


def test_glue(tmp_path: Path) -> None:
    """Its tasks read different columns: whichever are there."""
    data = load_glue(GlueOptions(folder=str(write_glue(tmp_path)), tasks=("cola", "rte"),
                                 tokenizer=str(write_encoder(tmp_path / "encoder"))))  # fmt: skip
    tokenizer = data.processing_class
    single = encoded(data, [{"sentence": "a good film"}], tokenizer)
    assert single["input_ids"].tolist() == [tokenizer("a good film")["input_ids"]]
    pair = encoded(data, [{"sentence2": "film", "sentence1": "good"}], tokenizer)
    assert pair["input_ids"].tolist() == [tokenizer("good", "film")["input_ids"]]
    assert torch.equal(encoded(data, [("good", "film")], tokenizer)["input_ids"], pair["input_ids"])
    with pytest.raises(OptionError, match="has no column 'sentence2', which the model reads"):
        encoded(data, [{"sentence1": "good"}], tokenizer)


def test_a_file_of_another_version_or_a_damaged_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "sarcos.npz", data=sarcos_table())
    data = load_sarcos(SarcosOptions(file=str(tmp_path / "sarcos.npz")))
    files = model_files({"name": "qm9_mlp"}, "sarcos", data, torch.nn.Linear(1, 1))
    (tmp_path / FILE).write_bytes(files[FILE])
    saved = read_saved(tmp_path)
    assert (saved.model, saved.data, saved.format) == ("qm9_mlp", "sarcos", data.format)
    values = json.loads(files[FILE])
    for changes, said in (
        ({"format": 2}, "has the format 2, expected 1"),
        ({"inputs": {"kind": "tabel"}}, "inputs.kind: 'tabel' is not known (did you mean \"table\"?)"),
        ({"inputs": {**values["inputs"], "means": "x"}}, "inputs.means"),
        ({"tasks": [{"name": "a", "type": "sum"}]}, "'sum' is not known"),
        ({"tasks": None}, "is damaged"),
    ):
        (tmp_path / FILE).write_text(json.dumps({**values, **changes}))
        with pytest.raises(CheckpointError) as raised:
            read_saved(tmp_path)
        assert said in str(raised.value)

"""Real tables: the same rows and labels as the data sets that have names, or as pandas reads."""

from __future__ import annotations

import csv
import lzma
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hf_bilb.data.tables.adult import LAYOUT, AdultOptions, load_adult
from hf_bilb.data.text.glue import GlueOptions, load_glue
from tests.data.glue_files import write_encoder
from tests.data.own.tables import labels, load

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"
pytestmark = [pytest.mark.data, pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")]


def test_adult_has_the_rows_and_labels_of_the_named_data_set(tmp_path: Path) -> None:
    for name in ("adult.data", "adult.test"):
        shutil.copy(REAL / "adult" / f"{name}.xz", tmp_path / f"{name}.csv.xz")
    named = load_adult(AdultOptions(folder=str(REAL / "adult"), tasks=("income",)))
    data = load(
        files={"train": str(tmp_path / "adult.data.csv.xz"), "test": str(tmp_path / "adult.test.csv.xz")},
        inputs={"numeric": list(LAYOUT.numbers), "categorical": list(LAYOUT.categories)},
        tasks={"income": {"type": "classification", "column": "classification", "classes": ["<=50K", ">50K"]}},
    )
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(data, part), getattr(named, part)
        assert np.array_equal(ours.columns["labels"].numpy(), theirs.labels.numpy())
        assert np.array_equal(ours.columns["numeric"].numpy(), theirs.numbers.numpy())
        # Categories are numbered from 1 here, in the same order.
        assert np.array_equal(ours.columns["categorical"].numpy(), theirs.codes.numpy() + 1)


def test_glue_as_two_sources(tmp_path: Path) -> None:
    folder, encoder = REAL / "glue", str(write_encoder(tmp_path / "encoder"))
    files = {name: {"train": str(folder / name / "train.tsv.xz"), "test": str(folder / name / "dev.tsv")}
             for name in ("RTE", "STS-B")}  # fmt: skip
    pair = {"text": ["sentence1", "sentence2"]}
    score = {"type": "regression", "column": "score", "standardize": False, "metrics": ["pearson", "spearman"]}
    classes = ["entailment", "not_entailment"]
    data = load(
        tasks={
            "rte": {"type": "classification", "column": "label", "classes": classes, "files": files["RTE"]},
            "stsb": {**score, "files": files["STS-B"]},
        },
        inputs=pair,
        tokenizer=encoder,
    )
    named = load_glue(GlueOptions(folder=str(folder), tasks=("rte", "stsb"), tokenizer=encoder))
    # The test part is the same row by row; the others are drawn with other seeds.
    assert np.array_equal(data.test.task_ids, named.test.task_ids)
    assert np.array_equal(data.test.labels, named.test.labels, equal_nan=True)
    assert np.array_equal(data.test.columns["input_ids"], named.test.columns["input_ids"])
    assert len(data.train) + len(data.validation) == len(named.train) + len(named.validation)


def test_faces_with_attributes_split_by_person(tmp_path: Path) -> None:
    with open(REAL / "celeba/celeba_attributes.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))[:120]
    with zipfile.ZipFile(REAL / "celeba/celeba_64x64.zip") as archive:
        for row in rows:
            archive.extract(row["image"], tmp_path / "faces")
    attributes = ["Male", "Smiling", "Young", "Eyeglasses"]
    table = pd.DataFrame(rows).assign(image=[f"faces/{row['image']}" for row in rows])
    table.to_csv(tmp_path / "faces.csv", index=False)
    data = load(
        files=str(tmp_path / "faces.csv"),
        split={"group_by": "identity", "validation": 0.2, "test": 0.2},
        inputs={"image": "image"},
        tasks={"attributes": {"type": "multi_label", "columns": attributes}},
        image_size=32,
        cache_dir=str(tmp_path / "cache"),
    )
    people = []
    for part in ("train", "validation", "test"):
        rows_of_part = getattr(data, part).rows  # those of the file of images, which are sorted by their paths
        of_part = table.sort_values("image").iloc[rows_of_part]
        assert np.array_equal(labels(data, part), of_part[attributes].to_numpy(np.float32))
        people.append(set(of_part["identity"]))
    assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
    assert tuple(data.train[0]["pixel_values"].shape) == (3, 32, 32)


def test_census_has_the_shares_that_pandas_counts() -> None:
    file = REAL / "census_income_kdd/census_income.csv.xz"
    with lzma.open(file, "rt") as stream:
        table = pd.read_csv(stream, dtype=str, keep_default_na=False, skipinitialspace=True)
    numeric = ["age", "weeks_worked"]
    data = load(
        files=str(file),
        split={"stratify_by": "income_50k", "validation": 0.1, "test": 0.2},
        inputs={"numeric": numeric, "categorical": ["sex", "race"]},
        tasks={
            "income": {"type": "classification", "column": "income_50k"},
            "marital_stat": {"type": "classification"},
        },
    )
    parts = [labels(data, part) for part in ("validation", "test", "train")]
    assert [len(part) for part in parts] == [7981, 15962, 55867] and sum(map(len, parts)) == len(table)
    known = data.model_arguments["tasks"]["income"].names
    share = (table["income_50k"] == known[1]).mean()
    assert [part[:, 0].mean() for part in parts] == pytest.approx([share] * 3, abs=1e-4)
    married = data.model_arguments["tasks"]["marital_stat"].names
    counts = table["marital_stat"].value_counts()
    found = np.bincount(np.concatenate(parts)[:, 1].astype(int))
    assert found.tolist() == [counts[name] for name in married]
    assert data.model_arguments["categories"]["sex"] == ["Female", "Male"]

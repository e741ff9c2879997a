"""What all data sets' rows and batches have in common."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_bilb.config.registry import DATA_SETS
from hf_bilb.data.images.rows import ImageRows
from hf_bilb.data.molecules.graphs import GraphRows, MoleculeGraphs, collate_graphs
from hf_bilb.data.rows import BatchedRows, JoinRows, Rows, VectorRows, collate_images, collate_vectors
from hf_bilb.data.tables.one_hot import OneHotRows
from hf_bilb.data.task_data import DataSetSpec


def vectors(_: Path) -> tuple[BatchedRows, JoinRows]:
    return VectorRows({"a": torch.arange(10.0).view(5, 2), "labels": torch.arange(5.0)[:, None]}), collate_vectors


def one_hot(_: Path) -> tuple[BatchedRows, JoinRows]:
    codes = torch.tensor([[0, 1], [1, -1], [0, 0], [1, 2], [0, 2]], dtype=torch.int16)
    return OneHotRows(torch.arange(5.0)[:, None], codes, [2, 3], torch.arange(5.0)[:, None]), collate_vectors


def images(folder: Path) -> tuple[BatchedRows, JoinRows]:
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4), dtype=np.uint8))
    labels = np.arange(10, dtype=np.float32).reshape(5, 2)
    return ImageRows(folder / "images.npy", np.array([6, 0, 2, 2, 5]), labels), collate_images


def graphs(_: Path) -> tuple[BatchedRows, JoinRows]:
    sizes = np.array([2, 1, 3])
    bonds = np.array([[0, 1], [0, 1], [1, 2]])
    molecules = MoleculeGraphs(sizes, np.arange(12).reshape(6, 2), np.array([1, 0, 2]), bonds, np.ones((3, 1)))
    return GraphRows(molecules, np.array([2, 0, 1, 2, 0]), torch.arange(5.0)[:, None]), collate_graphs


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        for name in one
    )


@pytest.mark.parametrize("made", [vectors, one_hot, images, graphs])
def test_rows_slices_lists_and_batches_agree(tmp_path: Path, made: Any) -> None:
    rows, collate = made(tmp_path)
    assert isinstance(rows, Rows) and len(rows) == 5
    for index in (slice(1, 4), slice(None, None, -1), [4, -1, 0], np.array([2, 2])):
        places = np.arange(5)[index].tolist()
        (batch,) = rows.__getitems__(places)
        assert equal(rows[index], batch)
        assert equal(collate([rows[place] for place in places]), batch)
        assert equal(collate([batch]), batch)
        assert equal(collate([*rows.__getitems__(places[:2]), *(rows[place] for place in places[2:])]), batch)
        assert equal(pickle.loads(pickle.dumps(rows))[index], batch)
    assert equal(rows[-2], rows[3]) and equal(rows[np.int64(3)], rows[3])
    for beyond in (5, -6):
        with pytest.raises(IndexError):
            rows[beyond]


def test_every_data_set_is_an_entry_of_the_registry() -> None:
    assert all(isinstance(DATA_SETS[name], DataSetSpec) for name in list(DATA_SETS.modules))

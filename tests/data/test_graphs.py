"""Batches of graphs against a loop over molecules and atoms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_bilb.data.molecules.graphs import GraphRows, MoleculeGraphs, collate_graphs

SIZES = [4, 1, 7, 2, 7, 3]


def made_up(with_positions: bool) -> MoleculeGraphs:
    """Random trees; a molecule of one atom has no bond."""
    generator = np.random.default_rng(0)
    bonds = [[[int(generator.integers(atom)), atom] for atom in range(1, size)] for size in SIZES]
    return MoleculeGraphs(
        num_nodes=np.array(SIZES, np.int16),
        nodes=generator.integers(-1, 9, (sum(SIZES), 3)).astype(np.int8),
        num_bonds=np.array([len(of_one) for of_one in bonds], np.int16),
        bonds=np.array([bond for of_one in bonds for bond in of_one], np.int16),
        bond_features=np.eye(4, dtype=np.int8)[generator.integers(0, 4, sum(SIZES) - len(SIZES))],
        positions=generator.normal(size=(sum(SIZES), 3)).astype(np.float32) if with_positions else None,
    )


def expected_batch(graphs: MoleculeGraphs, rows: list[int]) -> dict[str, np.ndarray]:
    """As the layout is documented, atom by atom."""
    complete = graphs.positions is not None
    size = max(SIZES[row] for row in rows)
    nodes = np.zeros((len(rows), size, 3))
    edges = np.zeros((len(rows), size, size, 4 + complete))
    mask = np.zeros((len(rows), size, size), bool)
    for place, row in enumerate(rows):
        atoms, pairs = sum(SIZES[:row]), sum(SIZES[:row]) - row
        for i in range(SIZES[row]):
            nodes[place, i] = graphs.nodes[atoms + i]
            for j in range(SIZES[row]):
                if complete and i != j:
                    mask[place, i, j] = True
                    edges[place, i, j, 4] = np.linalg.norm(
                        graphs.positions[atoms + i].astype(float) - graphs.positions[atoms + j]  # type: ignore[index]
                    )
        for number in range(pairs, pairs + SIZES[row] - 1):
            for i, j in (graphs.bonds[number], graphs.bonds[number][::-1]):
                mask[place, i, j] = True
                edges[place, i, j, :4] = graphs.bond_features[number]
    return {"nodes": nodes, "edges": edges, "edge_mask": mask}


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [4, 0], [1], [5, 5, 1, 2]])
def test_a_batch_is_what_a_loop_makes_of_it(with_positions: bool, rows: list[int]) -> None:
    graphs = made_up(with_positions)
    batch = graphs.batch(np.array(rows))
    assert list(batch) == ["nodes", "edges", "edge_mask", "num_nodes"]
    assert batch["num_nodes"] == [SIZES[row] for row in rows] and type(batch["num_nodes"][0]) is int
    for name, values in expected_batch(graphs, rows).items():
        assert batch[name].dtype == (torch.bool if name == "edge_mask" else torch.float32)
        np.testing.assert_allclose(batch[name].numpy(), values, rtol=1e-6, atol=1e-6, err_msg=name)
    # exactly, since a model may add over everything
    assert not batch["edges"][~batch["edge_mask"]].any()
    assert not batch["edge_mask"].diagonal(dim1=1, dim2=2).any()
    assert graphs.num_edge_features == batch["edges"].shape[-1] and graphs.num_node_features == 3


def rows_of(with_positions: bool = True) -> GraphRows:
    chosen = np.array([5, 2, 0, 1, 4])
    labels = torch.arange(10.0).view(5, 2)
    labels[3, 1] = torch.nan
    return GraphRows(made_up(with_positions), chosen, labels)


def assert_equal(batch: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(batch) == list(other) == ["nodes", "edges", "edge_mask", "num_nodes", "labels"]
    assert batch["num_nodes"] == other["num_nodes"]
    for name in ("nodes", "edges", "edge_mask", "labels"):
        torch.testing.assert_close(batch[name], other[name], rtol=0, atol=0, equal_nan=True)


def test_rows_are_the_chosen_molecules_with_their_labels() -> None:
    rows = rows_of()
    (batch,) = rows.__getitems__([3, 0])
    np.testing.assert_allclose(batch["nodes"].numpy(), expected_batch(rows.graphs, [1, 5])["nodes"])
    np.testing.assert_equal(batch["labels"].numpy(), [[6, np.nan], [0, 1]])
    one = rows[4]
    assert one["nodes"].shape == (7, 3) and one["edges"].shape == (7, 7, 5) and one["num_nodes"] == 7
    assert one["labels"].tolist() == [8, 9] and len(rows) == 5


def test_single_molecules_and_batches_join_to_the_batch_that_is_served_at_once() -> None:
    rows = rows_of()
    (at_once,) = rows.__getitems__([2, 4, 3, 1])
    assert_equal(collate_graphs([rows[2], rows[4], rows[3], rows[1]]), at_once)
    assert_equal(collate_graphs([rows[2], *rows.__getitems__([4, 3]), rows[1]]), at_once)
    assert_equal(collate_graphs([at_once]), at_once)
    assert_equal(collate_graphs([rows[3]]), rows.__getitems__([3])[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_serves_the_sampler_s_order(workers: int) -> None:
    rows, order = rows_of(), [4, 0, 3, 2, 1]
    loader = DataLoader(rows, batch_size=2, sampler=order, num_workers=workers, collate_fn=collate_graphs)
    batches = list(loader)
    assert [batch["num_nodes"] for batch in batches] == [[7, 3], [1, 4], [7]]
    torch.testing.assert_close(
        torch.cat([batch["labels"] for batch in batches]), rows.labels[torch.tensor(order)], equal_nan=True
    )


def test_the_trainer_s_column_remover_leaves_the_batch_alone() -> None:
    from transformers.trainer_utils import RemoveColumnsCollator

    names = ["nodes", "edges", "edge_mask", "num_nodes", "labels"]
    loader = DataLoader(rows_of(), batch_size=5, collate_fn=RemoveColumnsCollator(collate_graphs, names))
    assert_equal(next(iter(loader)), rows_of().__getitems__(list(range(5)))[0])


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    graphs = made_up(True)
    arrays = {name: getattr(graphs, name) for name in ("num_nodes", "nodes", "num_bonds", "bonds", "bond_features")}
    MoleculeGraphs(**arrays)
    for name in ("nodes", "num_bonds", "bonds", "bond_features"):
        with pytest.raises(ValueError, match="differ in length"):
            MoleculeGraphs(**{**arrays, name: arrays[name][:-1]})
    with pytest.raises(ValueError, match="2 rows, but labels"):
        GraphRows(graphs, np.arange(2), torch.zeros(3, 1))

"""Molecules as graphs in flat arrays, and how a batch of them is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hf_bilb.data.rows import BatchedRows, JoinRows

#: `nodes [B, n, F]`, `edges [B, n, n, E]`, `edge_mask [B, n, n]`, `num_nodes` (B integers) and `labels [B, K]`.
GraphBatch: TypeAlias = dict[str, Any]


class MoleculeGraphs:
    """N molecules with their atoms, and their bonds, one after the other (A atoms and M bonds in all).

    With `positions` the graphs are complete: every ordered pair of different atoms is an edge, and the last edge
    feature is the distance. Without, the bonds are the edges, each in both directions.

    Args:
        num_nodes: `[N]`, atoms of each molecule, at least one.
        nodes: `[A, F]`, features of the atoms, whole numbers.
        num_bonds: `[N]`.
        bonds: `[M, 2]`, the two atoms of a bond, counted from 0 in each molecule.
        bond_features: `[M, D]`, whole numbers.
        positions: `[A, 3]` in Angstrom, or None.

    Attributes:
        num_node_features: F.
        num_edge_features: E, which is D, and one more with positions.

    State: the arrays as they are given; memory-mapped ones are read where a batch needs them.

    Raises:
        ValueError: arrays whose lengths do not fit together.
    """

    def __init__(
        self,
        num_nodes: NDArray[Any],
        nodes: NDArray[Any],
        num_bonds: NDArray[Any],
        bonds: NDArray[Any],
        bond_features: NDArray[Any],
        positions: NDArray[Any] | None = None,
    ) -> None:
        self.num_nodes = np.asarray(num_nodes, np.int64)
        self.num_bonds = np.asarray(num_bonds, np.int64)
        self.nodes, self.bonds, self.bond_features, self.positions = nodes, bonds, bond_features, positions
        atoms, pairs = int(self.num_nodes.sum()), int(self.num_bonds.sum())
        fits = len(self.num_nodes) == len(self.num_bonds) and len(nodes) == atoms
        fits = fits and len(bonds) == len(bond_features) == pairs and (positions is None or len(positions) == atoms)
        if not fits:
            raise ValueError("the arrays of atoms, bonds and molecules differ in length")
        self._first_node = np.cumsum(self.num_nodes) - self.num_nodes
        self._first_bond = np.cumsum(self.num_bonds) - self.num_bonds
        self.num_node_features = nodes.shape[1]
        self.num_edge_features = bond_features.shape[1] + (positions is not None)

    def __len__(self) -> int:
        return len(self.num_nodes)

    def batch(self, rows: NDArray[np.int64]) -> GraphBatch:
        """The molecules of these numbers, in their order, padded to the largest; everything but the labels.

        Cost: a few array operations whatever the number of molecules; the memory of the result and half of it again.
        """
        num_nodes = self.num_nodes[rows]
        size = int(num_nodes.max())
        molecule, place, source = _ragged(self._first_node[rows], num_nodes)
        nodes = np.zeros((len(rows), size, self.num_node_features), np.float32)
        nodes[molecule, place] = self.nodes[source]
        edges = np.zeros((len(rows), size, size, self.num_edge_features), np.float32)
        bonded, _, source_bonds = _ragged(self._first_bond[rows], self.num_bonds[rows])
        ends, of_type = self.bonds[source_bonds].astype(np.int64), slice(self.bond_features.shape[1])
        first = (bonded * size + ends[:, 0]) * size + ends[:, 1]
        second = (bonded * size + ends[:, 1]) * size + ends[:, 0]
        flat = edges.reshape(-1, self.num_edge_features)
        flat[first, of_type] = flat[second, of_type] = self.bond_features[source_bonds]
        if self.positions is None:
            edge_mask = np.zeros((len(rows), size, size), np.bool_)
            edge_mask.reshape(-1)[first] = edge_mask.reshape(-1)[second] = True
        else:
            edge_mask = _every_pair(num_nodes, size)
            padded = np.zeros((3, len(rows), size), np.float32)
            padded[:, molecule, place] = self.positions[source].T
            edges[..., -1] = _distances(padded) * edge_mask
        return {
            "nodes": torch.from_numpy(nodes),
            "edges": torch.from_numpy(edges),
            "edge_mask": torch.from_numpy(edge_mask),
            "num_nodes": num_nodes.tolist(),
        }


def _ragged(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """For pieces `starts[i] .. starts[i] + counts[i]`, one after the other: i, place within the piece, and index."""
    piece = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
    return piece, place, place + np.repeat(starts, counts)


def _every_pair(num_nodes: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """`[B, n, n]`: True for two different atoms that are there."""
    there = np.arange(size) < num_nodes[:, None]
    return there[:, :, None] & there[:, None, :] & ~np.eye(size, dtype=np.bool_)


def _distances(positions: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[3, B, n]` -> `[B, n, n]`."""
    squared = np.zeros((*positions.shape[1:], positions.shape[2]), np.float32)
    for coordinate in positions:  # one at a time: the differences of all three together do not fit into the caches
        difference = coordinate[:, :, None] - coordinate[:, None, :]
        squared += difference * difference
    return np.sqrt(squared, out=squared)


class GraphRows(BatchedRows):
    """Some molecules with their labels.

    `rows[i]` is one molecule: `nodes [n, F]`, `edges [n, n, E]`, `edge_mask [n, n]`, `num_nodes` (an integer) and
    `labels [K]`. Use `collate_graphs` with it.

    Args:
        graphs: all molecules.
        rows: `[N]`, which of them.
        labels: `[N, K]`, NaN where missing; no column where K is 0.

    Raises:
        ValueError: rows and labels differ in length.
    """

    def __init__(self, graphs: MoleculeGraphs, rows: NDArray[np.int64], labels: Tensor) -> None:
        if len(rows) != len(labels):
            raise ValueError(f"{len(rows)} rows, but labels {tuple(labels.shape)}")
        self.graphs = graphs
        self.rows = rows
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> GraphBatch:
        chosen = np.asarray(places, np.int64)
        batch = self.graphs.batch(self.rows[chosen])
        return batch if self.labels.shape[1:] == (0,) else {**batch, "labels": self.labels[torch.from_numpy(chosen)]}


@dataclass(frozen=True)
class JoinGraphs(JoinRows):
    """Collator: joins molecules and batches of molecules, in any mixture, to one batch, padded to the largest."""

    def _batch_of_one(self, value: Any) -> Any:
        return value[None] if isinstance(value, Tensor) else [value]  # `num_nodes` is no tensor

    def _join(self, batches: Sequence[Mapping[str, Any]]) -> GraphBatch:
        size = max(batch["nodes"].shape[1] for batch in batches)
        return {name: _joined(name, [batch[name] for batch in batches], size) for name in batches[0]}


collate_graphs = JoinGraphs(2, "nodes")


def _joined(name: str, parts: list[Any], size: int) -> Any:
    if name == "num_nodes":
        return [number for part in parts for number in part]
    dimensions = {"nodes": 1, "edges": 2, "edge_mask": 2}.get(name, 0)  # that are padded; they follow the batch's
    return torch.cat([_pad(part, dimensions, size) for part in parts])


def _pad(values: Tensor, dimensions: int, size: int) -> Tensor:
    if not dimensions:
        return values
    # functional.pad counts from the last dimension.
    after = [0, 0] * (values.dim() - 1 - dimensions) + [0, size - values.shape[1]] * dimensions
    return functional.pad(values, after)

"""QM9 as complete graphs with the multi-task papers' features: 11 numbers an atom, bond type and distance a pair.

The same 130,831 molecules, targets and split as the data set `qm9`. Per atom: one of H, C, N, O, F; atomic number;
aromatic; sp, sp2, sp3; number of bonded hydrogens. Per ordered pair of atoms: one of four bond types, or none, and
the distance in Angstrom (Gilmer et al., arXiv 1704.01212, section 6, as in PyTorch Geometric's QM9).

Bonds come from coordinates and SMILES together (`hf_bilb.data.molecules.features.geometry_graph`). Counted with RDKit
2026.09 over all molecules, every one of which is kept:

* 130,829: coordinates and SMILES are the same graph; bond orders, aromaticity and hybridisation are the SMILES'.
* 2 (numbers 133,857 and 133,859 of the release): they are different isomers; the bonds are the coordinates', with the
  orders that RDKit finds for them. There is none for which it finds no orders (it would have single bonds alone).
* 130,475: RDKit finds the same orders for the coordinates' bonds without the SMILES. Of the other 356, 289 are
  zwitterions, which it writes without charges, and 67 have a nitro group, whose double bond it gives to the other
  oxygen; here the SMILES decides, and for a nitro group the shorter bond.
* 0 of 2,359,210 atoms have another valence than their element and charge ask for; 72 of 2,440,360 bonds, in 71
  molecules, differ by more than 0.2 Angstrom from the usual length of their kind.
* For 130,711 of the 130,719 molecules whose charges the graph alone determines, it has the formula, bonds and hydrogens
  of the package's InChI; for 6 of the other 8 the InChI has placed a charge elsewhere, 2 are the isomers.

The counts of a preparation are kept with its cache (`meta.json`).
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import Arrays, Preparation, cache_root, prepare_arrays
from hf_bilb.data.checks import check_at_least
from hf_bilb.data.molecules.features import (
    BOND_TYPES,
    GEOMETRY_ATOM_FEATURES,
    GeometryGraph,
    Source,
    check_rdkit,
    geometry_graph,
    join_graphs,
    quiet_rdkit,
)
from hf_bilb.data.molecules.graphs import GraphRows, MoleculeGraphs, collate_graphs
from hf_bilb.data.molecules.qm9 import Molecules, Qm9Options, package_folder, read_molecules, read_smiles
from hf_bilb.data.molecules.qm9_targets import Tasks
from hf_bilb.data.splits import split_rows
from hf_bilb.data.task_data import DataSetSpec, TaskData

CHUNK = 2048  # molecules that are kept when a preparation is interrupted
# Part of the name of the cache: raise it when what is cached changes.
CACHE_VERSION = 1
DISTANCE = "distance"


@dataclass(frozen=True)
class Qm9GraphsOptions(Qm9Options):
    """What a recipe's `data:` section may set; also what `Qm9Options` says.

    Attributes:
        cache_dir: where the prepared arrays are kept (80 MB); None is `hf_bilb` in the folder of Hugging Face's caches.
        num_workers: processes of the preparation; None is as many as there are cores.
    """

    num_workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("num_workers", self.num_workers, 1)


def load_qm9_graphs(options: Qm9GraphsOptions) -> TaskData:
    """QM9 as batches of graphs (`hf_bilb.data.molecules.graphs`), the labels standardised.

    The first call prepares the cache, with a progress bar, which any seed and any split share; later calls take less
    than a second. An interrupted preparation is taken up again.

    Raises:
        MissingPackageError: `qm9pack` or `rdkit` is not installed.
        OptionError: see `Qm9GraphsOptions`; a cache folder that cannot be written to, or a damaged cache.
    """
    arrays, _ = prepare_qm9_graphs(options.cache_dir, num_workers=options.num_workers)
    return task_data(arrays, options)


def prepare_qm9_graphs(
    cache_dir: str | None = None, num_workers: int | None = None, max_molecules: int | None = None
) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of `MoleculeGraphs` with `index [N]`, `targets [N, 11]`, and what the preparation found.

    Args:
        cache_dir: folder of the cache; None is the default.
        num_workers: processes; None is as many as there are cores.
        max_molecules: the first so many only (for tests).

    Returns:
        memory-mapped arrays, and `counts` (see `summarize`) with `rdkit`, its version.

    Raises:
        MissingPackageError: `qm9pack` or `rdkit` is not installed.
    """
    folder, rdkit_version = package_folder("qm9_graphs"), check_rdkit("qm9_graphs")
    versions = f"qm9pack-{importlib.metadata.version('qm9pack')}-rdkit-{rdkit_version}"
    part = "all" if max_molecules is None else f"first-{max_molecules}"
    preparation = Preparation(
        name=f"qm9_graphs-v{CACHE_VERSION}-{versions}-{part}",
        chunks=functools.partial(_chunks, folder, max_molecules),
        compute=_graphs_of_chunk,
        size=_size_of_chunk,
        summarize=functools.partial(summarize, rdkit_version=rdkit_version),
        description="QM9 graphs",
        unit="molecules",
    )
    return prepare_arrays(cache_root(cache_dir), preparation, num_workers)


def _chunks(folder: Path, max_molecules: int | None) -> list[tuple[Molecules, list[str]]]:
    molecules, smiles = read_molecules(folder, max_molecules), read_smiles(folder, max_molecules)
    starts = range(0, len(molecules), CHUNK)
    return [(molecules[start : start + CHUNK], smiles[start : start + CHUNK]) for start in starts]


def _size_of_chunk(chunk: tuple[Molecules, list[str]]) -> int:
    return len(chunk[0])


def _graphs_of_chunk(chunk: tuple[Molecules, list[str]]) -> Arrays:
    molecules, smiles = chunk
    with quiet_rdkit():
        found = [geometry_graph(*molecules.atoms(row), text) for row, text in enumerate(smiles)]
    return {
        "index": molecules.index.astype(np.int32),
        **join_graphs([one.graph for one in found], len(GEOMETRY_ATOM_FEATURES), len(BOND_TYPES)),
        "positions": molecules.positions.astype(np.float32),
        "targets": molecules.targets,
        "checks": np.array([_checks(one) for one in found], np.int8),
    }


def _checks(found: GeometryGraph) -> Sequence[int]:
    return found.source, found.orders_agree, found.strange_lengths, found.strange_valences


def summarize(arrays: Arrays, rdkit_version: str) -> dict[str, Any]:
    """How many molecules have their bonds from where, and how the checks came out."""
    source, orders_agree, strange_lengths, strange_valences = arrays["checks"].T
    bonded = arrays["bond_features"].sum(axis=0)
    return {
        "rdkit": rdkit_version,
        "counts": {
            "molecules": len(source),
            "coordinates and SMILES agree": int((source == Source.SMILES).sum()),
            "bond orders found from the coordinates alone": int((source == Source.COORDINATES).sum()),
            "no bond orders found, all single": int((source == Source.DISTANCES).sum()),
            "RDKit finds the same bond orders without the SMILES": int(orders_agree.sum()),
            "molecules with a bond of unusual length": int((strange_lengths > 0).sum()),
            "bonds of unusual length": int(strange_lengths.sum()),
            "atoms of unusual valence": int(strange_valences.sum()),
            "bonds": int(arrays["num_bonds"].sum()),
            **{f"{name} bonds": int(count) for name, count in zip(BOND_TYPES, bonded, strict=True)},
        },
    }


def task_data(arrays: Arrays, options: Qm9GraphsOptions) -> TaskData:
    """Split as `qm9` is, and standardise the targets by the training molecules."""
    names = ("num_nodes", "nodes", "num_bonds", "bonds", "bond_features", "positions")
    graphs = MoleculeGraphs(*(arrays[name] for name in names))
    targets = np.asarray(arrays["targets"])
    split = split_rows(len(targets), options.seed, options.num_train, options.num_validation, options.num_test)
    tasks = Tasks.choose(options.tasks, targets, split.train)

    def part(rows: NDArray[np.int64]) -> GraphRows:
        return GraphRows(graphs, rows, tasks.labels(rows))

    test = part(split.test)
    return TaskData(
        train=part(split.train),
        validation=part(split.validation),
        test=test,
        data_collator=collate_graphs,
        model_arguments={
            "num_node_features": graphs.num_node_features,
            "num_edge_features": graphs.num_edge_features,
            "node_feature_names": list(GEOMETRY_ATOM_FEATURES),
            "edge_feature_names": [*BOND_TYPES, DISTANCE],
            "problem": "regression",
            **tasks.model_arguments(),
        },
        **tasks.task_data(test.labels),
    )


SPEC = DataSetSpec(options=Qm9GraphsOptions, load=load_qm9_graphs)

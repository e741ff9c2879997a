"""Molecules of a user's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_bilb.config.options import shown
from hf_bilb.data.inputs.encoded import Encoded, Wanted
from hf_bilb.data.inputs.given import as_table, check_column
from hf_bilb.data.inputs.kinds import MoleculeInputs
from hf_bilb.data.molecules.features import (
    SMILES_ATOM_FEATURES,
    SMILES_BOND_FEATURES,
    MoleculeGraph,
    check_rdkit,
    join_graphs,
    quiet_rdkit,
    smiles_graph,
)
from hf_bilb.data.molecules.graphs import GraphRows, MoleculeGraphs, collate_graphs
from hf_bilb.data.own import columns
from hf_bilb.data.own.files import Table
from hf_bilb.errors import OptionError


def encode_molecules(kind: MoleculeInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """Rows of graphs; see `ENCODERS`. Raises `MissingPackageError` where RDKit is not installed."""
    check_rdkit("smiles")
    table = as_table(inputs, wanted.csv, (kind.column,))
    check_column(kind.column, table.features, table.name)
    with quiet_rdkit():
        graphs = [_graph(text, table, row) for row, text in enumerate(columns.texts(table, kind.column))]
    arrays = join_graphs(graphs, len(SMILES_ATOM_FEATURES), len(SMILES_BOND_FEATURES))
    return Encoded(
        GraphRows(MoleculeGraphs(**arrays), np.arange(len(graphs)), torch.empty(len(graphs), 0)), collate_graphs
    )


def _graph(text: str, table: Table, row: int) -> MoleculeGraph:
    from rdkit import Chem

    molecule: Any = Chem.MolFromSmiles(text)  # None, which the stubs of RDKit do not say, where it is no SMILES
    if molecule is None or not molecule.GetNumAtoms():
        raise OptionError(f"{table.place(row)}: {shown(text)} is no SMILES that RDKit can read")
    return smiles_graph(molecule)

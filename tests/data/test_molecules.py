"""Molecules to graphs: against hand-made geometries, against what RDKit embedded, and against PyTorch Geometric."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from hf_bilb.data.molecules.features import (
    BOND_TYPES,
    GEOMETRY_ATOM_FEATURES,
    SMILES_ATOM_FEATURES,
    SMILES_BOND_FEATURES,
    SMILES_ELEMENTS,
    GeometryGraph,
    Source,
    check_rdkit,
    geometry_graph,
    scaffold,
    smiles_graph,
)
from hf_bilb.errors import MissingPackageError

needs_rdkit = pytest.mark.skipif(
    importlib.util.find_spec("rdkit") is None, reason='needs RDKit: pip install "hf-bilb[molecules]"'
)
SYMBOLS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}


def bond_types(found: GeometryGraph) -> dict[tuple[int, int], str]:
    features = found.graph.bond_features
    assert (features.sum(axis=1) == 1).all()
    pairs = map(tuple, found.graph.bonds.tolist())
    return {pair: BOND_TYPES[kind] for pair, kind in zip(pairs, features.argmax(axis=1), strict=True)}


def atom_column(found: GeometryGraph, name: str) -> list[int]:
    return found.graph.nodes[:, GEOMETRY_ATOM_FEATURES.index(name)].tolist()


def embedded(smiles: str) -> tuple[object, np.ndarray, np.ndarray, np.ndarray]:
    """A molecule with hydrogens, its atomic numbers and positions in a shuffled order, and that order."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(molecule, randomSeed=1) == 0
    AllChem.MMFFOptimizeMolecule(molecule)
    order = np.random.default_rng(0).permutation(molecule.GetNumAtoms())
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], np.uint8)
    return molecule, numbers[order], molecule.GetConformer().GetPositions()[order], order


# --- from coordinates and SMILES ----------------------------------------------------------------------------------


@needs_rdkit
@pytest.mark.parametrize(
    "smiles",
    ["C", "N", "O", "C#N", "CC=O", "CC(=O)NC", "c1ccncc1", "c1ccc2[nH]ccc2c1", "C1C2CC1C2", "N#CC1CC1(F)C=O",
     "C1CC2C1C=C2", "O=C1OC2CC1C2"],
)  # fmt: skip
def test_atoms_and_bonds_are_those_of_the_molecule_whatever_the_order_of_the_atoms(smiles: str) -> None:
    from rdkit import Chem

    molecule, numbers, positions, order = embedded(smiles)
    found = geometry_graph(numbers, positions, smiles)
    assert found.source is Source.SMILES and found.orders_agree and found.strange_valences == 0
    place = {int(atom): number for number, atom in enumerate(order)}
    expected = {}
    for bond in molecule.GetBonds():  # type: ignore[attr-defined]
        ends = sorted((place[bond.GetBeginAtomIdx()], place[bond.GetEndAtomIdx()]))
        expected[tuple(ends)] = bond.GetBondType().name.lower()
    assert bond_types(found) == expected
    for number, atom_index in enumerate(order):
        atom = molecule.GetAtomWithIdx(int(atom_index))  # type: ignore[attr-defined]
        kind = str(atom.GetHybridization())
        hydrogens = sum(other.GetAtomicNum() == 1 for other in atom.GetNeighbors())
        wanted = [int(atom.GetSymbol() == symbol) for symbol in SYMBOLS]
        wanted += [atom.GetAtomicNum(), int(atom.GetIsAromatic())]
        wanted += [int(kind == name and atom.GetAtomicNum() > 1) for name in ("SP", "SP2", "SP3")]
        assert found.graph.nodes[number].tolist() == [*wanted, hydrogens]
    assert Chem.MolToSmiles(Chem.MolFromSmiles(smiles))  # the SMILES is one


@needs_rdkit
def test_benzene_by_hand() -> None:
    angles = np.arange(6) * np.pi / 3
    ring = np.stack([np.cos(angles), np.sin(angles), np.zeros(6)], axis=1)
    numbers, positions = np.array([6] * 6 + [1] * 6, np.uint8), np.concatenate([1.39 * ring, 2.48 * ring])
    found = geometry_graph(numbers, positions, "c1ccccc1")
    around = {tuple(sorted((i, (i + 1) % 6))): "aromatic" for i in range(6)}
    assert bond_types(found) == {**around, **{(i, i + 6): "single" for i in range(6)}}
    assert atom_column(found, "aromatic") == atom_column(found, "sp2") == [1] * 6 + [0] * 6
    assert atom_column(found, "bonded hydrogens") == [1] * 6 + [0] * 6
    assert atom_column(found, "atomic number") == numbers.tolist()
    assert found.strange_lengths == found.strange_valences == 0


FORMATE_LIKE = ("[NH3+]C([O-])=O", [7, 6, 8, 8, 1, 1, 1])


@needs_rdkit
@pytest.mark.parametrize("short", [2, 3])
def test_of_two_ways_to_lay_the_smiles_over_the_atoms_the_bond_lengths_decide(short: int) -> None:
    smiles, numbers = FORMATE_LIKE
    positions = np.array([[-1.55, 0, 0], [0, 0, 0], [0.62, 1.09, 0], [0.62, -1.09, 0],
                          [-1.9, 0.96, 0], [-1.9, -0.48, 0.83], [-1.9, -0.48, -0.83]])  # fmt: skip
    positions[short] *= 0.97
    found = geometry_graph(np.array(numbers, np.uint8), positions, smiles)
    long = 5 - short
    assert bond_types(found)[1, short] == "double" and bond_types(found)[1, long] == "single"
    assert found.strange_valences == 0  # N+ has four bonds, O- one


@needs_rdkit
def test_coordinates_of_another_isomer_get_bond_orders_of_their_own() -> None:
    _, numbers, positions, _ = embedded("CC=C")
    found = geometry_graph(numbers, positions, "C1CC1")
    assert found.source is Source.COORDINATES and found.strange_valences == 0
    assert sorted(bond_types(found).values()).count("double") == 1
    right = geometry_graph(numbers, positions, "CC=C")
    assert right.source is Source.SMILES
    np.testing.assert_array_equal(found.graph.bond_features, right.graph.bond_features)
    np.testing.assert_array_equal(found.graph.nodes, right.graph.nodes)


@needs_rdkit
@pytest.mark.parametrize("smiles", ["C", "no smiles"])
def test_where_no_bond_orders_fit_every_bond_is_single_and_the_valences_are_reported(smiles: str) -> None:
    _, numbers, positions, _ = embedded("CCC")
    keep = np.flatnonzero(numbers > 1)  # three bare carbon atoms
    found = geometry_graph(numbers[keep], positions[keep], smiles)
    assert found.source is Source.DISTANCES and not found.orders_agree
    assert set(bond_types(found).values()) == {"single"} and len(found.graph.bonds) == 2
    assert found.strange_valences == 3


@needs_rdkit
def test_a_stretched_bond_is_counted() -> None:
    _, numbers, positions, _ = embedded("CC")
    carbons, hydrogens = np.flatnonzero(numbers == 6), np.flatnonzero(numbers == 1)
    assert geometry_graph(numbers, positions, "CC").strange_lengths == 0
    moved = positions.copy()
    nearest = np.linalg.norm(positions[hydrogens] - positions[carbons[1]], axis=1) < 1.3
    direction = positions[carbons[1]] - positions[carbons[0]]
    moved[[carbons[1], *hydrogens[nearest]]] += 0.2 * direction  # 1.5 to 1.8 Angstrom
    assert geometry_graph(numbers, moved, "CC").strange_lengths == 1


# --- from SMILES --------------------------------------------------------------------------------------------------

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C[N+](C)(C)CC([O-])=O", "O=S(=O)(N)c1ccc(Cl)cc1Br", "[Na+].[I-]", "C#CCB(O)O",
          "C[Si](C)(C)OP(=O)(O)F", "S(F)(F)(F)(F)(F)F", "[AsH3]", "C1CC1C=CC=C", "N"]  # fmt: skip


@needs_rdkit
@pytest.mark.parametrize("smiles", SMILES)
def test_features_of_a_smiles_are_those_of_pytorch_geometric(smiles: str) -> None:
    geometric = pytest.importorskip("torch_geometric.utils.smiles", reason="needs PyTorch Geometric")
    from rdkit import Chem

    theirs = geometric.from_smiles(smiles)
    kinds = geometric.x_map
    graph = smiles_graph(Chem.MolFromSmiles(smiles))
    assert graph.nodes.shape == (theirs.num_nodes, len(SMILES_ATOM_FEATURES))
    table = Chem.GetPeriodicTable()
    for ours, x in zip(graph.nodes, theirs.x.tolist(), strict=True):
        named = dict(zip(SMILES_ATOM_FEATURES, ours.tolist(), strict=True))
        symbol = table.GetElementSymbol(x[0])
        assert named.pop(symbol if symbol in SMILES_ELEMENTS else "other") == 1
        neighbours = x[2] - x[4]  # theirs are counted with the hydrogens
        assert named.pop(f"{neighbours} neighbours" if neighbours < 6 else "6 or more neighbours") == 1
        assert named.pop("charge") == kinds["formal_charge"][x[3]]
        assert named.pop(f"{x[4]} hydrogens" if x[4] < 4 else "4 or more hydrogens") == 1
        kind = kinds["hybridization"][x[6]].lower()
        assert named.pop(kind if kind in ("sp", "sp2", "sp3") else "other hybridisation") == 1
        assert (named.pop("aromatic"), named.pop("in a ring")) == (x[7], x[8])
        assert not any(named.values())  # all others are 0
    expected = {}
    for (first, second), (kind, _, conjugated) in zip(
        theirs.edge_index.T.tolist(), theirs.edge_attr.tolist(), strict=True
    ):
        expected[first, second] = [geometric.e_map["bond_type"][kind].lower(), conjugated]
    found = {}
    for (first, second), bond in zip(graph.bonds.tolist(), graph.bond_features.tolist(), strict=True):
        named = dict(zip(SMILES_BOND_FEATURES, bond, strict=True))
        found[first, second] = found[second, first] = [BOND_TYPES[bond[:4].index(1)], named["conjugated"]]
    assert found == expected


@needs_rdkit
def test_bonds_in_rings_are_told_and_a_dative_bond_has_no_type() -> None:
    from rdkit import Chem

    ring = SMILES_BOND_FEATURES.index("in a ring")
    assert sorted(smiles_graph(Chem.MolFromSmiles("C1CC1C")).bond_features[:, ring].tolist()) == [0, 1, 1, 1]
    assert smiles_graph(Chem.MolFromSmiles("N->[Pt]")).bond_features[0, :4].tolist() == [0, 0, 0, 0]


@needs_rdkit
def test_scaffolds_keep_rings_and_what_links_them() -> None:
    from rdkit import Chem

    assert scaffold(Chem.MolFromSmiles("CCCC")) == ""
    one, other = (scaffold(Chem.MolFromSmiles(text)) for text in ("CCc1ccc(CC2CC2)cc1", "OC(=O)c1ccccc1CC1CC1"))
    assert one == Chem.MolToSmiles(Chem.MolFromSmiles("c1ccc(CC2CC2)cc1"))
    assert other == one
    cis, trans = (Chem.MolFromSmiles(f"CC1CC[C@H]2CCCC[{last}]2C1") for last in ("C@H", "C@@H"))
    assert Chem.MolToSmiles(cis) != Chem.MolToSmiles(trans) and scaffold(cis) == scaffold(trans)


# --- RDKit missing ------------------------------------------------------------------------------------------------


def test_without_rdkit_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError) as error:
        check_rdkit("tox21")
    assert str(error.value) == (
        'data set "tox21": the package rdkit is not installed, install it with: pip install "hf-bilb[molecules]"'
    )


def test_importing_the_data_sets_imports_no_rdkit() -> None:
    code = "import sys, hf_bilb.data; print([n for n in ('rdkit', 'datasets', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Molecules to graphs with RDKit: from coordinates and SMILES (QM9), or from SMILES alone (Tox21, SIDER).

With coordinates, the features are those of the multi-task papers (QM9 in PyTorch Geometric): 11 numbers an atom, four
bond types. RDKit is imported by the functions that need it (extra `molecules`).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.errors import MissingPackageError

if TYPE_CHECKING:
    from rdkit import Chem

BOND_TYPES = ("single", "double", "triple", "aromatic")
GEOMETRY_ATOM_FEATURES = (
    "H", "C", "N", "O", "F", "atomic number", "aromatic", "sp", "sp2", "sp3", "bonded hydrogens",
)  # fmt: skip
#: Of what a molecule without coordinates is made; anything else is "other".
SMILES_ELEMENTS = ("B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Br", "I")
SMILES_ATOM_FEATURES = (
    *SMILES_ELEMENTS, "other", *(f"{count} neighbours" for count in range(6)), "6 or more neighbours",
    "charge", "sp", "sp2", "sp3", "other hybridisation", "aromatic", "in a ring",
    *(f"{count} hydrogens" for count in range(4)), "4 or more hydrogens",
)  # fmt: skip
SMILES_BOND_FEATURES = (*BOND_TYPES, "conjugated", "in a ring")

#: Cordero et al., Covalent radii revisited, Dalton Transactions 2008, 2832, in Angstrom (carbon: sp3).
COVALENT_RADII = {1: 0.31, 6: 0.76, 7: 0.71, 8: 0.66, 9: 0.57}
#: Usual lengths in Angstrom of single, double, triple and aromatic bonds: Allen et al., Tables of bond lengths
#: determined by X-ray and neutron diffraction, J. Chem. Soc. Perkin Trans. 2, 1987, S1; to hydrogen: gas phase.
BOND_LENGTHS = {
    (1, 6): (1.09,), (1, 7): (1.01,), (1, 8): (0.96,),
    (6, 6): (1.53, 1.34, 1.20, 1.39), (6, 7): (1.47, 1.28, 1.15, 1.34), (6, 8): (1.43, 1.21, 1.13, 1.36),
    (6, 9): (1.36,), (7, 7): (1.42, 1.24, 1.10, 1.34), (7, 8): (1.41, 1.22, 1.06, 1.40), (8, 8): (1.46, 1.21),
}  # fmt: skip
#: What a bond may differ from its usual length before it is counted as strange; cages of QM9 are strained.
LENGTH_TOLERANCE = 0.2
#: Bonds of a neutral atom.
VALENCES = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}
_BOND_STRETCH = 1.3
_MAX_MATCHES = 1000


class Source(IntEnum):
    """Where a molecule's bonds are from."""

    SMILES = 0  # coordinates and SMILES agree
    COORDINATES = 1  # they do not; bond orders of the coordinates' graph, by RDKit
    DISTANCES = 2  # no bond orders fit: every bond single


def check_rdkit(data_set: str) -> str:
    """RDKit's version; raises `MissingPackageError`, with what to install, where it is not installed."""
    if importlib.util.find_spec("rdkit") is None:
        missing = f'data set "{data_set}": the package rdkit is not installed'
        raise MissingPackageError(f'{missing}, install it with: pip install "hf-bilb[molecules]"')
    import rdkit

    return str(rdkit.__version__)


@contextlib.contextmanager
def quiet_rdkit() -> Iterator[None]:
    """Without RDKit's messages: what it cannot read is counted and named by us."""
    from rdkit import rdBase

    with rdBase.BlockLogs():
        yield


@dataclass(frozen=True)
class MoleculeGraph:
    """One molecule: `nodes [n, F]`, `bonds [m, 2]` and `bond_features [m, D]`, int8 but for the bonds."""

    nodes: NDArray[np.int8]
    bonds: NDArray[np.int16]
    bond_features: NDArray[np.int8]


def join_graphs(graphs: Sequence[MoleculeGraph], num_features: int, num_bond_features: int) -> dict[str, NDArray[Any]]:
    """One after the other, as `hf_bilb.data.molecules.graphs.MoleculeGraphs` holds them; the sizes are for no graphs at
    all."""
    no_nodes, no_bonds = np.zeros((0, num_features), np.int8), np.zeros((0, num_bond_features), np.int8)
    return {
        "num_nodes": np.array([len(graph.nodes) for graph in graphs], np.int16),
        "nodes": np.concatenate([no_nodes, *(graph.nodes for graph in graphs)]),
        "num_bonds": np.array([len(graph.bonds) for graph in graphs], np.int16),
        "bonds": np.concatenate([np.zeros((0, 2), np.int16), *(graph.bonds for graph in graphs)]),
        "bond_features": np.concatenate([no_bonds, *(graph.bond_features for graph in graphs)]),
    }


# --- from coordinates and SMILES ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeometryGraph:
    """A molecule with coordinates.

    Attributes:
        graph: features named by `GEOMETRY_ATOM_FEATURES` and `BOND_TYPES`.
        source: where the bonds are from.
        orders_agree: RDKit finds the same bond orders from the coordinates' bonds alone.
        strange_lengths: bonds whose length differs by more than `LENGTH_TOLERANCE` from the usual one.
        strange_valences: atoms whose bonds do not add up to `VALENCES`, given their formal charge.
    """

    graph: MoleculeGraph
    source: Source
    orders_agree: bool
    strange_lengths: int
    strange_valences: int


def geometry_graph(numbers: NDArray[np.uint8], positions: NDArray[np.float64], smiles: str) -> GeometryGraph:
    """The graph of a molecule of H, C, N, O, F without net charge, its atoms in the order of the coordinates.

    The SMILES says how many bonds there are; the coordinates say which: as many pairs of atoms, those with the
    smallest distances relative to their covalent radii. If both are the same graph (elements, hydrogens on every
    atom, bonds), then bond orders, aromaticity and hybridisation are those of the SMILES. Where the SMILES can be laid
    over the atoms in several ways (a carboxylate's two oxygens), the one whose bond lengths fit best is taken. If they
    are not the same, RDKit finds bond orders for the coordinates' own graph (pairs within 1.3 times their radii);
    if it finds none, every bond is a single one.

    Args:
        numbers: `[n]`, atomic numbers.
        positions: `[n, 3]` in Angstrom.
        smiles: of the same molecule, atoms in any order.
    """
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    bonding, source = _from_smiles(numbers, distances, smiles), Source.SMILES
    guessed = bonding
    if bonding is not None:
        guessed = _from_coordinates(numbers, bonding.pairs)
    else:
        pairs = _close_pairs(numbers, distances)
        bonding, source = _from_coordinates(numbers, pairs), Source.COORDINATES
        guessed = bonding
        if bonding is None:
            bonding, source = _single_bonds(numbers, pairs), Source.DISTANCES
    errors = _length_errors(numbers, distances, bonding.pairs, bonding.types)
    return GeometryGraph(
        graph=MoleculeGraph(
            nodes=_geometry_atoms(numbers, bonding),
            bonds=bonding.pairs.astype(np.int16),
            bond_features=_one_hot(bonding.types, len(BOND_TYPES)),
        ),
        source=source,
        orders_agree=guessed is not None and np.array_equal(guessed.types, bonding.types),
        strange_lengths=int((np.abs(errors) > LENGTH_TOLERANCE).sum()),
        strange_valences=_strange_valences(numbers, bonding),
    )


@dataclass(frozen=True)
class _Bonding:
    """What is known of n atoms and m bonds.

    Attributes:
        pairs: `[m, 2]`, i < j, sorted.
        types: `[m]`, position in `BOND_TYPES`.
        orders: `[m]`, 1 to 3, of a Kekule structure.
        charges: `[n]`, formal.
        aromatic: `[n]`.
        hybridisation: `[n]`, 1 sp, 2 sp2, 3 sp3, 0 none of them (hydrogen).
    """

    pairs: NDArray[np.int64]
    types: NDArray[np.int64]
    orders: NDArray[np.int64]
    charges: NDArray[np.int64]
    aromatic: NDArray[np.int64]
    hybridisation: NDArray[np.int64]


def _from_smiles(numbers: NDArray[np.uint8], distances: NDArray[np.float64], smiles: str) -> _Bonding | None:
    """The SMILES' bonds laid over the atoms; None where it cannot be read or is another graph."""
    from rdkit import Chem

    molecule: Any = Chem.MolFromSmiles(smiles)  # None, which the stubs of RDKit do not say, where it is no SMILES
    if molecule is None:
        return None
    num_bonds = molecule.GetNumBonds() + sum(atom.GetTotalNumHs() for atom in molecule.GetAtoms())
    pairs = nearest_pairs(numbers, distances, num_bonds)
    heavy = np.flatnonzero(numbers > 1)
    hydrogens = _bonded_hydrogens(numbers, pairs)
    both_heavy = pairs[(numbers[pairs] > 1).all(axis=1)]
    ours = _skeleton(numbers[heavy].tolist(), hydrogens[heavy].tolist(), np.searchsorted(heavy, both_heavy).tolist())
    theirs = _skeleton(
        [atom.GetAtomicNum() for atom in molecule.GetAtoms()],
        [atom.GetTotalNumHs() for atom in molecule.GetAtoms()],
        [[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()] for bond in molecule.GetBonds()],
    )
    if (ours.GetNumAtoms(), ours.GetNumBonds()) != (theirs.GetNumAtoms(), theirs.GetNumBonds()):
        return None
    matches = ours.GetSubstructMatches(theirs, uniquify=False, maxMatches=_MAX_MATCHES)
    layouts = [_lay_over(molecule, heavy[list(match)], pairs, len(numbers)) for match in matches]
    if len(layouts) < 2:
        return layouts[0] if layouts else None
    misfits = [float((_length_errors(numbers, distances, pairs, one.types) ** 2).sum()) for one in layouts]
    return layouts[int(np.argmin(misfits))]


def nearest_pairs(numbers: NDArray[np.uint8], distances: NDArray[np.float64], num_bonds: int) -> NDArray[np.int64]:
    """`[num_bonds, 2]`: the pairs (i < j, sorted) with the smallest distances, relative to the covalent radii."""
    first, second = np.triu_indices(len(numbers), 1)
    chosen = np.sort(np.argsort(_stretches(numbers, distances)[first, second], kind="stable")[:num_bonds])
    return np.stack([first[chosen], second[chosen]], axis=1)


def _close_pairs(numbers: NDArray[np.uint8], distances: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.argwhere(np.triu(_stretches(numbers, distances) < _BOND_STRETCH, 1))


def _stretches(numbers: NDArray[np.uint8], distances: NDArray[np.float64]) -> NDArray[np.float64]:
    radii = _RADII[numbers]
    return distances / (radii[:, None] + radii[None])


def _bonded_hydrogens(numbers: NDArray[np.uint8], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[n]`."""
    both_ways = np.concatenate([pairs, pairs[:, ::-1]])
    return np.bincount(both_ways[numbers[both_ways[:, 1]] == 1, 0], minlength=len(numbers))


def _skeleton(numbers: list[int], hydrogens: list[int], bonds: list[list[int]]) -> Chem.RWMol:
    """A labelled graph: a match has to keep the element and the number of hydrogens of every atom."""
    from rdkit import Chem

    molecule = Chem.RWMol()
    for number, count in zip(numbers, hydrogens, strict=True):
        atom = Chem.Atom(number)
        atom.SetIsotope(count + 1)  # what RDKit compares in addition to the element; 0 would match every number
        molecule.AddAtom(atom)
    for first, second in bonds:
        molecule.AddBond(first, second, Chem.BondType.SINGLE)
    return molecule


def _lay_over(molecule: Chem.Mol, places: NDArray[np.int64], pairs: NDArray[np.int64], num_atoms: int) -> _Bonding:
    """`molecule`, sanitised, its atom k being our atom `places[k]`; bonds that it has not are single ones."""
    from rdkit import Chem

    kekulized = Chem.Mol(molecule)
    Chem.Kekulize(kekulized, clearAromaticFlags=True)
    number_of = {pair: number for number, pair in enumerate(map(tuple, pairs.tolist()))}
    types, orders = np.zeros(len(pairs), np.int64), np.ones(len(pairs), np.int64)
    for bond, localized in zip(molecule.GetBonds(), kekulized.GetBonds(), strict=True):
        first, second = int(places[bond.GetBeginAtomIdx()]), int(places[bond.GetEndAtomIdx()])
        number = number_of[min(first, second), max(first, second)]
        types[number] = _TYPE_NAMES.index(bond.GetBondType().name)
        orders[number] = int(localized.GetBondTypeAsDouble())
    atoms = list(molecule.GetAtoms())
    of_atoms = np.zeros((3, num_atoms), np.int64)
    of_atoms[0, places] = [atom.GetFormalCharge() for atom in atoms]
    of_atoms[1, places] = [int(atom.GetIsAromatic()) for atom in atoms]
    of_atoms[2, places] = [_HYBRIDISATIONS.get(atom.GetHybridization().name, 0) for atom in atoms]
    return _Bonding(pairs, types, orders, *of_atoms)


def _from_coordinates(numbers: NDArray[np.uint8], pairs: NDArray[np.int64]) -> _Bonding | None:
    """Bond orders by RDKit for bonds that are given; None where it finds none."""
    from rdkit import Chem
    from rdkit.Chem import rdDetermineBonds

    molecule = _explicit_molecule(numbers, pairs)
    try:
        rdDetermineBonds.DetermineBondOrders(molecule, charge=0, embedChiral=False)
        Chem.SanitizeMol(molecule)
    except (ValueError, RuntimeError):  # sanitising raises subclasses of ValueError
        return None
    return _lay_over(molecule, np.arange(len(numbers)), pairs, len(numbers))


def _single_bonds(numbers: NDArray[np.uint8], pairs: NDArray[np.int64]) -> _Bonding:
    from rdkit import Chem

    molecule = _explicit_molecule(numbers, pairs)
    Chem.SanitizeMol(molecule, Chem.SanitizeFlags.SANITIZE_SETHYBRIDIZATION)
    return _lay_over(molecule, np.arange(len(numbers)), pairs, len(numbers))


def _explicit_molecule(numbers: NDArray[np.uint8], pairs: NDArray[np.int64]) -> Chem.RWMol:
    """Atoms with hydrogens among them, and single bonds."""
    from rdkit import Chem

    molecule = Chem.RWMol()
    for number in numbers.tolist():
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        molecule.AddAtom(atom)
    for first, second in pairs.tolist():
        molecule.AddBond(first, second, Chem.BondType.SINGLE)
    return molecule


def _geometry_atoms(numbers: NDArray[np.uint8], bonding: _Bonding) -> NDArray[np.int8]:
    columns = [
        *(numbers == element for element in VALENCES),
        numbers,
        bonding.aromatic,
        *(bonding.hybridisation == kind for kind in (1, 2, 3)),
        _bonded_hydrogens(numbers, bonding.pairs),
    ]
    return np.stack(columns, axis=1).astype(np.int8)


def _one_hot(values: NDArray[np.int64], size: int) -> NDArray[np.int8]:
    return np.eye(size, dtype=np.int8)[values]


def _length_errors(
    numbers: NDArray[np.uint8], distances: NDArray[np.float64], pairs: NDArray[np.int64], types: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`[m]`, length less the usual one."""
    elements = np.sort(numbers[pairs], axis=1)
    return distances[pairs[:, 0], pairs[:, 1]] - _LENGTHS[elements[:, 0], elements[:, 1], types]


def _strange_valences(numbers: NDArray[np.uint8], bonding: _Bonding) -> int:
    ends = bonding.pairs.T.reshape(-1)
    bonds = np.bincount(ends, weights=np.tile(bonding.orders, 2), minlength=len(numbers))
    # N+ has one bond more than N, O- and N- one less; C- one less.
    return int((bonds != _VALENCES[numbers] + bonding.charges).sum())


# --- from SMILES --------------------------------------------------------------------------------------------------


def smiles_graph(molecule: Chem.Mol) -> MoleculeGraph:
    """The graph of a molecule as RDKit reads a SMILES: its heavy atoms and their bonds.

    Features are named by `SMILES_ATOM_FEATURES` and `SMILES_BOND_FEATURES`. A bond of another type (dative) has none of
    the four. Stereochemistry is left out.
    """
    atoms = [_smiles_atom(atom) for atom in molecule.GetAtoms()]
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    features = [
        [*(bond.GetBondType().name == name for name in _TYPE_NAMES), bond.GetIsConjugated(), bond.IsInRing()]
        for bond in molecule.GetBonds()
    ]
    return MoleculeGraph(
        nodes=np.array(atoms, np.int8),
        bonds=np.array(bonds, np.int16).reshape(-1, 2),
        bond_features=np.array(features, np.int8).reshape(-1, len(SMILES_BOND_FEATURES)),
    )


def _smiles_atom(atom: Chem.Atom) -> list[int]:
    hybridisation = _HYBRIDISATIONS.get(atom.GetHybridization().name, 4)
    return [
        *_indicator(_ELEMENT_NUMBERS.get(atom.GetSymbol(), len(SMILES_ELEMENTS)), len(SMILES_ELEMENTS) + 1),
        *_indicator(min(atom.GetDegree(), 6), 7),
        atom.GetFormalCharge(),
        *_indicator(hybridisation - 1, 4),
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
        *_indicator(min(atom.GetTotalNumHs(), 4), 5),
    ]


def _indicator(position: int, size: int) -> list[int]:
    return [int(position == other) for other in range(size)]


def scaffold(molecule: Chem.Mol) -> str:
    """Bemis and Murcko's scaffold, rings and what links them, as a SMILES without stereochemistry; empty without rings.

    Bemis and Murcko, The properties of known drugs. 1. Molecular frameworks, J. Med. Chem. 39, 2887 (1996).
    """
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return str(MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=False))


_TYPE_NAMES = [name.upper() for name in BOND_TYPES]
_HYBRIDISATIONS = {"SP": 1, "SP2": 2, "SP3": 3}
_ELEMENT_NUMBERS = {symbol: number for number, symbol in enumerate(SMILES_ELEMENTS)}
_VALENCES = np.array([VALENCES.get(number, 0) for number in range(10)])
_RADII = np.array([COVALENT_RADII.get(number, np.nan) for number in range(10)])
_LENGTHS = np.full((10, 10, len(BOND_TYPES)), np.nan)
for _pair, _known in BOND_LENGTHS.items():
    _LENGTHS[_pair][: len(_known)] = _known

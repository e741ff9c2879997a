"""QM9 as graphs: against the package's files and InChI, valences and bond lengths; rows and labels as in `qm9`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_bilb.config.options import parse_options
from hf_bilb.data import DATA_SETS, TaskData
from hf_bilb.data.cache import META, Arrays
from hf_bilb.data.molecules import qm9_graphs
from hf_bilb.data.molecules.features import BOND_TYPES, GEOMETRY_ATOM_FEATURES
from hf_bilb.data.molecules.qm9 import Molecules, Qm9Columns, Qm9Options, package_folder, read_molecules, read_smiles
from hf_bilb.data.molecules.qm9 import task_data as descriptor_data
from hf_bilb.data.molecules.qm9_graphs import Qm9GraphsOptions, load_qm9_graphs, prepare_qm9_graphs, task_data
from hf_bilb.errors import MissingPackageError, OptionError

needs_data = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("qm9pack", "rdkit")),
    reason='needs the data and RDKit: pip install "hf-bilb[qm9,molecules]"',
)
FEW = 1500
SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qm9-graphs")


@pytest.fixture(scope="session")
def few(cache: Path) -> Arrays:
    return prepare_qm9_graphs(str(cache), num_workers=1, max_molecules=FEW)[0]


@pytest.fixture(scope="session")
def molecules() -> Molecules:
    return read_molecules(package_folder(), FEW)


def options(**changes: Any) -> Qm9GraphsOptions:
    return Qm9GraphsOptions(**{"num_validation": 200, "num_test": 300, **changes})


def pieces(arrays: Arrays, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atom features, bonds and bond types of one molecule."""
    starts = {name: int(arrays[name][:row].sum()) for name in ("num_nodes", "num_bonds")}
    atoms, bonds = (slice(start, start + int(arrays[name][row])) for name, start in starts.items())
    return arrays["nodes"][atoms], arrays["bonds"][bonds], arrays["bond_features"][bonds].argmax(axis=1)


# --- the graphs ---------------------------------------------------------------------------------------------------


@needs_data
def test_formaldehyde_and_hydrogen_cyanide_by_hand(few: Arrays, molecules: Molecules) -> None:
    names = list(GEOMETRY_ATOM_FEATURES)
    cyanide, formaldehyde = 4, 5  # C#N and C=O, whose atoms are C, N, H and C, O, H, H
    nodes, bonds, types = pieces(few, cyanide)
    assert bonds.tolist() == [[0, 1], [0, 2]] and [BOND_TYPES[kind] for kind in types] == ["triple", "single"]
    assert nodes[:, names.index("sp")].tolist() == [1, 1, 0]
    nodes, bonds, types = pieces(few, formaldehyde)
    assert bonds.tolist() == [[0, 1], [0, 2], [0, 3]]
    assert [BOND_TYPES[kind] for kind in types] == ["double", "single", "single"]
    # H C N O F, atomic number, aromatic, sp, sp2, sp3, bonded hydrogens
    assert nodes.tolist() == [
        [0, 1, 0, 0, 0, 6, 0, 0, 1, 0, 2],
        [0, 0, 0, 1, 0, 8, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(few["positions"][: molecules.num_atoms[:5].sum()],
                                  molecules[:5].positions.astype(np.float32))  # fmt: skip


@needs_data
def test_every_atom_has_its_valence(few: Arrays) -> None:
    """Charged atoms stand together: their valences differ from the neutral ones by their charges, which sum to 0."""
    orders, usual = np.array([1, 2, 3, 1.5]), {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}
    charged = 0
    for row in range(FEW):
        nodes, bonds, types = pieces(few, row)
        valences = np.zeros(len(nodes))
        for (first, second), kind in zip(bonds, types, strict=True):
            valences[[first, second]] += orders[kind]
        aromatic = nodes[:, GEOMETRY_ATOM_FEATURES.index("aromatic")] == 1
        wanted = np.array([usual[number] for number in nodes[:, 5].tolist()])
        off = (valences - wanted)[~aromatic]  # aromatic: 3 for O, 5 for C=O; InChI says more about those
        charged += bool(off.any())
        assert off.sum() == 0 or aromatic.any()
        assert (np.abs(off) <= 1).all() and (valences[aromatic] >= 3).all() and (valences[aromatic] <= 5).all()
    assert 0 < charged < 0.02 * FEW


#: Ranges in Angstrom that contain the usual lengths and those of strained rings (Allen et al., 1987).
RANGES = {
    ("C", "H"): {"single": (1.05, 1.13)}, ("H", "N"): {"single": (0.99, 1.07)}, ("H", "O"): {"single": (0.94, 1.05)},
    ("C", "C"): {"single": (1.33, 1.70), "double": (1.28, 1.43), "triple": (1.18, 1.26), "aromatic": (1.32, 1.58)},
    ("C", "N"): {"single": (1.28, 1.65), "double": (1.22, 1.42), "triple": (1.14, 1.19), "aromatic": (1.25, 1.50)},
    ("C", "O"): {"single": (1.19, 1.55), "double": (1.16, 1.34), "aromatic": (1.29, 1.53)},
    ("C", "F"): {"single": (1.28, 1.40)},
    ("N", "N"): {"single": (1.28, 1.55), "double": (1.20, 1.35), "aromatic": (1.17, 1.45)},
    ("N", "O"): {"single": (1.20, 1.55), "double": (1.18, 1.28), "aromatic": (1.29, 1.55)},
}  # fmt: skip


@needs_data
def test_bonds_have_the_length_of_their_kind_and_all_other_pairs_are_farther(few: Arrays, molecules: Molecules) -> None:
    lengths = defaultdict(list)
    for row in range(FEW):
        numbers, positions = molecules.atoms(row)
        distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
        _, bonds, types = pieces(few, row)
        for (first, second), kind in zip(bonds, types, strict=True):
            pair = tuple(sorted((SYMBOLS[int(numbers[first])], SYMBOLS[int(numbers[second])])))
            low, high = RANGES[pair][BOND_TYPES[kind]]  # type: ignore[index]
            assert low < distances[first, second] < high, (row, pair, BOND_TYPES[kind], distances[first, second])
            lengths[pair, BOND_TYPES[kind]].append(distances[first, second])
            distances[first, second] = distances[second, first] = np.inf
        heavy = (numbers > 1)[:, None] & (numbers > 1)[None] & ~np.eye(len(numbers), dtype=bool)
        assert distances[heavy].min(initial=np.inf) > 1.7  # across a bicyclopentane; a bond is at most 1.6 here
    means = {key: np.mean(values) for key, values in lengths.items()}
    for pair in (("C", "C"), ("C", "N"), ("C", "O")):
        assert means[pair, "single"] > means[pair, "aromatic"] > means[pair, "double"]


@needs_data
def test_inchi_of_the_graph_is_the_package_s(few: Arrays) -> None:
    """The package's InChI was made from the coordinates by another program; its formula, bonds and hydrogens count."""
    import pandas as pd
    from rdkit import Chem, rdBase

    stated = pd.read_csv(package_folder() / "qm9_part1.csv", usecols=["InChi"], nrows=FEW)["InChi"]
    compared = 0
    with rdBase.BlockLogs():
        for row in np.random.default_rng(0).permutation(FEW)[:400].tolist():
            if "+" in read_smiles_once()[row]:  # its charges are not in the arrays
                continue
            nodes, bonds, types = pieces(few, row)
            molecule = Chem.RWMol()
            for features in nodes.tolist():
                atom = Chem.Atom(features[5])
                atom.SetNoImplicit(True)
                atom.SetIsAromatic(bool(features[6]))
                molecule.AddAtom(atom)
            kinds = Chem.BondType.names
            for (first, second), kind in zip(bonds.tolist(), types.tolist(), strict=True):
                molecule.AddBond(first, second, kinds[BOND_TYPES[kind].upper()])
                molecule.GetBondBetweenAtoms(first, second).SetIsAromatic(BOND_TYPES[kind] == "aromatic")
            Chem.SanitizeMol(molecule)
            layers = [
                [layer for layer in text.split("/") if layer[0] not in "btms"]  # without stereochemistry
                for text in (Chem.MolToInchi(molecule), stated[row])
            ]
            assert layers[0] == layers[1]
            compared += 1
    assert compared > 380


def read_smiles_once(memory: list[list[str]] = []) -> list[str]:  # noqa: B006
    if not memory:
        memory.append(read_smiles(package_folder(), FEW))
    return memory[0]


# --- the cache ----------------------------------------------------------------------------------------------------


@needs_data
def test_what_the_preparation_found_is_kept_with_the_cache(cache: Path, few: Arrays) -> None:
    _, meta = prepare_qm9_graphs(str(cache), max_molecules=FEW)
    counts = meta["counts"]
    assert counts["molecules"] == counts["coordinates and SMILES agree"] == FEW == len(few["index"])
    assert counts["bond orders found from the coordinates alone"] == counts["no bond orders found, all single"] == 0
    assert counts["atoms of unusual valence"] == 0 and counts["bonds"] == len(few["bonds"])
    assert sum(counts[f"{name} bonds"] for name in BOND_TYPES) == counts["bonds"]
    assert 0.97 * FEW < counts["RDKit finds the same bond orders without the SMILES"] < FEW
    assert meta["rdkit"] in next(cache.glob("*/meta.json")).parent.name


@needs_data
def test_the_cache_is_the_same_bytes_with_two_processes_and_is_then_only_read(
    few: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qm9_graphs, "CHUNK", 40)
    for workers in (1, 2):
        prepare_qm9_graphs(str(tmp_path / str(workers)), num_workers=workers, max_molecules=150)
    (one,), (two,) = (list((tmp_path / str(workers)).glob("*/")) for workers in (1, 2))
    files = sorted(path.name for path in one.iterdir())
    assert META in files and len(files) == 10
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    monkeypatch.setattr(qm9_graphs, "read_molecules", lambda *_: pytest.fail("read the files again"))
    arrays, _ = prepare_qm9_graphs(str(tmp_path / "1"), max_molecules=150)
    assert all(isinstance(array, np.memmap) for array in arrays.values())
    for name, array in arrays.items():  # whatever the size of the chunks
        np.testing.assert_array_equal(array, few[name][: len(array)])


# --- tasks --------------------------------------------------------------------------------------------------------


@needs_data
def test_rows_and_labels_are_those_of_the_data_set_qm9(few: Arrays, molecules: Molecules) -> None:
    features = np.zeros((FEW, 1), np.float32)
    columns = Qm9Columns(molecules.index, features, molecules.targets)
    for changes in ({}, {"seed": 3, "num_train": 100}, {"tasks": ("G", "mu")}):
        mine = task_data(few, options(**changes))
        other = descriptor_data(columns, Qm9Options(**{"num_validation": 200, "num_test": 300, **changes}))  # type: ignore[arg-type]
        for part in ("train", "validation", "test"):
            assert torch.equal(getattr(mine, part).labels, getattr(other, part)[:]["labels"])
        for field in ("task_names", "label_names", "metrics", "single_task_base", "task_groups", "trivial_metrics"):
            assert getattr(mine, field) == getattr(other, field)
        assert mine.model_arguments["label_stds"] == other.model_arguments["label_stds"]


@needs_data
def test_a_batch_holds_the_molecules_of_its_labels(few: Arrays, molecules: Molecules) -> None:
    data = task_data(few, options())
    batch = first_batch(data)
    order = np.random.default_rng(0).permutation(FEW)[500:]  # the split as documented: test, validation, training
    assert batch["num_nodes"] == molecules.num_atoms[order[:7]].tolist()
    for place, row in enumerate(order[:7].tolist()):
        numbers, positions = molecules.atoms(row)
        n = len(numbers)
        assert batch["nodes"][place, :n, 5].tolist() == numbers.tolist()
        distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
        np.testing.assert_allclose(batch["edges"][place, :n, :n, 4].numpy(), distances, atol=2e-6)
        assert batch["edge_mask"][place].sum() == n * (n - 1)
        assert batch["edges"][place, ..., :4].sum() == 2 * few["num_bonds"][row]
    means, stds = (np.array(data.model_arguments[f"label_{name}"]) for name in ("means", "stds"))
    np.testing.assert_allclose(
        batch["labels"].numpy() * stds + means, molecules.targets[order[:7]], rtol=1e-4, atol=1e-2
    )


def first_batch(data: TaskData) -> dict[str, Any]:
    return data.train.__getitems__(list(range(7)))[0]  # type: ignore[union-attr]


@needs_data
def test_what_the_data_dictate_to_the_model(few: Arrays) -> None:
    data = task_data(few, options(tasks=("homo",)))
    arguments = dict(data.model_arguments)
    assert (arguments["num_node_features"], arguments["num_edge_features"]) == (11, 5)
    assert len(arguments["node_feature_names"]) == 11
    assert arguments["edge_feature_names"] == ["single", "double", "triple", "aromatic", "distance"]
    assert arguments["task_names"] == ["homo"] and arguments["problem"] == "regression"
    assert len(arguments["label_means"]) == len(arguments["label_stds"]) == 1
    assert first_batch(data)["labels"].shape == (7, 1)


@needs_data
def test_it_loads_by_its_name(cache: Path, few: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepare_qm9_graphs(str(cache), max_molecules=FEW)
    monkeypatch.setattr(qm9_graphs, "prepare_qm9_graphs", lambda *_, **__: found)
    spec = DATA_SETS["qm9_graphs"]
    data = spec.load(spec.options(num_train=10, num_validation=20, num_test=30))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [10, 20, 30]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_workers": 0}, r"data\.num_workers: 0 is not valid, expected 1 or more"),
        ({"seed": -1}, r"data\.seed: -1 is not valid"),
        ({"num_test": 200_000}, r"data\.num_test: 200000 is not valid, expected 1 to 130829"),
        ({"tasks": ["zpev"]}, r'data\.tasks: \'zpev\' is not known \(did you mean "zpve"\?\)'),
        ({"num_worker": 2}, r'data\.num_worker: unknown option, value 2 \(did you mean "num_workers"\?\)'),
    ],
)
def test_wrong_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(Qm9GraphsOptions, values, "data")


@pytest.mark.parametrize("package", ["qm9pack", "rdkit"])
def test_a_missing_package_is_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    find_spec = importlib.util.find_spec
    if package == "rdkit" and find_spec("qm9pack") is None:
        pytest.skip("qm9pack is missed first")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    extra = {"qm9pack": "qm9", "rdkit": "molecules"}[package]
    with pytest.raises(MissingPackageError) as error:
        load_qm9_graphs(options(cache_dir=str(tmp_path)))
    assert str(error.value) == (
        f'data set "qm9_graphs": the package {package} is not installed, '
        f'install it with: pip install "hf-bilb[{extra}]"'
    )

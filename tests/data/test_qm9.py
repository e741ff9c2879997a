"""QM9: the units against published numbers, the features against first principles, the split, and the statistics.

The constants were not computed with this library: methane's row and the means and standard deviations (all 130,831
molecules) are those of QM9 in PyTorch Geometric (columns 0, 1, 2, 3, 5, 6, 12-15, 11; energies in eV).
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_bilb.config.options import parse_options
from hf_bilb.data import DATA_SETS
from hf_bilb.data.molecules.coulomb import coulomb_eigenvalues, coulomb_matrices
from hf_bilb.data.molecules.qm9 import (
    NUM_MOLECULES,
    TARGETS,
    Molecules,
    Qm9Columns,
    Qm9Options,
    load_columns,
    load_qm9,
    package_folder,
    prepare_arrow,
    read_molecules,
    task_data,
)
from hf_bilb.data.task_data import TaskData
from hf_bilb.errors import MissingPackageError, OptionError

needs_qm9pack = pytest.mark.skipif(
    importlib.util.find_spec("qm9pack") is None, reason='needs the data: pip install "hf-bilb[qm9]"'
)
FEW = 3000
ENERGIES = [2, 3, 5, 6, 7, 8, 9]
METHANE = [0.0, 13.21, -10.5499, 3.1865, 35.3641, 1.2177, -17.1722, -17.2868, -17.3897, -16.1519, 6.469]
PYG_MEANS = [2.672952651977539, 75.28118133544922, -6.536452770233154, 0.3220436871051788, 1189.4105224609375,
             4.056937217712402, -76.11600494384766, -76.58049011230469, -77.01825714111328, -70.83665466308594,
             31.620365142822266]  # fmt: skip
PYG_STDS = [1.5034793615341187, 8.17383098602295, 0.5977412462234497, 1.274855375289917, 280.4781494140625,
            0.9017231464385986, 10.323753356933594, 10.415176391601562, 10.489270210266113, 9.498342514038086,
            4.067580699920654]  # fmt: skip


def _in_papers_units(values: list[float]) -> np.ndarray:
    """PyTorch Geometric's eV to the papers' meV."""
    converted = np.array(values)
    converted[ENERGIES] *= 1000
    return converted


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qm9-full")


@pytest.fixture(scope="session")
def full(full_cache: Path) -> Qm9Columns:
    return load_columns(prepare_arrow(cache_dir=str(full_cache)))


@pytest.fixture(scope="session")
def few_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qm9-few")


@pytest.fixture(scope="session")
def few(few_cache: Path) -> Qm9Columns:
    return load_columns(prepare_arrow(cache_dir=str(few_cache), max_molecules=FEW))


@pytest.fixture(scope="session")
def molecules() -> Molecules:
    return read_molecules(package_folder(), max_molecules=FEW)


def _options(**changes: Any) -> Qm9Options:
    return Qm9Options(**{"num_validation": 300, "num_test": 400, **changes})


# --- units and contents -------------------------------------------------------------------------------------------


def test_the_targets_are_the_papers_eleven_in_their_order_and_units() -> None:
    assert [target.name for target in TARGETS] == [
        "mu",
        "alpha",
        "homo",
        "lumo",
        "r2",
        "zpve",
        "U0",
        "U",
        "H",
        "G",
        "Cv",
    ]
    assert [target.unit for target in TARGETS] == ["D", "bohr^3", "meV", "meV", "bohr^2", *["meV"] * 5, "cal/(mol K)"]


@needs_qm9pack
def test_methane_has_its_published_properties(molecules: Molecules) -> None:
    # The published eV values have four decimals, which are 0.1 meV.
    tolerance = np.where(np.isin(np.arange(11), ENERGIES), 0.06, 1e-4)
    assert (np.abs(molecules.targets[0] - _in_papers_units(METHANE)) < tolerance).all()
    numbers, positions = molecules.atoms(0)
    assert numbers.tolist() == [6, 1, 1, 1, 1]
    bonds = np.linalg.norm(positions[1:] - positions[0], axis=1)
    np.testing.assert_allclose(bonds, 1.0919, atol=2e-4)  # C-H in Angstrom, B3LYP/6-31G(2df,p)


@needs_qm9pack
def test_all_molecules_have_the_published_means_and_standard_deviations(full: Qm9Columns) -> None:
    assert full.targets.shape == (NUM_MOLECULES, 11) == (130_831, 11)
    np.testing.assert_allclose(full.targets.mean(axis=0), _in_papers_units(PYG_MEANS), rtol=1e-5)
    np.testing.assert_allclose(full.targets.std(axis=0, ddof=1), _in_papers_units(PYG_STDS), rtol=1e-5)
    assert np.isfinite(full.features).all() and full.features.shape == (NUM_MOLECULES, 34)


@needs_qm9pack
def test_alpha_is_the_mean_of_the_polarizability_tensor() -> None:
    import pandas as pd

    tensor = pd.read_csv(package_folder() / "qm9_polarizability.csv", nrows=FEW)
    isotropic = tensor[["A_xx", "A_yy", "A_zz"]].mean(axis=1).to_numpy()
    # The release gives alpha with two decimals.
    np.testing.assert_allclose(read_molecules(package_folder(), FEW).targets[:, 1], isotropic, atol=0.0055)


@needs_qm9pack
def test_composition_is_what_the_package_says() -> None:
    import pandas as pd

    table = pd.read_csv(package_folder() / "qm9_part1.csv", nrows=FEW)
    stated = np.array([[int(count) for count in text.strip("[]").split(",")] for text in table["Stoichiometry"]])
    np.testing.assert_array_equal(read_molecules(package_folder(), FEW).composition(), stated)


@needs_qm9pack
def test_the_cached_columns_are_those_of_the_molecules(molecules: Molecules, few: Qm9Columns) -> None:
    np.testing.assert_array_equal(few.index, molecules.index)
    np.testing.assert_array_equal(few.targets, molecules.targets)
    np.testing.assert_array_equal(few.features[:, :5], molecules.composition())
    for row in (0, 17, FEW - 1):
        numbers, positions = molecules.atoms(row)
        eigenvalues = np.linalg.eigvalsh(coulomb_matrices(numbers[None], positions[None])[0])
        order = np.argsort(-np.abs(eigenvalues))
        np.testing.assert_allclose(few.features[row, 5 : 5 + len(order)], eigenvalues[order], rtol=1e-5, atol=1e-6)


# --- Coulomb matrix -----------------------------------------------------------------------------------------------


def _random_molecule(num_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(num_atoms)
    return generator.choice([1, 6, 7, 8, 9], num_atoms), generator.normal(size=(num_atoms, 3)) * 2


def _eigenvalues(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return coulomb_eigenvalues(numbers, positions, np.array([len(numbers)]), size=29)[0]


def test_coulomb_matrix_of_two_hydrogens_in_atomic_units() -> None:
    # At one bohr the two protons repel with one Hartree.
    numbers, positions = np.array([1, 1]), np.array([[0.0, 0, 0], [0, 0, 0.529177210903]])
    matrix = coulomb_matrices(numbers[None], positions[None])[0]
    np.testing.assert_allclose(matrix, [[0.5, 1.0], [1.0, 0.5]], rtol=1e-12)
    np.testing.assert_allclose(_eigenvalues(numbers, positions)[:2], [1.5, -0.5])


def test_diagonal_is_half_the_charge_to_the_power_2_4() -> None:
    diagonal = np.diag(coulomb_matrices(np.array([[1, 6, 8]]), np.eye(3)[None])[0])
    np.testing.assert_allclose(diagonal, [0.5, 0.5 * 6**2.4, 0.5 * 8**2.4], rtol=1e-12)


@pytest.mark.parametrize("num_atoms", [2, 9, 29])
def test_eigenvalues_do_not_see_rotation_reflection_or_translation(num_atoms: int) -> None:
    numbers, positions = _random_molecule(num_atoms)
    orthogonal = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    moved = positions @ orthogonal.T + [3.0, -1.0, 0.5]
    np.testing.assert_allclose(_eigenvalues(numbers, moved), _eigenvalues(numbers, positions), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_atoms", [2, 9, 29])
def test_eigenvalues_do_not_see_the_order_of_the_atoms(num_atoms: int) -> None:
    numbers, positions = _random_molecule(num_atoms)
    order = np.random.default_rng(2).permutation(num_atoms)
    np.testing.assert_allclose(
        _eigenvalues(numbers[order], positions[order]), _eigenvalues(numbers, positions), rtol=1e-9, atol=1e-10
    )


def test_eigenvalues_do_see_geometry_and_elements() -> None:
    numbers, positions = _random_molecule(9)
    stretched, other = positions * 1.01, numbers.copy()
    other[0] = 6 if numbers[0] != 6 else 7
    assert np.abs(_eigenvalues(numbers, stretched) - _eigenvalues(numbers, positions)).max() > 1e-3
    assert np.abs(_eigenvalues(other, positions) - _eigenvalues(numbers, positions)).max() > 1


def test_batched_eigenvalues_are_those_of_the_padded_matrices_one_by_one() -> None:
    sizes = [4, 29, 4, 12, 1]
    parts = [_random_molecule(size) for size in sizes]
    batched = coulomb_eigenvalues(
        np.concatenate([numbers for numbers, _ in parts]),
        np.concatenate([positions for _, positions in parts]),
        np.array(sizes),
        size=29,
    )
    for row, (numbers, positions) in enumerate(parts):
        padded = np.zeros((29, 29))
        padded[: len(numbers), : len(numbers)] = coulomb_matrices(numbers[None], positions[None])[0]
        expected = np.linalg.eigvalsh(padded)
        expected = expected[np.argsort(-np.abs(expected), kind="stable")]
        np.testing.assert_allclose(batched[row], expected, rtol=1e-9, atol=1e-9)
        assert (np.diff(np.abs(batched[row])) <= 1e-9).all()


# --- split and statistics -----------------------------------------------------------------------------------------


def _targets_in_units(rows: object, few: Qm9Columns, options: Qm9Options) -> np.ndarray:
    """The labels of a part, back in the papers' units (with the statistics of the training rows, known here)."""
    train = few.targets[_rows_of(few, options)[0]]
    return _column(rows, "labels") * train.std(axis=0) + train.mean(axis=0)


def _rows_of(few: Qm9Columns, options: Qm9Options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The split as documented, written down a second time."""
    order = np.random.default_rng(options.seed).permutation(len(few.targets))
    test, rest = order[: options.num_test], order[options.num_test :]
    validation, train = rest[: options.num_validation], rest[options.num_validation :]
    return train[: options.num_train], validation, test


def _column(rows: object, name: str) -> np.ndarray:
    return np.stack([row[name].numpy() for row in rows]).astype(np.float64)  # type: ignore[attr-defined]


@needs_qm9pack
def test_the_parts_cover_all_rows_once_and_are_shuffled(few: Qm9Columns) -> None:
    data = task_data(few, _options())
    assert [len(data.train), len(data.validation), len(data.test)] == [FEW - 700, 300, 400]
    parts = (data.train, data.validation, data.test)
    values = np.concatenate([_targets_in_units(part, few, _options()) for part in parts])
    np.testing.assert_allclose(np.sort(values[:, 4]), np.sort(few.targets[:, 4]), rtol=1e-4)
    # QM9 is ordered by size: an unshuffled test part would be off by more than a standard deviation.
    assert abs(_column(data.test, "labels").mean(axis=0)).max() < 0.3


@needs_qm9pack
def test_the_split_is_seeded(few: Qm9Columns) -> None:
    first, again, other = (task_data(few, _options(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.train[:]["labels"], again.train[:]["labels"])
    assert not torch.equal(first.train[:]["labels"], other.train[:]["labels"])


@needs_qm9pack
def test_test_and_validation_parts_do_not_depend_on_num_train(few: Qm9Columns) -> None:
    large, small = task_data(few, _options()), task_data(few, _options(num_train=100))
    assert len(small.train) == 100
    for part in ("validation", "test"):
        of_large = _targets_in_units(getattr(large, part), few, _options())
        of_small = _targets_in_units(getattr(small, part), few, _options(num_train=100))
        np.testing.assert_allclose(of_small, of_large, rtol=1e-4, atol=1e-2)


@needs_qm9pack
def test_labels_and_features_are_standardised_by_the_training_part(few: Qm9Columns) -> None:
    data = task_data(few, _options(num_train=1000))
    for name in ("features", "labels"):
        column = _column(data.train, name)
        varies = column.std(axis=0) > 0
        assert varies[:11].all()
        np.testing.assert_allclose(column.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(column.std(axis=0)[varies], 1, rtol=1e-5)
    assert data.train[0]["labels"].dtype == data.train[0]["features"].dtype == torch.float32
    assert data.train[0]["labels"].shape == (11,) and data.train[0]["features"].shape == (34,)


@needs_qm9pack
def test_no_row_of_the_test_or_validation_part_enters_the_statistics(few: Qm9Columns) -> None:
    """Move every held-out row far away: the training part, and so the statistics, stay bit for bit as they were."""
    options = _options(num_train=1000)
    train, _, _ = _rows_of(few, options)
    held_out = np.setdiff1d(np.arange(FEW), train)
    moved = Qm9Columns(few.index, few.features.copy(), few.targets.copy())
    moved.features[held_out] += 1e3
    moved.targets[held_out] *= -50
    before, after = task_data(few, options), task_data(moved, options)
    assert torch.equal(before.train[:]["features"], after.train[:]["features"])
    assert torch.equal(before.train[:]["labels"], after.train[:]["labels"])
    assert not torch.equal(before.test[:]["labels"], after.test[:]["labels"])
    # The converse, so that this test can fail: one training row does enter.
    moved = Qm9Columns(few.index, few.features, few.targets.copy())
    moved.targets[train[0]] += 1e4
    assert not torch.equal(before.train[1:]["labels"], task_data(moved, options).train[1:]["labels"])


@needs_qm9pack
def test_a_constant_feature_becomes_zero_rather_than_nan(few: Qm9Columns) -> None:
    data = task_data(few, _options(num_train=50))
    assert np.isfinite(_column(data.train, "features")).all() and np.isfinite(_column(data.test, "features")).all()


# --- metrics ------------------------------------------------------------------------------------------------------


class _Prediction:
    """What the Trainer hands to compute_metrics, as far as it is read."""

    def __init__(self, predictions: np.ndarray, label_ids: np.ndarray) -> None:
        self.predictions, self.label_ids = predictions, label_ids


@needs_qm9pack
def test_errors_are_in_the_papers_units(few: Qm9Columns) -> None:
    options = _options()
    data = task_data(few, options)
    train, _, test = _rows_of(few, options)
    labels = data.test[:]["labels"].numpy()
    measured = data.compute_metrics(_Prediction(labels + 0.5, labels))  # type: ignore[arg-type]
    of_tasks = data.metrics[:-1]
    assert list(measured) == [*(f"mae_{target.name}" for target in TARGETS), "delta_m"]
    assert list(measured) == [metric.key for metric in data.metrics] == list(data.trivial_metrics)
    np.testing.assert_allclose(list(measured.values())[:-1], 0.5 * few.targets[train].std(axis=0), rtol=1e-5)
    trivial = np.abs(few.targets[test] - few.targets[train].mean(axis=0)).mean(axis=0)
    np.testing.assert_allclose([data.trivial_metrics[metric.key] for metric in of_tasks], trivial, rtol=1e-5)
    assert [(metric.task, metric.unit) for metric in of_tasks] == [(target.name, target.unit) for target in TARGETS]
    assert all(metric.name == "MAE" and not metric.higher_is_better for metric in of_tasks)
    assert (data.metrics[-1].task, data.metrics[-1].unit) == ("", "%") and not data.metrics[-1].higher_is_better


#: Single-task errors, Nash-MTL (ICML 2022), in the order and units of the targets.
PUBLISHED_BASE = {"mu": 0.0671, "alpha": 0.1814, "homo": 60.576, "lumo": 53.915, "r2": 0.5027, "zpve": 4.539,
                  "U0": 58.838, "U": 64.244, "H": 63.852, "G": 66.223, "Cv": 0.07212}  # fmt: skip


@needs_qm9pack
@pytest.mark.parametrize("tasks", [None, ("homo",), ("G", "mu", "U0")])
def test_delta_m_is_the_mean_change_against_the_published_single_task_errors(
    few: Qm9Columns, tasks: tuple[str, ...] | None
) -> None:
    data = task_data(few, _options(tasks=tasks))
    labels = data.test[:]["labels"].numpy()
    measured = data.compute_metrics(_Prediction(labels + np.linspace(0.1, 0.3, labels.shape[1]), labels))  # type: ignore[arg-type]
    names = tasks or tuple(PUBLISHED_BASE)
    assert dict(data.single_task_base) == {f"mae_{name}": PUBLISHED_BASE[name] for name in names}
    changes = [measured[f"mae_{name}"] / PUBLISHED_BASE[name] - 1 for name in names]
    assert measured["delta_m"] == pytest.approx(100 * sum(changes) / len(changes), rel=1e-9)
    assert dict(data.task_groups) == {name: "energy" for name in names if name in ("U0", "U", "H", "G")}
    assert "Nash-MTL" in data.single_task_source


@needs_qm9pack
def test_a_choice_of_tasks_reorders_labels_metrics_and_what_the_model_gets(few: Qm9Columns) -> None:
    every, some = task_data(few, _options()), task_data(few, _options(tasks=("G", "mu", "U0")))
    columns = [9, 0, 6]
    assert some.task_names == ("G", "mu", "U0")
    assert torch.equal(some.train[:]["labels"], every.train[:]["labels"][:, columns])
    assert torch.equal(some.train[:]["features"], every.train[:]["features"])
    assert [metric.key for metric in some.metrics] == ["mae_G", "mae_mu", "mae_U0", "delta_m"]
    for name in ("label_means", "label_stds", "task_names"):
        assert some.model_arguments[name] == [every.model_arguments[name][column] for column in columns]
    assert {key: some.trivial_metrics[key] for key in ("mae_G", "mae_mu")} == {
        key: every.trivial_metrics[key] for key in ("mae_G", "mae_mu")
    }


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["hommo"], r"data\.tasks: 'hommo' is not known \(did you mean \"homo\"\?\)"),
        (["U", "U"], r"data\.tasks: 'U' stands twice"),
        ([], r"data\.tasks: is empty"),
    ],
)
def test_tasks_that_are_none_are_named(tasks: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(Qm9Options, {"tasks": tasks}, "data")


@needs_qm9pack
def test_what_the_data_dictate_to_the_model(few: Qm9Columns) -> None:
    data = task_data(few, _options())
    arguments = dict(data.model_arguments)
    assert arguments.pop("num_features") == 34
    assert arguments.pop("task_names") == [target.name for target in TARGETS]
    train, _, _ = _rows_of(few, _options())
    for name, column in (("feature", few.features), ("label", few.targets)):
        np.testing.assert_allclose(arguments.pop(f"{name}_means"), column[train].mean(axis=0, dtype=np.float64))
        assert len(arguments.pop(f"{name}_stds")) == column.shape[1]
    assert not arguments
    assert data.task_names == tuple(target.name for target in TARGETS) and data.label_names == ("labels",)


# --- serving ------------------------------------------------------------------------------------------------------


def _loader(data: TaskData, **arguments: object) -> DataLoader:  # type: ignore[type-arg]
    return DataLoader(data.train, batch_size=64, collate_fn=data.data_collator, **arguments)  # type: ignore[arg-type]


@needs_qm9pack
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_serves_every_row_once_in_the_sampler_s_order(few: Qm9Columns, workers: int) -> None:
    data = task_data(few, _options(num_train=200))
    order = torch.randperm(200).tolist()
    batches = list(_loader(data, sampler=order, num_workers=workers))
    assert [tuple(batch["labels"].shape) for batch in batches] == [(64, 11)] * 3 + [(8, 11)]
    for name in ("features", "labels"):
        served = torch.cat([batch[name] for batch in batches])
        assert torch.equal(served, torch.stack([data.train[row][name] for row in order]))


@needs_qm9pack
def test_the_collator_takes_single_rows_as_well(few: Qm9Columns) -> None:
    data = task_data(few, _options(num_train=200))
    assert data.data_collator is not None
    batch = data.data_collator([data.train[3], data.train[5]])
    assert torch.equal(batch["features"], data.train[[3, 5]]["features"])


@needs_qm9pack
def test_the_trainer_s_column_remover_leaves_the_rows_alone(few: Qm9Columns) -> None:
    from transformers.trainer_utils import RemoveColumnsCollator

    data = task_data(few, _options(num_train=200))
    collator = RemoveColumnsCollator(data.data_collator, ["features", "labels", "label"])
    batch = next(iter(DataLoader(data.train, batch_size=64, collate_fn=collator)))
    assert {name: tuple(column.shape) for name, column in batch.items()} == {"features": (64, 34), "labels": (64, 11)}


@needs_qm9pack
def test_a_batch_is_served_at_once_without_work_per_example(few: Qm9Columns) -> None:
    """2 million rows a second instead of 150 thousand (a dict per row); counted, because a time would be flaky."""
    rows = task_data(few, _options(num_train=200)).train
    (batch,) = rows.__getitems__([5, 3, 5])  # type: ignore[union-attr]
    assert torch.equal(batch["labels"], rows[[5, 3, 5]]["labels"]) and batch["features"].shape == (3, 34)


# --- cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Molecules:
        raise AssertionError("the CSV files were read again")

    monkeypatch.setattr("hf_bilb.data.molecules.qm9.read_molecules", fail)


@needs_qm9pack
@pytest.mark.usefixtures("_no_reading")
def test_the_second_load_comes_from_arrow(few: Qm9Columns, few_cache: Path) -> None:
    start = time.perf_counter()
    again = load_columns(prepare_arrow(cache_dir=str(few_cache), max_molecules=FEW))
    assert time.perf_counter() - start < 5
    np.testing.assert_array_equal(again.features, few.features)
    np.testing.assert_array_equal(again.targets, few.targets)


@needs_qm9pack
@pytest.mark.usefixtures("full", "_no_reading")
@pytest.mark.parametrize("seed", [0, 1])
def test_any_seed_and_split_come_from_the_same_cache(full_cache: Path, seed: int) -> None:
    data = load_qm9(Qm9Options(cache_dir=str(full_cache), num_train=2000, seed=seed))
    assert [len(data.train), len(data.validation), len(data.test)] == [2000, 10_000, 10_000]
    assert 1100 < data.trivial_metrics["mae_mu"] * 1000 < 1250


@needs_qm9pack
def test_an_interrupted_preparation_leaves_nothing_that_a_later_one_trips_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: Qm9Columns
) -> None:
    calls = []

    def interrupted(*arguments: object, **keywords: object) -> np.ndarray:
        calls.append(1)
        if len(calls) == 2:  # after the first rows were handed to the writer
            raise KeyboardInterrupt
        return coulomb_eigenvalues(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr("hf_bilb.data.molecules.qm9.CHUNK", 1000)
    monkeypatch.setattr("hf_bilb.data.molecules.qm9.coulomb_eigenvalues", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_arrow(cache_dir=str(tmp_path), max_molecules=FEW)
    monkeypatch.undo()
    repaired = load_columns(prepare_arrow(cache_dir=str(tmp_path), max_molecules=FEW))
    np.testing.assert_array_equal(repaired.targets, few.targets)


# --- errors -------------------------------------------------------------------------------------------------------


def test_too_many_training_molecules_is_one_line_with_the_maximum() -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(Qm9Options, {"num_train": 120_000}, "data")
    assert str(caught.value) == "data.num_train: 120000 is not valid, expected 1 to 110831 or null (all the rest)"
    assert parse_options(Qm9Options, {"num_train": 110_831}, "data").num_train == 110_831


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_train": 0}, "data.num_train: 0 is not valid"),
        ({"num_test": 0}, "data.num_test: 0 is not valid"),
        ({"num_validation": 125_000}, "data.num_validation: 125000 is not valid"),
        ({"num_test": 130_831}, "data.num_test: 130831 is not valid"),
        ({"seed": -1}, "data.seed: -1 is not valid"),
        ({"num_trian": 5}, 'data.num_trian: unknown option, value 5 (did you mean "num_train"?)'),
    ],
)
def test_bad_options_name_the_key_and_the_value(values: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(Qm9Options, values, "data")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "qm9pack", None)
    with pytest.raises(MissingPackageError) as caught:
        load_qm9(Qm9Options(cache_dir=str(tmp_path)))
    assert 'pip install "hf-bilb[qm9]"' in str(caught.value) and "\n" not in str(caught.value)


def test_the_data_set_is_registered() -> None:
    assert DATA_SETS["qm9"].options is Qm9Options and DATA_SETS["qm9"].load is load_qm9

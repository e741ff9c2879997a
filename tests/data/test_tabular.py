"""Adult, census income and SARCOS: made-up files in their layouts; what becomes a feature; errors in one line."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_bilb.config.options import parse_options
from hf_bilb.data import DATA_SETS, TaskData
from hf_bilb.data.splits import split_rows
from hf_bilb.data.tables import adult as adult_module
from hf_bilb.data.tables import census as census_module
from hf_bilb.data.tables.adult import AdultOptions, load_adult
from hf_bilb.data.tables.binary import Layout, binary_metrics
from hf_bilb.data.tables.census import CensusOptions, load_census
from hf_bilb.data.tables.one_hot import OneHotRows
from hf_bilb.data.tables.sarcos import SarcosOptions, load_sarcos
from hf_bilb.errors import OptionError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
STATES = ("Never-married", "Married-civ-spouse", "Divorced", "Separated")


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (REAL / name).exists(), reason=f"needs ../shared/data/{name}")


# --- made-up files ------------------------------------------------------------------------------------------------


def adult_lines(count: int, seed: int, stop: str = "") -> list[list[str]]:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        age = int(generator.integers(18, 80))
        work = ("Private", "State-gov", "?")[generator.integers(3)]
        income = ("<=50K", ">50K")[int(age > 50)] + stop
        rows.append(
            [str(age), work, "77516", "Bachelors", str(generator.integers(1, 17)), STATES[generator.integers(4)],
             "Sales", "Husband", "White", "Male", "0", "0", "40", "United-States", income]
        )  # fmt: skip
    return rows


def write(
    path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, separator: str = ", "
) -> Path:
    lines = [separator.join(row) for row in ([header] if header else []) + list(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def adult(tmp_path: Path) -> Path:
    """The two files as UCI has them: no header, a remark on top of the test file and a stop after its classes."""
    write(tmp_path / "adult.data", adult_lines(60, seed=0))
    write(tmp_path / "adult.test", [["|1x3 Cross validator"], *adult_lines(20, seed=1, stop=".")])
    return tmp_path


def census_lines(count: int, layout: Layout = census_module.LAYOUT) -> list[list[str]]:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        row = {name: ("a ", "b", "Not in universe")[generator.integers(3)] for name in layout.columns}
        row |= {name: str(generator.integers(0, 90)) for name in layout.numbers}
        row["instance_weight"] = "1700.09"
        for task in layout.tasks.values():
            row[task.column] = generator.choice(sorted(task.positive + task.negative))
        rows.append([row[name] for name in layout.columns])
    return rows


@pytest.fixture
def census(tmp_path: Path) -> Path:
    return write(tmp_path / "census.csv", census_lines(100), census_module.LAYOUT.columns, separator=",")


def sarcos_table(count: int = 100) -> np.ndarray:
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(count, 21)) * 3 + 1
    return np.concatenate([inputs, inputs @ generator.normal(size=(21, 7)) * 10 + 5], axis=1).astype(np.float32)


@pytest.fixture
def sarcos(tmp_path: Path) -> Path:
    np.savez(tmp_path / "sarcos.npz", data=sarcos_table())
    return tmp_path / "sarcos.npz"


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def everything(data: TaskData, part: str) -> dict[str, torch.Tensor]:
    return getattr(data, part)[:]


# --- what comes out -----------------------------------------------------------------------------------------------


def test_adult_against_a_plain_reading(adult: Path) -> None:
    data = load_adult(AdultOptions(str(adult), validation_fraction=0.25))
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 15, 20)
    assert data.task_names == ("income", "never_married")
    names = data.model_arguments["feature_names"]
    assert data.model_arguments["num_features"] == len(names) == data.train[0]["features"].shape[0]
    test = everything(data, "test")
    lines = adult_lines(20, seed=1)
    assert test["labels"][:, 0].tolist() == [float(row[14] == ">50K") for row in lines]
    assert test["labels"][:, 1].tolist() == [float(row[5] == "Never-married") for row in lines]
    for value in ("Private", "State-gov", "?"):
        column = test["features"][:, names.index(f"workclass={value}")]
        assert column.tolist() == [float(row[1] == value) for row in lines]
    # Numbers: by the training rows, and nothing else.
    of_train = everything(data, "train")["features"][:, names.index("age")]
    assert float(of_train.mean()) == pytest.approx(0, abs=1e-6)
    assert float(of_train.std(correction=0)) == pytest.approx(1, rel=1e-5)
    mean, std = (data.model_arguments[f"feature_{kind}s"][names.index("age")] for kind in ("mean", "std"))
    ages = (test["features"][:, names.index("age")] * std + mean).tolist()
    assert ages == pytest.approx([float(row[0]) for row in lines], rel=1e-5)


def test_categories_are_those_of_the_training_rows(adult: Path) -> None:
    rows = adult_lines(20, seed=1)
    rows[3][1] = "Without-pay"
    write(adult / "adult.test", rows)
    data = load_adult(AdultOptions(str(adult)))
    names = data.model_arguments["feature_names"]
    assert "workclass=Without-pay" not in names
    of_work = [i for i, name in enumerate(names) if name.startswith("workclass=")]
    found = everything(data, "test")["features"][:, of_work].sum(dim=1)
    assert found.tolist() == [float(i != 3) for i in range(20)]


@pytest.mark.parametrize("tasks", [None, ("income",), ("never_married",), ("never_married", "income")])
def test_no_task_leaks_into_the_features_whichever_are_chosen(adult: Path, tasks: tuple[str, ...] | None) -> None:
    data = load_adult(AdultOptions(str(adult), tasks=tasks))
    names = {name.split("=")[0] for name in data.model_arguments["feature_names"]}
    assert names == set(adult_module.LAYOUT.columns) - {"fnlwgt", "marital-status", "classification"}
    assert data.task_names == (tasks or ("income", "never_married"))
    assert data.model_arguments["task_names"] == list(data.task_names)
    labels = everything(data, "test")["labels"]
    both = everything(load_adult(AdultOptions(str(adult))), "test")["labels"]
    assert torch.equal(labels, both[:, [("income", "never_married").index(name) for name in data.task_names]])
    assert {metric.task for metric in data.metrics} == {*data.task_names, ""}
    assert set(data.trivial_metrics) == {metric.key for metric in data.metrics}


def test_census_has_no_weight_and_no_task_among_its_features(census: Path) -> None:
    data = load_census(CensusOptions(str(census), tasks=("college", "income")))
    names = {name.split("=")[0] for name in data.model_arguments["feature_names"]}
    assert names == set(census_module.LAYOUT.columns) - {
        "instance_weight", "income_50k", "marital_stat", "education",
    }  # fmt: skip
    assert len(names) == 38 and (len(data.train), len(data.validation), len(data.test)) == (70, 10, 20)
    assert "race=a" in data.model_arguments["feature_names"]  # the file has "a "
    whole = load_census(CensusOptions(str(census)))
    assert whole.task_names == ("income", "never_married", "college")
    assert torch.equal(everything(data, "train")["labels"], everything(whole, "train")["labels"][:, [2, 0]])
    assert torch.equal(everything(data, "train")["features"], everything(whole, "train")["features"])


def test_a_header_a_packed_file_and_neither_are_the_same(adult: Path, census: Path, tmp_path: Path) -> None:
    plain = load_adult(AdultOptions(str(adult)))
    other = tmp_path / "unpacked"
    other.mkdir()
    write(other / "adult_train.csv", adult_lines(60, seed=0), adult_module.LAYOUT.columns)
    shuffled = [list(reversed(row)) for row in adult_lines(20, seed=1)]  # a header says where a column stands
    write(other / "adult_test.csv", shuffled, list(reversed(adult_module.LAYOUT.columns)))
    text = (other / "adult_test.csv").read_bytes()
    (other / "adult_test.csv").unlink()
    (other / "adult_test.csv.xz").write_bytes(lzma.compress(text))
    again = load_adult(AdultOptions(str(other)))
    for part in ("train", "validation", "test"):
        for name, column in everything(plain, part).items():
            assert torch.equal(column, everything(again, part)[name])
    without = write(tmp_path / "plain.csv", census_lines(100), separator=", ")
    for name, column in everything(load_census(CensusOptions(str(without))), "test").items():
        assert torch.equal(column, everything(load_census(CensusOptions(str(census))), "test")[name])


def test_an_empty_cell_is_a_category_and_codes_are_sorted_as_text(tmp_path: Path) -> None:
    lines = census_lines(100)
    race, industry = (census_module.LAYOUT.columns.index(name) for name in ("race", "det_ind_code"))
    for number, line in enumerate(lines):
        line[race], line[industry] = ("", "White")[number % 2], ("2", "10", "1")[number % 3]
    data = load_census(CensusOptions(str(write(tmp_path / "census.csv", lines, separator=","))))
    names = data.model_arguments["feature_names"]
    assert [name for name in names if name.split("=")[0] == "race"] == ["race=", "race=White"]
    of_industry = [name.split("=")[1] for name in names if name.split("=")[0] == "det_ind_code"]
    assert of_industry == ["1", "10", "2"]
    column = everything(data, "train")["features"][:, names.index("race=")]
    split = split_rows(100, 0, None, 10, 20)
    assert column.tolist() == [float(row % 2 == 0) for row in split.train]


def test_the_split_follows_the_seed_alone(census: Path) -> None:
    options = CensusOptions(str(census))
    first, again = (everything(load_census(options), "train") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = everything(load_census(replace(options, seed=1)), "train")
    assert not torch.equal(first["labels"], other["labels"])


def test_a_category_that_only_other_rows_have_is_all_zeros() -> None:
    numbers, codes = torch.tensor([[0.5], [1.5], [2.5]]), torch.tensor([[0, 2], [1, -1], [-1, 0]], dtype=torch.int16)
    rows = OneHotRows(numbers, codes, [2, 3], torch.zeros(3, 1))
    expected = torch.tensor([[0.5, 1, 0, 0, 0, 1], [1.5, 0, 1, 0, 0, 0], [2.5, 0, 0, 1, 0, 0]])
    assert torch.equal(rows[:]["features"], expected)
    assert torch.equal(rows[1]["features"], expected[1]) and torch.equal(rows[[2, 0]]["features"], expected[[2, 0]])


@pytest.mark.parametrize("name", ["adult", "sarcos"])
def test_batches_of_a_loader(name: str, request: pytest.FixtureRequest) -> None:
    where = {"adult": "folder", "sarcos": "file"}[name]
    spec = DATA_SETS[name]
    data = spec.load(parse_options(spec.options, {where: str(request.getfixturevalue(name))}, "data"))
    loader = DataLoader(data.train, batch_size=8, collate_fn=data.data_collator)
    batches = list(loader)
    assert {key: value.dtype for key, value in batches[0].items()} == {
        "features": torch.float32,
        "labels": torch.float32,
    }
    assert torch.equal(torch.cat([batch["features"] for batch in batches]), everything(data, "train")["features"])
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), everything(data, "train")["labels"])


def test_sarcos_is_standardised_by_its_training_rows(sarcos: Path) -> None:
    data = load_sarcos(SarcosOptions(str(sarcos), tasks=("joint_7", "joint_2")))
    assert (len(data.train), len(data.validation), len(data.test)) == (70, 10, 20)
    means, stds = (np.array(data.model_arguments[f"label_{kind}s"]) for kind in ("mean", "std"))
    table = sarcos_table()
    units = [everything(data, part)["labels"].double().numpy() * stds + means for part in ("train", "test")]
    assert everything(data, "train")["labels"].mean(0).numpy() == pytest.approx(np.zeros(2), abs=1e-6)
    known = {tuple(row) for row in np.round(table[:, [27, 22]].astype(np.float64), 2)}
    assert {tuple(row) for row in np.round(np.concatenate(units), 2)} <= known
    assert [metric.key for metric in data.metrics] == ["nmse_joint_7", "nmse_joint_2"]


# --- metrics and losses -------------------------------------------------------------------------------------------


def test_metrics_of_binary_tasks_against_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")
    generator = np.random.default_rng(0)
    labels = (generator.random((300, 2)) < (0.3, 0.6)).astype(np.float32)
    logits = (generator.normal(size=(300, 2)) + labels).astype(np.float32)
    found = binary_metrics(logits, labels, ("a", "b"))
    for column, name in enumerate("ab"):
        actual, scores = labels[:, column].astype(float), logits[:, column].astype(float)
        area = sklearn.roc_auc_score(actual, scores)
        assert found[f"{name}_roc_auc"] == pytest.approx(area, rel=1e-12)
        assert found[f"{name}_accuracy"] == sklearn.accuracy_score(actual, scores > 0)
        entropy = sklearn.log_loss(actual, 1 / (1 + np.exp(-scores)))
        of_share = sklearn.log_loss(actual, np.full(300, actual.mean()))
        assert found[f"{name}_normalized_entropy"] == pytest.approx(entropy / of_share, rel=1e-10)
    assert found["mean_roc_auc"] == pytest.approx((found["a_roc_auc"] + found["b_roc_auc"]) / 2, rel=1e-14)
    one_class = binary_metrics(logits, np.stack([labels[:, 0], np.ones(300)], axis=1), ("a", "b"))
    assert "b_roc_auc" not in one_class and one_class["mean_roc_auc"] == one_class["a_roc_auc"]


def test_the_trivial_predictor_knows_the_training_share(adult: Path) -> None:
    data = load_adult(AdultOptions(str(adult)))
    share = everything(data, "train")["labels"].double().mean(0).numpy()
    actual = everything(data, "test")["labels"].double().numpy()
    for column, name in enumerate(data.task_names):
        q, p = actual[:, column].mean(), share[column]
        entropy = -(q * np.log(p) + (1 - q) * np.log(1 - p)) / -(q * np.log(q) + (1 - q) * np.log(1 - q))
        assert data.trivial_metrics[f"{name}_normalized_entropy"] == pytest.approx(entropy, rel=1e-6)
        assert data.trivial_metrics[f"{name}_roc_auc"] == 0.5
        assert data.trivial_metrics[f"{name}_accuracy"] == pytest.approx(
            max(q, 1 - q) if (q > 0.5) == (p > 0.5) else min(q, 1 - q)
        )
    metrics = data.compute_metrics(SimpleNamespace(predictions=actual * 2 - 1, label_ids=actual))  # type: ignore[arg-type]
    assert list(metrics) == [metric.key for metric in data.metrics]
    assert metrics["income_roc_auc"] == metrics["never_married_accuracy"] == 1.0


def test_nmse_of_sarcos_is_one_minus_r_squared(sarcos: Path) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")
    data = load_sarcos(SarcosOptions(str(sarcos)))
    labels = everything(data, "test")["labels"].numpy()
    predictions = labels + np.random.default_rng(0).normal(size=labels.shape) * 0.3
    found = data.compute_metrics(SimpleNamespace(predictions=predictions, label_ids=labels))  # type: ignore[arg-type]
    expected = 1 - sklearn.r2_score(labels.astype(float), predictions, multioutput="raw_values")
    assert list(found.values()) == pytest.approx(expected, rel=1e-10)
    assert list(found) == [metric.key for metric in data.metrics] == list(data.trivial_metrics)
    assert all(value >= 1 for value in data.trivial_metrics.values())


def test_losses_are_those_of_torch(adult: Path, sarcos: Path) -> None:
    functional = torch.nn.functional
    cases = (
        (load_adult(AdultOptions(str(adult))), functional.binary_cross_entropy_with_logits),
        (load_sarcos(SarcosOptions(str(sarcos))), functional.mse_loss),
    )
    for data, reference in cases:
        batch = everything(data, "train")
        logits = torch.randn(batch["labels"].shape, generator=torch.Generator().manual_seed(0))
        losses, num_items = data.task_loss_func({"logits": logits}, batch)
        expected = reference(logits, batch["labels"], reduction="none").mean(0)
        assert torch.allclose(losses, expected, rtol=1e-6) and num_items.tolist() == [len(logits)] * logits.shape[1]


# --- errors -------------------------------------------------------------------------------------------------------


def damaged(path: Path, row: int, column: int, value: str | None) -> None:
    """Change one field of a file, or with None cut the row off there; row 0 is the first line."""
    lines = [line.split(", ") for line in path.read_text(encoding="utf-8").splitlines()]
    lines[row] = lines[row][:column] if value is None else [*lines[row][:column], value, *lines[row][column + 1 :]]
    write(path, lines)


@pytest.mark.parametrize(
    ("file", "row", "column", "value", "message"),
    [
        (
            "adult.data",
            4,
            14,
            "50K",
            "adult.data, row 5: column 'classification' is '50K', which is no class of the task 'income' (did you mean",
        ),
        (
            "adult.test",
            3,
            5,
            "Single",
            "row 3: column 'marital-status' is 'Single', which is no class of the task 'nev",
        ),
        (
            "adult.test",
            3,
            5,
            "",
            "row 3: column 'marital-status' is empty, expected a label of the task 'never_married'",
        ),
        ("adult.data", 9, 0, "old", "adult.data, row 10: column 'age' is 'old', expected a number"),
        ("adult.data", 9, 0, "inf", "adult.data, row 10: column 'age' is infinite, expected a finite number"),
        ("adult.data", 9, 0, "", "adult.data, row 10: column 'age' is empty, expected a number"),
        (
            "adult.data",
            7,
            13,
            None,
            "adult.data, row 8: has 13 cells, expected 15, one for each column",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(
    adult: Path, file: str, row: int, column: int, value: str | None, message: str
) -> None:
    damaged(adult / file, row, column, value)
    with pytest.raises(OptionError) as raised:
        load_adult(AdultOptions(str(adult)))
    assert message in one_line(raised)


def test_a_column_that_is_not_there(adult: Path) -> None:
    header = ["age", "workclas", *adult_module.LAYOUT.columns[2:]]
    write(adult / "adult.data", adult_lines(60, seed=0), header)
    with pytest.raises(OptionError) as raised:
        load_adult(AdultOptions(str(adult)))
    assert "adult.data has no column 'workclass' (did you mean \"workclas\"?)" in one_line(raised)


def test_a_row_with_too_many_fields(adult: Path) -> None:
    rows = adult_lines(60, seed=0)
    write(adult / "adult.data", [*rows, [*rows[0], "more"]])
    with pytest.raises(OptionError) as raised:
        load_adult(AdultOptions(str(adult)))
    assert "adult.data cannot be read" in one_line(raised) and "61" in one_line(raised)


def test_folders_and_files_that_are_not_there(adult: Path, tmp_path: Path) -> None:
    (adult / "adult.test").unlink()
    (tmp_path / "broken.csv.xz").write_bytes(b"nothing packed")
    (tmp_path / "empty.csv").write_text("")
    for load, message in (
        (lambda: load_adult(AdultOptions("nowhere")), "data.folder: there is no folder 'nowhere'"),
        (
            lambda: load_adult(AdultOptions(str(adult))),
            "has no file adult.test or adult_test.csv (as it is, .xz or .gz)",
        ),
        (lambda: load_census(CensusOptions("no.csv")), "data.file: there is no file 'no.csv'"),
        (lambda: load_census(CensusOptions(str(tmp_path / "broken.csv.xz"))), "broken.csv.xz cannot be read"),
        (lambda: load_census(CensusOptions(str(tmp_path / "empty.csv"))), "empty.csv has no rows"),
        (lambda: load_sarcos(SarcosOptions("no.npz")), "data.file: there is no file 'no.npz'"),
        (lambda: load_sarcos(SarcosOptions(str(tmp_path / "empty.csv"))), "empty.csv cannot be read"),
    ):
        with pytest.raises(OptionError) as raised:
            load()
        assert message in one_line(raised)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ({"data": np.zeros((5, 27))}, "array 'data': got shape (5, 27), expected [N, 28]"),
        ({"other": np.zeros((5, 28))}, "array 'data': got none, expected [N, 28]"),
        ({"data": np.where(np.eye(28)[24] > 0, np.nan, np.ones((5, 28)))}, "row 1: task 'joint_4' is nan, expected a"),
        ({"data": np.where(np.eye(28)[2] > 0, np.inf, np.ones((5, 28)))}, "row 1: input 3 is inf, expected a finite"),
        ({"data": np.ones((2, 28))}, "has 2 rows, too few to split"),
    ],
)
def test_an_array_that_does_not_fit(tmp_path: Path, array: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **array)
    with pytest.raises(OptionError) as raised:
        load_sarcos(SarcosOptions(str(tmp_path / "x.npz")))
    assert message in one_line(raised)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adult", {"folder": "x", "tasks": ["incme"]}, "data.tasks: 'incme' is not known (did you mean \"income\"?)"),
        ("adult", {"folder": "x", "tasks": []}, "data.tasks: is empty"),
        (
            "adult",
            {"folder": "x", "validation_fraction": 1.0},
            "data.validation_fraction: 1.0 is not valid, expected a",
        ),
        ("adult", {"folder": "x", "seed": -1}, "data.seed: -1 is not valid, expected 0 or more"),
        ("adult", {}, "data.folder: is required"),
        ("census_income", {"file": "x", "tasks": ["income", "income"]}, "data.tasks: 'income' stands twice"),
        ("census_income", {"file": "x", "test_fraction": 0.95}, "leave no training rows"),
        ("sarcos", {"file": "x", "tasks": ["joint_8"]}, "data.tasks: 'joint_8' is not known (did you mean"),
        ("sarcos", {"file": "x", "test_fraction": 0}, "data.test_fraction: 0.0 is not valid"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse_options(DATA_SETS[name].options, options, "data")
    assert message in one_line(raised)


# --- the real files -----------------------------------------------------------------------------------------------


def count_ending(path: Path, *ends: str) -> int:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return sum(line.rstrip().endswith(ends) for line in file)


def count_holding(path: Path, text: str) -> int:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return sum(text in line for line in file)


@pytest.mark.data
@needs("adult/adult.data.xz")
def test_the_real_adult() -> None:
    data = load_adult(AdultOptions(str(REAL / "adult")))
    assert (len(data.train), len(data.validation), len(data.test)) == (29_305, 3_256, 16_281)
    found = everything(data, "test")["labels"].sum(0).tolist()
    test = REAL / "adult" / "adult.test.xz"
    assert found == [count_ending(test, ">50K"), count_holding(test, " Never-married,")]


@pytest.mark.data
@needs("census_income_kdd/census_income.csv.xz")
def test_the_real_census() -> None:
    path = REAL / "census_income_kdd" / "census_income.csv.xz"
    data = load_census(CensusOptions(str(path), tasks=("income", "never_married")))
    assert (len(data.train), len(data.validation), len(data.test)) == (55_867, 7_981, 15_962)
    found = sum(everything(data, part)["labels"].sum(0) for part in ("train", "validation", "test"))
    assert found.tolist() == [count_ending(path, ",50000+."), count_holding(path, ",Never married,")]


@pytest.mark.data
@needs("sarcos/sarcos.npz")
def test_linear_regression_on_the_real_sarcos() -> None:
    # The literature's 0.075 for joint 1 (Rasmussen and Williams, table 8.1) is on the official split.
    data = load_sarcos(SarcosOptions(str(REAL / "sarcos" / "sarcos.npz"), tasks=("joint_1",)))
    assert (len(data.train), len(data.validation), len(data.test)) == (2_492, 356, 712)
    train, test = (everything(data, part) for part in ("train", "test"))
    weights = torch.linalg.lstsq(train["features"].double(), train["labels"].double()).solution
    predictions = (test["features"].double() @ weights).numpy()
    found = data.compute_metrics(SimpleNamespace(predictions=predictions, label_ids=test["labels"].numpy()))  # type: ignore[arg-type]
    assert 0.06 < found["nmse_joint_1"] < 0.1

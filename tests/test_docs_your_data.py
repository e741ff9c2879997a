"""docs/your_data.md and docs/your_model.md from the first to the last command, in a folder of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_bilb.config.yaml import load_yaml
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.by_type import METRICS, default_metrics, fitting_metrics
from hf_bilb.reporting.results import read_results
from tests.data.own.tables import load, three_parts

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def run(folder: Path, command: str, *more: str) -> str:
    program, *arguments = shlex.split(command)
    assert program == "hf-bilb"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_bilb", *arguments, *more],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of_a_run() -> set[str]:
    """What docs/recipes.md says that a run leaves."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = page.partition("## What a run leaves")[2].partition("\n\n##")[0]
    return {name for row in re.findall(r"^\| (`.+?) \|", table, flags=re.M) for name in re.findall(r"`([^`]+)`", row)}


@pytest.fixture(scope="module")
def flats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flats")
    (script,) = blocks("your_data.md", "python")
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    return folder


@pytest.mark.slow
def test_from_a_csv_file_to_a_table_of_results(flats: Path) -> None:
    commands = [line for block in blocks("your_data.md", "sh") for line in block.splitlines()]
    assert [shlex.split(command)[1] for command in commands] == ["init", "train", "compare", "predict", "evaluate"]
    init, train, compare, predict, evaluate = commands
    assert "flats.yaml" in run(flats, init)
    printed = run(flats, train)
    results = read_results(flats / "runs" / "flats")
    for metric in results.metrics[:1]:
        assert metric.value < metric.trivial
    for task in ("price", "days_on_market", "sold"):
        assert re.search(rf"^{task} +(MAE|accuracy)", printed, flags=re.M)
    left = {re.sub(r"-\d+$", "-N/", path.name) for path in (flats / "runs" / "flats").iterdir()}
    assert left == files_of_a_run() - {"levels.png", "gradient_conflicts.png", "gradients.jsonl"}
    run(flats, predict)
    header, first, *_ = (flats / "predicted.csv").read_text(encoding="utf-8").splitlines()
    assert header.startswith("address,area") and "High Street" in first
    measured = run(flats, evaluate)
    assert all(task in measured for task in ("price", "days_on_market", "sold"))
    # As on the page, but for one seed and fewer epochs.
    said = run(flats, compare.replace("--seeds 0,1", "--seeds 0"), "trainer.num_train_epochs=1")
    assert "bilb" in said and "ls" in said


def test_the_file_of_a_spreadsheet_is_read_as_the_page_says(tmp_path: Path) -> None:
    (text,) = (block for block in blocks("your_data.md", "text") if ";" in block)
    (printed,) = (block for block in blocks("your_data.md", "yaml") if "decimal:" in block)
    options = load_yaml(printed, "page")["data"]
    del options["name"], options["files"]
    (tmp_path / "flats.csv").write_text(text, encoding=options["csv"]["encoding"])
    data = load(files=three_parts(str(tmp_path / "flats.csv")), **options)
    found = np.array([row["labels"].tolist() for row in data.test])
    price, features = data.model_arguments["tasks"].values()
    assert (price.means, price.stds, features.names) == ((219750.0,), (62250.0,), ("Balkon", "Keller"))
    assert np.array_equal(found, [[-1, 1, 1], [1, 0, 0], [np.nan, 1, 0]], equal_nan=True)
    numeric = np.array([row["numeric"].tolist() for row in data.test])
    scale = [data.model_arguments[f"numeric_{what}"] for what in ("stds", "means")]
    assert numeric * scale[0] + scale[1] == pytest.approx(
        np.array([[52.5, 1250], [94, np.nan], [148.25, 872]]), nan_ok=True, rel=1e-6
    )


def test_metrics_on_the_page_are_those_that_there_are() -> None:
    text = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)`(, 2 classes|, more)? \| (.+) \| (.*)\|$", text.partition("metrics, unless named")[2], re.M
    )
    plain, tags = ("a", "b", "c"), ("O", "B-x", "I-x")
    tasks = {
        ("regression", ""): [TaskType("regression")],
        ("classification", ", 2 classes"): [TaskType("classification", 2)],
        ("classification", ", more"): [TaskType("classification", 3)],
        ("multi_label", ""): [TaskType("multi_label", 3)],
        ("token_classification", ""): [
            TaskType("token_classification", 2, plain[:2]),
            TaskType("token_classification", 3, plain),
            TaskType("token_classification", 3, tags),
        ],
        ("segmentation", ""): [TaskType("segmentation", 3)],
        ("dense_regression", ""): [TaskType("dense_regression")],
    }
    assert {type_ for type_, _ in tasks} == set(METRICS) and [row[:2] for row in rows[: len(tasks)]] == list(tasks)
    for type_, which, default, others in rows[: len(tasks)]:
        known = set().union(*(fitting_metrics(task) for task in tasks[type_, which]))
        usual = set().union(*(default_metrics(task) for task in tasks[type_, which]))
        named = [set(re.findall(r"`(\w+)`", cell)) - {"O"} for cell in (default, others)]
        assert named[0] == usual and named[0] | named[1] == known, (type_, which)


@pytest.mark.slow
def test_a_network_of_ones_own_trains_on_that_file(flats: Path) -> None:
    network = blocks("your_model.md", "python")[1]
    (recipe,) = blocks("your_model.md", "yaml")
    (flats / "network.py").write_text(network, encoding="utf-8")
    rest = "balancer: bilb\ntrainer: {output_dir: runs/own, num_train_epochs: 2, learning_rate: 1e-3}\n"
    (flats / "own.yaml").write_text(recipe + rest, encoding="utf-8")
    run(flats, "hf-bilb train own.yaml")
    values = {metric.key: metric for metric in read_results(flats / "runs" / "own").metrics}
    assert values["price_mae"].value < values["price_mae"].trivial


def test_the_first_commands_after_installing_run(tmp_path: Path) -> None:
    lines = [line for block in blocks("install.md", "sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("hf-bilb")]
    assert commands == ["hf-bilb --help", "hf-bilb recipes", "hf-bilb balancers"]
    printed = [run(tmp_path, command) for command in commands]
    assert "train" in printed[0] and "qm9/bilb_small.yaml" in printed[1] and "nash_mtl" in printed[2]


def test_extras_on_the_page_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.M))
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    declared = set(re.findall(r"^(\w+) = \[", section.partition("\n[")[0], flags=re.M))
    assert listed == declared

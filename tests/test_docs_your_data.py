"""docs/your_data.md and docs/your_model.md from the first to the last command, in a folder of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_bilb.reporting.results import read_results

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

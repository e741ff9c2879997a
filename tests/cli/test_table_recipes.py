"""Recipes whose data are a table of one's own: what a run says and measures, and how a comparison plans it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hf_bilb.cli import main
from hf_bilb.experiments.plan import plan_comparison
from hf_bilb.experiments.recipe import dump_recipe, read_recipe
from hf_bilb.reporting.results import read_results
from tests.data.glue_files import write_encoder

RECIPE = """
model: {name: tabular_mlp, hidden_sizes: [16]}
data:
  name: table
  files: people.csv
  inputs: {numeric: [age, hours], categorical: [job]}
  split: {stratify_by: job, seed: 5}
  tasks:
    pay: {type: regression, unit: EUR, metrics: [mae, r2]}
    rich: {type: multi_label}
    town: {type: classification}
balancer: bilb
trainer: {output_dir: run, max_steps: 60, learning_rate: 1.0e-2, per_device_train_batch_size: 32, seed: 0,
          save_strategy: "no", eval_strategy: "no", report_to: none, disable_tqdm: true}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    age, hours = generator.integers(20, 60, 400), generator.integers(10, 40, 400)
    job = generator.integers(0, 3, 400)
    pay = 100 * age + 50 * hours + 2000 * job
    lines = [
        f"{a},{h},{'abc'[j]},{p if i % 5 else ''},{int(p > 8000)},{'north' if a + h > 65 else 'south'}"
        for i, (a, h, j, p) in enumerate(zip(age, hours, job, pay, strict=True))
    ]
    (tmp_path / "people.csv").write_text("\n".join(["age,hours,job,pay,rich,town", *lines]) + "\n")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def test_a_table_becomes_a_trained_model(folder: Path) -> None:
    done = CliRunner().invoke(main, ["train", "mine.yaml"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert re.search(r"^rows +320 +40 +40$", done.output, re.M)
    assert re.search(r"^pay +\d+ +\d+ +\d+ +regression, in EUR$", done.output, re.M)
    metrics = {metric.key: metric for metric in read_results("run").metrics}
    assert list(metrics) == [
        "pay_mae", "pay_r2", "rich_f1", "rich_roc_auc", "rich_accuracy", "rich_normalized_entropy", "town_accuracy",
        "town_f1",
    ]  # fmt: skip
    assert metrics["pay_mae"].unit == "EUR"
    for key in ("pay_mae", "rich_roc_auc", "town_accuracy"):
        better = metrics[key].value > metrics[key].trivial
        assert better is metrics[key].higher_is_better


def test_a_resolved_recipe_reads_back(folder: Path) -> None:
    recipe = read_recipe("mine.yaml")
    (folder / "again.yaml").write_text(dump_recipe(recipe))
    assert read_recipe("again.yaml").to_dict() == recipe.to_dict()


def test_the_tokenizer_is_that_of_the_encoder(folder: Path) -> None:
    encoder = str(write_encoder(folder / "encoder"))
    changes = ["data.inputs={text: job}", f"model={{name: multi_task_text, encoder: {encoder}}}", "trainer.max_steps=1"]
    done = CliRunner().invoke(main, ["train", "mine.yaml", *changes, "data.max_length=16"], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_single_tasks_and_splits_of_a_comparison(folder: Path) -> None:
    plan = plan_comparison("mine.yaml", [], balancers="ls", seeds="1,2", single_tasks=True, split_by_seed=True)
    assert [run.recipe.data["split"]["seed"] for run in plan.runs] == [1] * 4 + [2] * 4
    single = {run.task: run.recipe.data["tasks"] for run in plan.runs if run.task}
    everything = read_recipe("mine.yaml").data["tasks"]
    assert single == {task: {task: everything[task]} for task in ("pay", "rich", "town")}
    plan = plan_comparison("mine.yaml", [], balancers="ls", seeds="1", single_tasks=True)
    assert {run.recipe.data["split"]["seed"] for run in plan.runs} == {5}


def test_the_splits_of_tasks_with_rows_of_their_own_get_the_seed(folder: Path) -> None:
    tasks = "data.tasks={pay: {type: regression, files: people.csv, split: {test: 0.2}}}"
    plan = plan_comparison("mine.yaml", ["data.files=null", tasks], balancers="ls", seeds="3", split_by_seed=True)
    (run,) = plan.runs
    assert run.recipe.data["tasks"]["pay"]["split"]["seed"] == run.recipe.data["split"]["seed"] == 3


def test_a_task_that_is_trained_alone_gets_no_split_of_another_one(folder: Path) -> None:
    own = "{type: regression, column: pay, files: people.csv"
    tasks = f"data.tasks={{a: {own}, split: {{test: 0.2}}}}, b: {own}, split: {{test: 0.3}}}}, c: {own}}}}}"
    plan = plan_comparison(
        "mine.yaml", ["data.files=null", tasks], balancers="ls", seeds="3", single_tasks=True, split_by_seed=True
    )
    seeds = {run.task: {name: (task["split"] or {}).get("seed") for name, task in run.recipe.data["tasks"].items()}
             for run in plan.runs}  # fmt: skip
    assert seeds == {"": {"a": 3, "b": 3, "c": None}, "a": {"a": 3}, "b": {"b": 3}, "c": {"c": None}}
    assert {run.recipe.data["split"]["seed"] for run in plan.runs} == {3}

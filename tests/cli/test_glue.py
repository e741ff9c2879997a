"""A text mixture from recipe to table: whole, with LoRA, stopped and resumed, on two processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from hf_bilb.cli import main
from hf_bilb.data.text.glue import load_glue
from hf_bilb.experiments.build import resolve_data_options, training_arguments
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.models import MultiTaskTextModel
from hf_bilb.reporting.results import read_results
from tests.data.glue_files import write_encoder, write_tsv

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {name: multi_task_text, encoder: encoder}
data: {name: glue, folder: glue, tasks: [sst2, stsb, rte], max_length: 48}
balancer: {name: bilb}
trainer:
  output_dir: run
  seed: 1
  use_cpu: true
  num_train_epochs: 6
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  logging_steps: 4
  eval_strategy: epoch
  save_strategy: epoch
  save_total_limit: 2
  load_best_model_at_end: true
  metric_for_best_model: glue_score
  greater_is_better: true
  task_sampling: {strategy: temperature, temperature: 2, batches: single_task}
"""


def learnable(folder: str, count: int, seed: int) -> list[list[str]]:
    """Rows whose label can be read off the words."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        word = ["bad", "good"][int(torch.randint(2, (), generator=generator))]
        good = word == "good"
        text = f"the {word} film . {number % 7 * 'a '}"
        if folder == "SST-2":
            made.append([text, str(int(good))])
        elif folder == "RTE":
            made.append([str(number), text, "it was good", "entailment" if good else "not_entailment"])
        else:
            made.append([*["x"] * 7, text, "it was good", "4.500" if good else "0.500"])
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with an encoder, GLUE files and a recipe."""
    monkeypatch.chdir(tmp_path)
    write_encoder(tmp_path / "encoder")
    for task in ("SST-2", "STS-B", "RTE"):
        write_tsv(tmp_path / "glue" / task / "train.tsv.xz", task, learnable(task, 80 if task == "SST-2" else 40, 0))
        write_tsv(tmp_path / "glue" / task / "dev.tsv", task, learnable(task, 16, 1))
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def hf_bilb(*arguments: str):
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def refused(*arguments: str) -> str:
    result = hf_bilb(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    # On a slow machine the bar of a data set that is read for the first time comes before.
    said = [line for line in re.split(r"[\r\n]+", result.stderr) if line and " examples [" not in line]
    assert len(said) == 1 and said[0].startswith("hf-bilb: error: ")
    return said[0].removeprefix("hf-bilb: error: ")


def test_a_run_leaves_a_table_and_a_model_that_predicts_from_text(folder):
    result = hf_bilb("train", "small.yaml")
    assert result.exit_code == 0, result.output
    assert "test results of small (bilb):" in result.stdout
    results = read_results("run")
    by_key = {metric.key: metric for metric in results.metrics}
    assert list(by_key) == ["sst2_accuracy", "stsb_pearson", "stsb_spearman", "rte_accuracy", "glue_score"]
    assert by_key["sst2_accuracy"].value > 0.9 and by_key["stsb_pearson"].value > 0.8
    assert by_key["stsb_pearson"].trivial == 0 and by_key["stsb_pearson"].beats_trivial
    table = (folder / "run" / "table.md").read_text()
    assert "| constant predictor | beats constant |" in table and "| all tasks | mean score |" in table
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    best = max(entry["eval_glue_score"] for entry in history if "eval_glue_score" in entry)
    assert results.training["best_metric"] == best

    # What the folder holds is enough for a prediction.
    model, tokenizer = AutoModel.from_pretrained("run"), AutoTokenizer.from_pretrained("run")
    batch = tokenizer(["the good film .", "the bad film ."], return_tensors="pt")
    assert model.config.task_names == ["sst2", "stsb", "rte"]
    assert model(**batch).logits[0].argmax(1).tolist() == [1, 0]


def test_lora_from_recipe_to_reloaded_adapters(folder):
    arguments = ("model.lora={r: 4, dropout: 0.1}", "balancer=ls", "trainer.num_train_epochs=10")
    result = hf_bilb("train", "small.yaml", *arguments)
    assert result.exit_code == 0, result.output
    results = read_results("run")
    assert results.training["trained_parameters"] < results.training["parameters"]
    assert next(metric for metric in results.metrics if metric.key == "sst2_accuracy").value > 0.9
    assert not (folder / "run" / "model.safetensors").exists()
    assert (folder / "run" / "adapter_model.safetensors").stat().st_size < 100_000
    model = MultiTaskTextModel.from_pretrained("run")
    assert isinstance(model, PeftModel)
    batch = AutoTokenizer.from_pretrained("run")(["the good film .", "the bad film ."], return_tensors="pt")
    assert model(**batch).logits[0].argmax(1).tolist() == [1, 0]


def test_two_runs_side_by_side(folder):
    for balancer in ("ls", "bilb"):
        arguments = ("trainer.num_train_epochs=3", "evaluation.plots=false", f"balancer={balancer}")
        assert hf_bilb("train", "small.yaml", *arguments, f"trainer.output_dir=runs/{balancer}").exit_code == 0
    result = hf_bilb("report", "runs/ls", "runs/bilb", "--output", "both")
    assert result.exit_code == 0, result.output
    assert "constant predictor" in result.stdout and "mean predictor" not in result.stdout
    assert "geometric mean" in result.stdout
    assert (folder / "both" / "comparison.png").stat().st_size > 8_000


@pytest.mark.parametrize("lora", ["null", "{r: 2, dropout: 0.1}"])
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_where_an_uninterrupted_one_does(folder, lora):
    arguments = ["train", "small.yaml", f"model.lora={lora}", "evaluation.plots=false", "trainer.num_train_epochs=3"]
    arguments += ["trainer.save_strategy=steps", "trainer.save_steps=7", "trainer.save_total_limit=null"]
    arguments += ["trainer.load_best_model_at_end=false", "trainer.metric_for_best_model=null"]
    assert hf_bilb(*arguments).exit_code == 0
    whole = read_results("run")
    assert whole.training["steps"] == 57  # 19 in an epoch
    shutil.copytree("run", "stopped")
    (folder / "stopped" / "results.json").unlink()
    for step in (35, 42, 49, 56, 57):
        shutil.rmtree(folder / "stopped" / f"checkpoint-{step}")
    assert hf_bilb(*arguments, "trainer.output_dir=stopped", "--resume").exit_code == 0
    resumed = read_results("stopped")
    assert resumed.training["resumed_from"] == "checkpoint-28"
    assert resumed.metrics == whole.metrics and resumed.losses == whole.losses


def test_accumulation_knows_the_items_of_each_task_and_evaluation_keeps_no_predictions(folder, caplog):
    recipe = read_recipe("small.yaml")
    data = load_glue(resolve_data_options(recipe))
    assert training_arguments(recipe, data).batch_eval_metrics is True
    arguments = (
        "trainer.gradient_accumulation_steps=2",
        "trainer.task_sampling.batches=mixed",
        "evaluation.plots=false",
    )
    assert hf_bilb("train", "small.yaml", "trainer.num_train_epochs=1", *arguments).exit_code == 0
    assert "do not tell how many items" not in caplog.text


def test_one_task_alone(folder):
    assert hf_bilb("train", "small.yaml", "data.tasks=[stsb]", "evaluation.plots=false").exit_code == 0
    keys = [metric.key for metric in read_results("run").metrics]
    assert keys == ["stsb_pearson", "stsb_spearman", "glue_score"]
    assert read_results("run").metrics[0].value > 0.8


def test_the_tokenizer_follows_the_encoder_unless_it_is_said(folder):
    assert resolve_data_options(read_recipe("small.yaml")).tokenizer == "encoder"
    assert resolve_data_options(read_recipe("small.yaml", ["data.tokenizer=other"])).tokenizer == "other"
    # What is written down keeps saying it once.
    assert read_recipe("small.yaml").data["tokenizer"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model={name: qm9_mlp}"], "data.tokenizer: is required, since the model 'qm9_mlp' has no option 'encoder'"),
        (["data={name: qm9}"], "model.name: 'multi_task_text' is no model for these data"),
        (["data.hub=nyu-mll/glue"], "data.folder: one of folder (with TSV files) and hub (a name) is needed, both are"),
        (["data.folder=elsewhere"], "data.folder: 'elsewhere' is no folder"),
        (
            ["data.tasks=[sst2, qnli]"],
            "data.folder: 'glue' has no folder QNLI for task qnli (it has RTE, SST-2, STS-B)",
        ),
        (
            ["model.encoder=package:no_such_model"],
            "model.encoder: 'package:no_such_model': the package no_such_model is",
        ),
        (["model.lora={target_modules: [qurey]}"], "model.lora.target_modules: 'qurey' is no layer of 'bert'"),
        (
            ["trainer.task_sampling={stratgy: uniform}"],
            "trainer.task_sampling.stratgy: unknown option, value 'uniform'",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, overrides, message):
    assert refused("train", "small.yaml", *overrides).startswith(message)


@pytest.mark.distributed
def test_two_processes_train_one_run(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "hf_bilb", "train", "small.yaml", "trainer.ddp_find_unused_parameters=false"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    results = read_results("run")
    assert results.training["processes"] == 2
    assert results.metrics[0].value > 0.9

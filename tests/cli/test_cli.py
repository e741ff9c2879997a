"""The command line: one line for a mistake, a complete folder for a run, nothing ever written over."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from hf_bilb.cli import main
from hf_bilb.config.yaml import load_yaml
from hf_bilb.data import DATA_SETS
from hf_bilb.errors import FolderInUseError
from hf_bilb.experiments import build, train
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.reporting.results import read_results
from hf_bilb.storage import folder_lock
from tests.cli.made_up import MADE_UP, RECIPE, TASKS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with a recipe for the made-up data set."""
    monkeypatch.setitem(DATA_SETS, "made_up", MADE_UP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def hf_bilb(*arguments: str):
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result) -> str:
    """The one line on stderr of a command that ended with exit code 2."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"hf-bilb: error: [^\n]+\n", result.stderr)
    return result.stderr.removeprefix("hf-bilb: error: ").rstrip("\n")


@pytest.mark.parametrize("command", ["train", "show"])
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["smal.yaml"], 'smal.yaml: there is no such recipe (did you mean "small.yaml"?)'),
        (["small.yaml", "seed"], "'seed' is no override, expected KEY.PATH=VALUE, such as trainer.learning_rate=5e-4"),
        (["small.yaml", "trainer.sed=1"], 'trainer.sed: unknown option, value 1 (did you mean "seed"?)'),
        (
            ["small.yaml", "learning_rate=5e-4"],
            'learning_rate: unknown section, value 0.0005 (did you mean "trainer.learning_rate"?)',
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(folder, command, arguments, line):
    before = contents(folder)
    assert refused(hf_bilb(command, *arguments)) == line
    assert contents(folder) == before


def test_settings_that_contradict_each_other_are_one_line_before_anything_is_written(folder):
    line = refused(hf_bilb("train", "small.yaml", "trainer.save_strategy=steps"))
    assert line.startswith("trainer: --load_best_model_at_end requires the save and eval strategy to match")
    assert not (folder / "run").exists()


def test_a_process_ends_with_exit_code_2_and_no_traceback(tmp_path):
    (tmp_path / "x.yaml").write_text("model: qm9_mlp\ndata: {name: qm9}\nmodel: other\n")
    command = [sys.executable, "-m", "hf_bilb", "train", "x.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == 'hf-bilb: error: x.yaml, line 3: the key "model" stands twice (first in line 1)\n'
    assert done.stdout == ""


def test_show_prints_a_recipe_that_reads_back_equal(folder):
    result = hf_bilb("show", "small.yaml", "trainer.learning_rate=5e-4")
    assert result.exit_code == 0
    (folder / "shown.yaml").write_text(result.stdout)
    shown = read_recipe(folder / "shown.yaml")
    assert shown.trainer["learning_rate"] == 5e-4
    assert shown.to_dict() == read_recipe(folder / "small.yaml", ["trainer.learning_rate=5e-4"]).to_dict()
    assert not (folder / "run").exists()


def test_train_leaves_a_complete_folder(folder):
    result = hf_bilb("train", "small.yaml")
    assert result.exit_code == 0, result.output
    run = folder / "run"
    expected = {"recipe.yaml", "results.json", "table.md", "losses.png", "weights.png", "model.safetensors"}
    assert expected <= {path.name for path in run.iterdir()}

    results = read_results(run)
    assert (results.recipe, results.balancer, results.data, results.split) == ("small", "bilb", "made_up", "test")
    assert results.training["steps"] == 48
    assert results.training["processes"] == 1
    assert results.training["measured_checkpoint"].startswith("checkpoint-")
    assert set(results.versions) >= {"python", "torch", "transformers", "hf-bilb"}
    assert results.settings == load_yaml((run / "recipe.yaml").read_text(), "recipe.yaml")
    assert [metric.task for metric in results.metrics] == list(TASKS)
    by_task = {metric.task: metric for metric in results.metrics}
    assert by_task["steep"].beats_trivial
    assert by_task["steep"].value < 0.5 * by_task["steep"].trivial
    assert results.losses["test"].keys() == {"mean", *TASKS}
    assert results.losses["test"]["mean"] == pytest.approx(sum(results.losses["test"][t] for t in TASKS) / 3)
    assert "| steep | MAE | m |" in (run / "table.md").read_text()
    assert "steep" in result.stdout

    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert sum("weight/steep" in entry for entry in history) == 9


def test_the_measured_model_is_the_one_that_is_saved(folder):
    assert hf_bilb("train", "small.yaml").exit_code == 0
    measured = read_results("run").training["measured_checkpoint"]
    saved, best = (load_file(folder / "run" / name / "model.safetensors") for name in (".", measured))
    assert saved.keys() == best.keys()
    assert all((saved[key] == best[key]).all() for key in saved)


def test_the_same_recipe_gives_the_same_figures(folder):
    for name in ("a", "b"):
        assert hf_bilb("train", "small.yaml", f"trainer.output_dir={name}", "evaluation.plots=false").exit_code == 0
    a, b = read_results("a"), read_results("b")
    assert a.metrics == b.metrics
    assert a.losses == b.losses
    assert not (folder / "a" / "losses.png").exists()


def test_a_folder_with_a_run_is_never_written_over_and_resume_goes_on(folder, caplog):
    assert hf_bilb("train", "small.yaml", "trainer.num_train_epochs=2").exit_code == 0
    before = contents(folder)
    line = refused(hf_bilb("train", "small.yaml"))
    assert line.startswith("trainer.output_dir: 'run' already holds a run (results.json): --resume goes on with it")
    assert contents(folder) == before

    result = hf_bilb("train", "small.yaml", "--resume")
    assert result.exit_code == 0, result.output
    results = read_results("run")
    assert results.training["resumed_from"] == "checkpoint-24"
    assert results.training["steps"] == 48
    assert "started with another value: trainer.num_train_epochs: 2.0 -> 4.0" in caplog.text
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [entry["step"] for entry in history if "loss_mean" in entry]
    assert steps == list(range(5, 49, 5))


def test_a_checkpoint_alone_protects_the_folder(folder):
    (folder / "run" / "checkpoint-7").mkdir(parents=True)
    assert "'run' already holds a run (checkpoint-7)" in refused(hf_bilb("train", "small.yaml"))


def test_a_recipe_that_somebody_wrote_is_not_written_over(folder):
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(RECIPE)
    line = refused(hf_bilb("train", "run/recipe.yaml"))
    assert line == "trainer.output_dir: 'run/recipe.yaml' was not written by a run and would be lost"
    assert (folder / "run" / "recipe.yaml").read_text() == RECIPE


def test_a_run_that_stopped_before_its_first_checkpoint_may_start_again(folder):
    assert hf_bilb("train", "small.yaml", "data.poison=true").exit_code == 1
    assert (folder / "run" / "recipe.yaml").is_file()
    assert hf_bilb("train", "small.yaml").exit_code == 0


def test_the_resolved_recipe_of_a_run_runs_again(folder):
    assert hf_bilb("train", "small.yaml", "trainer.seed=7").exit_code == 0
    assert hf_bilb("train", "run/recipe.yaml", "trainer.output_dir=again").exit_code == 0
    assert read_results("again").metrics == read_results("run").metrics


def test_resume_without_a_complete_checkpoint_is_one_line(folder):
    assert refused(hf_bilb("train", "small.yaml", "--resume")) == (
        "No valid checkpoint found in output directory (run): it has no complete checkpoint to resume from"
    )
    assert not (folder / "run").exists()


@pytest.mark.parametrize("arguments", [("trainer.seed=1",), ("--resume",)])
def test_a_folder_that_another_run_is_writing_into_is_left_as_it_is(folder, arguments):
    assert hf_bilb("train", "small.yaml", "trainer.num_train_epochs=1").exit_code == 0
    (folder / "run" / "results.json").unlink()  # as that of a run under way
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # a run of another process, as far as the folder tells
        with folder_lock.hold(folder / "run"):
            os.write(write, b"x")
            signal.pause()
    try:
        os.read(read, 1)
        before = contents(folder)
        line = refused(hf_bilb("train", "small.yaml", *arguments))
        assert line.startswith(f"{folder / 'run'}: another run is writing into this folder (process {child} on ")
        assert contents(folder) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert hf_bilb("train", "small.yaml", "--resume").exit_code == 0


def test_a_folder_is_held_before_anything_is_loaded_and_until_the_results_are_written(folder, monkeypatch):
    seen = []
    for module, name in ((train, "write_recipe"), (build, "build_model"), (train, "write_run")):
        original = getattr(module, name)

        def look(*given, name=name, original=original):
            with pytest.raises(FolderInUseError), folder_lock.hold(folder / "run"):
                pass
            seen.append(name)
            return original(*given)

        monkeypatch.setattr(module, name, look)
    assert hf_bilb("train", "small.yaml", "trainer.num_train_epochs=1").exit_code == 0
    assert seen == ["write_recipe", "build_model", "write_run"]
    assert not (folder / "run" / folder_lock.LOCK_FILE).exists()


def test_a_full_disk_outside_of_checkpoints_is_one_line(folder, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train, "write_run", full)
    result = hf_bilb("train", "small.yaml", "trainer.num_train_epochs=1")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("hf-bilb: error: ")]
    assert re.search(
        r"a file cannot be written to its end \(No space left on device\): in run [\d,]+ bytes are free", line
    )


def test_a_loss_that_is_not_finite_ends_training_with_one_line(folder):
    result = hf_bilb("train", "small.yaml", "data.poison=true")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("hf-bilb: error: ")]
    assert "'steep'" in line
    assert "Traceback" not in result.stderr


def test_report_compares_runs_and_writes_them(folder):
    for balancer in ("ls", "bilb"):
        arguments = (f"balancer={balancer}", f"trainer.output_dir=runs/{balancer}", "evaluation.plots=false")
        assert hf_bilb("train", "small.yaml", *arguments).exit_code == 0
    result = hf_bilb("report", "runs/ls", "runs/bilb", "--output", "both")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == [
        "task",
        "metric",
        "unit",
        "ls",
        "bilb",
        "mean",
        "predictor",
        "bilb",
        "/",
        "ls",
        "beats",
        "mean",
    ]
    assert "geometric mean" in result.stdout
    assert sorted(path.name for path in (folder / "both").iterdir()) == [
        "comparison.csv",
        "comparison.html",
        "comparison.md",
        "comparison.png",
    ]
    assert (folder / "both" / "comparison.png").stat().st_size > 8_000
    page = (folder / "both" / "comparison.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["tasks"] == list(TASKS) and [run["name"] for run in data["runs"]] == ["ls", "bilb"]
    assert list(data["quantities"]) == ["loss", "eval_loss", "weight", "coefficient"]
    assert page.count("<img ") == 1 and "comparison.html" in result.stdout


def test_report_on_a_folder_without_results_is_one_line(folder):
    assert refused(hf_bilb("report", "nowhere")).startswith("nowhere: holds no results.json")


@pytest.mark.distributed
def test_two_processes_train_one_run(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(ROOT / "tests" / "cli" / "made_up.py"), "train", "small.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test errors of small (bilb)") == 1
    results = read_results("run")
    assert results.training["processes"] == 2
    assert results.training["steps"] == 24
    assert results.metrics[1].beats_trivial

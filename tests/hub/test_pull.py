"""What was pushed, pulled again: the card's code in a fresh process, a resume, and a push by one of two ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import hf_bilb
from tests.hub.runs import REPO, run, write_recipe
from tests.hub.server import Hub

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(hub: Hub, folder: Path, *command: object) -> str:
    words = [str(word) for word in (sys.executable, "-m", *command)]
    environment = hub.environment(folder)
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture
def pulled(hub: Hub, finished: Path, tmp_path: Path) -> Path:
    """The folder in which a fresh process has run the card's code and downloaded the repository."""
    done = run("push", finished, REPO, "--with-checkpoints")
    assert done.exit_code == 0, done.output
    shutil.copy(finished.parent / "people.csv", tmp_path / "rows.csv")
    in_a_process(hub, tmp_path, "tests.hub.pull_worker", REPO, tmp_path)
    return tmp_path


def test_a_pulled_model_predicts_and_goes_on_to_the_bit(pulled: Path, finished: Path) -> None:
    expected = hf_bilb.load(finished).predict(str(pulled / "rows.csv")).to_columns(all_classes=True)
    found = json.loads((pulled / "found.json").read_text())
    assert found == json.loads(json.dumps(expected)) and len(found["pay"]) == 400

    again = pulled / "pulled"
    shutil.rmtree(again / "checkpoint-30")
    changes = [f"data.files={finished.parent / 'people.csv'}", f"trainer.output_dir={again}"]
    (again / "model.safetensors").unlink()
    done = run("train", again / "recipe.yaml", *changes, "--resume")
    assert done.exit_code == 0, done.output
    results = json.loads((again / "results.json").read_text())
    assert results["training"]["resumed_from"] == "checkpoint-20"
    assert results["metrics"] == json.loads((finished / "results.json").read_text())["metrics"]
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (finished, again))
    assert whole.keys() == resumed.keys() and all((whole[name] == resumed[name]).all() for name in whole)
    for name in ("balancer.safetensors", "model.safetensors"):
        assert (again / "checkpoint-30" / name).read_bytes() == (finished / "checkpoint-30" / name).read_bytes()


def test_one_of_two_ranks_pushes(hub: Hub, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    changes = ["trainer.push_to_hub=true", f"trainer.hub_model_id={REPO}", "trainer.ddp_backend=gloo"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "hf_bilb"]
    said = in_a_process(hub, tmp_path, *launch, "train", recipe, *changes)
    assert [message for _, message, _ in hub.commits] == ["End of training"]
    assert said.count("pushed to ") == 1
    assert "2 processes, each on a CPU" in hub.repos[REPO]["README.md"].decode()

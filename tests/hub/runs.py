"""A small run of a table, trained once for all tests of pushing, and the command line with the test's Hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants
from huggingface_hub.utils import _http

from hf_bilb.cli import main
from tests.hub.server import TOKEN, Hub

ROOT = Path(__file__).resolve().parents[2]
REPO = "somebody/people"
TASKS = ("pay", "rich", "town|*x*")
RECIPE = """
model: {{name: tabular_mlp, hidden_sizes: [16]}}
data:
  name: table
  files: {folder}/people.csv
  inputs: {{numeric: [age, hours], categorical: [job]}}
  split: {{stratify_by: job, seed: 5}}
  tasks:
    pay: {{type: regression, unit: EUR, metrics: [mae, r2]}}
    rich: {{type: multi_label}}
    "town|*x*": {{type: classification, column: town}}
balancer: bilb
trainer: {{output_dir: {folder}/run, max_steps: 30, learning_rate: 1.0e-2, per_device_train_batch_size: 32, seed: 0,
          save_strategy: steps, save_steps: 10, logging_steps: 10, eval_strategy: "no", report_to: none,
          disable_tqdm: true, use_cpu: true}}
"""


def write_recipe(folder: Path) -> Path:
    """The recipe and its table in `folder`."""
    generator = np.random.default_rng(0)
    age, hours = generator.integers(20, 60, 400), generator.integers(10, 40, 400)
    job = generator.integers(0, 3, 400)
    pay = 100 * age + 50 * hours + 2000 * job
    rows = zip(age, hours, job, pay, strict=True)
    lines = [f"{a},{h},{'abc'[j]},{p},{int(p > 8000)},{'north' if a + h > 65 else 'south'}" for a, h, j, p in rows]
    (folder / "people.csv").write_text("\n".join(["age,hours,job,pay,rich,town", *lines]) + "\n")
    (folder / "mine.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "mine.yaml"


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Let this process know `hub` alone, and not wait between its attempts to reach it."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # which remembers its endpoint
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


def run(*arguments: object) -> Result:
    """`hf-bilb ARGUMENTS`; an error that it has no line for is raised."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def error_line(done: Result) -> str:
    """The one line that a command says of its failure."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf-bilb: error: ")]
    assert len(lines) == 1, done.output
    return lines[0].removeprefix("hf-bilb: error: ")

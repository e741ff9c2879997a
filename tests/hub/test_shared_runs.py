"""Runs of every kind, trained, pushed and pulled over HTTP: what they predict stays the same to the bit, with hf_bilb
and without it, and a pulled checkpoint goes on as if nothing had stopped it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

import hf_bilb
from hf_bilb.experiments import train
from hf_bilb.experiments.train import run_recipe
from tests.data.glue_files import write_encoder
from tests.hub.runs import ROOT, run, use
from tests.hub.server import Hub
from tests.hub.share_worker import ANSWERED
from tests.inference import runs
from tests.inference.runs import Run

ENCODER, BASE = "somebody/encoder", "somebody/base"
MAKERS: dict[str, Any] = {
    "text": lambda root: runs.text_run(root, encoder=ENCODER),
    "lora": lambda root: runs.text_run(root, lora=True, encoder=ENCODER),
    "image": runs.image_run,
    "table": runs.table_run,
    "smiles": runs.smiles_run,
    "qm9": runs.qm9_run,
    "language": runs.language_run,
    "language_lora": lambda root: runs.language_run(root, lora=True, base=BASE),
    "module": runs.module_run,
}
NEEDS = {"smiles": "rdkit", "qm9": "qm9pack"}
LANGUAGE = ("language", "language_lora")
#: Loaded with the code in the repository, where there is no hf_bilb.
WITH_CODE = ("text", "lora", "image", "table", "smiles", "qm9")


@dataclass
class Shared:
    """Runs, and what another process has found in their repositories; `remote`: one without hf_bilb."""

    hub: Hub
    runs: dict[str, Run] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    pulled: dict[str, Any] = field(default_factory=dict)
    remote: dict[str, Any] = field(default_factory=dict)

    def run(self, name: str) -> Run:
        if name not in self.runs:
            pytest.skip(f"the package {NEEDS[name]} is not installed")
        return self.runs[name]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared")
    with Hub(large=1000) as hub, pytest.MonkeyPatch.context() as patch:
        use(hub, patch)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(runs, "finished", measured)
        for name, local in ((ENCODER, write_encoder(folder / "e")), (BASE, runs.write_base(folder / "b"))):
            hub.repos[name] = {file.name: file.read_bytes() for file in local.iterdir()}
        made = Shared(hub)
        for name, make in MAKERS.items():
            if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
                continue
            (folder / name).mkdir()
            made.runs[name] = make(folder / name)
            done = run("push", folder / name / "run", f"somebody/{name}", "--with-checkpoints")
            assert done.exit_code == 0, done.output
            made.batches[name] = batch_of(name, made.runs[name])
            torch.save(made.batches[name], folder / f"{name}.pt")
        pull(folder, made)
        hub.unanswered.clear()  # whether there is a file of adapters, of chat templates, ... is asked, too
        yield made


def measured(root: Path, model: dict[str, Any], data: dict[str, Any], test: Path, **trainer: Any) -> Run:
    """Train and measure as `hf-bilb train` does; the Trainer is kept."""
    kept: list[Any] = []

    def keep(recipe: Any, loaded: Any, **settings: Any) -> Any:
        kept[:] = [loaded, build(recipe, loaded, **settings)]
        return kept[1]

    build = train.build_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_trainer", keep)
        run_recipe(runs.recipe_of(root, model, data, trainer))
    return Run(root / "run", kept[0], kept[1], test)


def batch_of(name: str, of: Run) -> dict[str, Any]:
    """The first rows of the test part."""
    if name in LANGUAGE:
        return {"input_ids": torch.tensor(of.data.test[0]["input_ids"][None, :6])}
    rows = [of.data.test[row] for row in range(min(8, len(of.data.test)))]
    batch = of.data.data_collator(rows)
    return {key: value for key, value in batch.items() if key not in ("labels", "tag_labels")}


def pull(folder: Path, made: Shared) -> None:
    rows = {name: None if name in ("qm9", *LANGUAGE) else str(one.test) for name, one in made.runs.items()}
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "wanted.json").write_text(json.dumps({f"somebody/{n}": True for n in WITH_CODE if n in made.runs}))
    environment = made.hub.environment(folder)
    shutil.copy(ROOT / "tests" / "hub" / "remote_worker.py", folder)
    bare = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    for command, where, known in (
        (["-m", "tests.hub.share_worker", str(folder)], ROOT, environment),
        (["remote_worker.py", str(folder)], folder, bare),
    ):
        words = [sys.executable, *command]
        done = subprocess.run(words, cwd=where, env=known, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-6000:]
    made.pulled = torch.load(folder / "pulled.pt")
    found = torch.load(folder / "found.pt")
    made.remote = {repo.partition("/")[2]: outputs for repo, outputs in found.items()}


def of_run(one: Run, batch: dict[str, Any]) -> Any:
    """What the run's own model computes."""
    with torch.no_grad():
        return one.trainer.model.eval()(**batch)["logits"]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    return len(found) == len(expected) and all(map(same, found, expected))


# --- predictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "lora", "image", "table", "module"])
def test_rows_are_predicted_as_the_run_predicts_them(name: str, shared: Shared) -> None:
    one = shared.run(name)
    expected, pulled = one.outputs(), shared.pulled[name]
    local = hf_bilb.load(one.folder, device="cpu", trust_remote_code=name == "module").predict(one.test, batch_size=8)
    assert list(expected) == list(local) and len(local) == len(one.data.test)
    for task, outputs in expected.items():
        assert np.array_equal(local.outputs[task], outputs), task
        assert np.array_equal(pulled[task].numpy(), outputs), task


def test_smiles_are_predicted_as_the_run_predicts_them(shared: Shared) -> None:
    one = shared.run("smiles")
    local = hf_bilb.load(one.folder, device="cpu")
    found = local.predict(one.test, batch_size=8)
    for task in ("NR-AR", "SR-p53"):
        assert np.array_equal(found.outputs[task], shared.pulled["smiles"][task].numpy()) and len(found[task]) == 12
    with torch.no_grad():
        assert torch.equal(local.model(**shared.batches["smiles"])["logits"], of_run(one, shared.batches["smiles"]))


def test_molecules_with_coordinates(shared: Shared) -> None:
    one = shared.run("qm9")
    expected = of_run(one, shared.batches["qm9"])
    with torch.no_grad():
        local = hf_bilb.load(one.folder, device="cpu").model(**shared.batches["qm9"])["logits"]
    assert torch.equal(local, expected) and torch.equal(shared.pulled["qm9"]["logits"], expected)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_answers_as_the_run_s(name: str, shared: Shared) -> None:
    one, pulled = shared.run(name), shared.pulled[name]
    expected = of_run(one, shared.batches[name])
    loaded = hf_bilb.load(one.folder, device="cpu")
    with torch.no_grad():
        assert torch.equal(loaded.model(**shared.batches[name]).logits, expected)
    assert torch.equal(pulled["logits"], expected) and torch.equal(pulled["without hf_bilb"], expected)
    answers = []
    for prompt in ANSWERED["prompts"]:
        ids = torch.tensor([loaded.tokens_of(prompt)])
        written = one.trainer.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5
        )
        answers.append(loaded.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    assert pulled["answers"] == answers


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_in_the_repository_computes_what_the_run_s_model_does(name: str, shared: Shared) -> None:
    one, found = shared.run(name), shared.remote[f"{name}"]
    assert not isinstance(found, str), found
    assert same(found["logits"], of_run(one, shared.batches[name]))


def test_own_code_of_a_repository_runs_only_when_it_is_trusted(shared: Shared) -> None:
    said = shared.pulled["module"]["refusal"]
    assert said == (
        "somebody/module: its network is built by network.py:build, code that comes with it: pass "
        "trust_remote_code=True (--trust-remote-code) to run it"
    )


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "lora", "language_lora"])
def test_a_pushed_checkpoint_goes_on_to_the_same_weights(name: str, shared: Shared, tmp_path: Path) -> None:
    one, again = shared.run(name), tmp_path / "pulled"
    for path, content in shared.hub.repos[f"somebody/{name}"].items():
        if not path.startswith("checkpoint-2/"):
            (again / path).parent.mkdir(parents=True, exist_ok=True)
            (again / path).write_bytes(content)
    file = "model.safetensors" if name == "text" else "adapter_model.safetensors"
    (again / file).unlink()
    done = run("train", one.folder.parent / "recipe.yaml", f"trainer.output_dir={again}", "--resume")
    assert done.exit_code == 0, done.output
    assert json.loads((again / "results.json").read_text())["training"]["resumed_from"] == "checkpoint-1"
    whole, resumed = load_file(one.folder / file), load_file(again / file)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    first = load_file(one.folder / "checkpoint-1" / file)
    assert any(not torch.equal(whole[key], first[key]) for key in whole)


# --- what cannot be pulled ----------------------------------------------------------------------------------------


def test_what_cannot_be_pulled_is_one_line(shared: Shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    arguments = ("rows.jsonl", "--output", tmp_path / "out.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"age": 1}\n')
    monkeypatch.chdir(tmp_path)
    done = run("predict", "somebody/nothing", *arguments)
    assert done.exit_code == 2 and "there is no folder 'somebody/nothing', and the hub gives none" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1
    shared.hub.stop()
    try:
        done = run("predict", "somebody/table", *arguments)
    finally:
        shared.hub.start_again()
        shared.hub.unanswered.clear()
    assert done.exit_code == 2 and "there is no folder 'somebody/table', and the hub gives none" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_runs_own_code_only_when_it_is_trusted(shared: Shared, tmp_path: Path) -> None:
    one = shared.run("module")
    arguments = ("predict", "somebody/module", one.test, "--output", tmp_path / "out.jsonl", "--device", "cpu")
    refused = run(*arguments)
    assert refused.exit_code == 2 and "(--trust-remote-code) to run it" in refused.stderr
    assert run(*arguments, "--trust-remote-code").exit_code == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(one.data.test)

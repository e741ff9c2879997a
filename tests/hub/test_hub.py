"""`push_to_hub` with `hub_strategy="checkpoint"`: complete checkpoints on the Hub, from which a run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_bilb.trainer.checkpointing import DESCRIPTION, MARKER, TENSORS
from tests.hub.server import Hub
from tests.hub.worker import LAST_SAVE, REPO, RUN

ROOT = Path(__file__).resolve().parents[2]
LAST = "last-checkpoint/"


def run_worker(mode: str, folder: Path, hub: Hub) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint}
    environment.update(HF_HOME=str(folder / "home"), HF_TOKEN="hf_test", HF_HUB_DISABLE_TELEMETRY="1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "tests.hub.worker", mode, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{mode} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path]]:
    """The Hub after a run was pushed to it and resumed from it, and the local folder."""
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        run_worker("push", folder, hub)
        run_worker("resume", folder, hub)
        yield hub, folder


def test_every_request_was_understood(pushed: tuple[Hub, Path]) -> None:
    hub, _ = pushed
    assert hub.unanswered == []


def test_the_last_checkpoint_on_the_hub_is_complete(pushed: tuple[Hub, Path]) -> None:
    hub, folder = pushed
    files = hub.repos[REPO]
    there = {path.removeprefix(LAST): content for path, content in files.items() if path.startswith(LAST)}
    assert {TENSORS, DESCRIPTION, MARKER, "model.safetensors", "optimizer.pt", "trainer_state.json"} <= there.keys()
    local = folder / "pushed" / f"checkpoint-{LAST_SAVE}"
    assert there == {path.name: path.read_bytes() for path in local.iterdir()}
    listed = json.loads(there[MARKER])["files"]
    assert listed == {name: len(content) for name, content in there.items() if name != MARKER}


def test_each_save_was_pushed_once_after_it_was_complete(pushed: tuple[Hub, Path]) -> None:
    hub, _ = pushed
    saves = [paths for repo, message, paths in hub.commits if message.endswith(", checkpoint")]
    assert [repo for repo, _, _ in hub.commits] == [REPO] * len(hub.commits)
    assert len(saves) == LAST_SAVE // 5
    assert all(LAST + MARKER in paths for paths in saves)


def test_the_end_was_pushed_without_what_is_not_the_models(pushed: tuple[Hub, Path]) -> None:
    hub, _ = pushed
    assert any(message == "End of training" for _, message, _ in hub.commits)
    outside = {path for path in hub.repos[REPO] if not path.startswith(LAST)}
    assert {"model.safetensors", "config.json", "README.md"} <= outside
    assert not any("_incomplete" in path or path.startswith("checkpoint-") for path in outside)
    assert not any("balancer" in path for path in outside), "the balancer is no part of the model"


def test_a_run_goes_on_from_the_downloaded_checkpoint(pushed: tuple[Hub, Path]) -> None:
    _, folder = pushed
    whole, resumed = torch.load(folder / "whole.pt"), torch.load(folder / "resumed.pt")
    assert resumed["began_at"] == LAST_SAVE
    assert resumed["steps"] == whole["steps"] == 33
    assert torch.equal(whole["parameters"], resumed["parameters"])
    assert all(torch.equal(value, resumed["balancer"][key]) for key, value in whole["balancer"].items())
    assert whole["logs"] == resumed["logs"]
    assert RUN.settings["balancer"]["preset"] == "qm9"

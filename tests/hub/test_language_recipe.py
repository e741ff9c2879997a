"""The instruction recipe with a model's name on the hub, as it stands: a made-up model under that name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from tests.data.glue_files import write_glue
from tests.data.language_files import write_language_model
from tests.hub.language_worker import ADAPTERS, BASE
from tests.hub.server import Hub, card_errors

ROOT = Path(__file__).resolve().parents[2]


def test_the_recipe_takes_its_model_from_the_hub_and_gives_adapters_back(tmp_path: Path) -> None:
    write_glue(tmp_path / "glue", ("cola", "sst2", "mrpc", "stsb", "rte", "wnli"))
    model = write_language_model(tmp_path / "model", "qwen2", vocab_size=512)
    with Hub() as hub:
        hub.repos[BASE] = {file.name: file.read_bytes() for file in model.iterdir()}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint}
        environment.update(HF_HOME=str(tmp_path / "home"), HF_TOKEN="hf_test", HF_HUB_DISABLE_TELEMETRY="1")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "tests.hub.language_worker", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, f"ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
        assert hub.unanswered == []
        pushed = hub.repos[ADAPTERS]
    assert {"adapter_model.safetensors", "tokenizer.json"} <= pushed.keys() and "model.safetensors" not in pushed
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == BASE
    card = ModelCard(pushed["README.md"].decode())
    assert card_errors(card.content) == []
    assert (card.data.base_model, card.data.base_model_relation) == (BASE, "adapter")
    assert card.data.datasets is None and card.data.pipeline_tag == "text-generation" and "lora" in card.data.tags
    assert f"hf_bilb.load({ADAPTERS!r})" in card.content and "better than that" in card.content
    found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found["auto"], found["peft"])
    assert (found["auto"] - found["base"]).abs().max() > 1e-2

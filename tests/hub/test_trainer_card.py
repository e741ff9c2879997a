"""The card and the push of a Trainer that is used from Python."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from torch import nn

from tests.checkpoints.runs import QM9, Run, build_trainer
from tests.hub.server import Hub, card_errors
from tests.inference import runs
from tests.synthetic import TASK_NAMES


def trained(folder: Path, **settings: object):
    run = Run(0, 0, {"balancer": QM9})
    trainer = build_trainer(run, folder, max_steps=6, eval_strategy="steps", eval_steps=6, **settings)
    trainer.train()
    return trainer


def test_a_trainer_tells_what_it_knows(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "net")
    trainer.create_model_card(license="mit", tags="mine", dataset="made up", finetuned_from="owner/base")
    text = (tmp_path / "net" / "README.md").read_text()
    assert card_errors(text) == [] and str(tmp_path) not in text
    head = ModelCard(text).data.to_dict()
    assert (head["license"], head["base_model"]) == ("mit", "owner/base") and {"mine", "bilb"} <= set(head["tags"])
    evaluation = next(e for e in trainer.state.log_history if "eval_loss" in e)
    for task, coefficient in zip(TASK_NAMES, trainer.balancer.coefficients.tolist(), strict=True):
        rows = re.findall(rf"^\| {task} \|.* (\S+) \|$", text, re.M)
        assert [float(row) for row in rows] == pytest.approx([evaluation[f"eval_loss_{task}"], coefficient], rel=1e-3)
    assert "arxiv.org/abs/2502.08585" in text and "| Steps | 6" in text and "| train | 88 |" in text


def test_a_card_of_somebodys_own_stays(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "net")
    (tmp_path / "net" / "README.md").write_text("# Mine\n")
    trainer.create_model_card()
    assert (tmp_path / "net" / "README.md").read_text() == "# Mine\n"


class Plain(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, features, labels):
        return self.inner(features=features, labels=labels)


def test_a_plain_module_is_pushed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer's own card asks for `model.config`, and ends with an AttributeError after the training."""
    trainer = trained(tmp_path / "net")
    trainer.model = trainer.model_wrapped = Plain(trainer.model)
    trainer.args.hub_model_id = "somebody/net"
    trainer.push_to_hub()
    assert {"README.md", "model.safetensors"} <= hub.repos["somebody/net"].keys()
    assert b"`bilb`" in hub.repos["somebody/net"]["README.md"]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_packaged_model_is_pushed_with_its_code(hub: Hub, tmp_path: Path, blocking: bool) -> None:
    trainer = runs.table_run(tmp_path).trainer
    trainer.args.hub_model_id = "somebody/table"
    pushed = trainer.push_to_hub(blocking=blocking)
    assert (pushed if blocking else pushed.result()).commit_message == "Code of the model"
    there = hub.repos["somebody/table"]
    assert json.loads(there["config.json"])["auto_map"]["AutoModel"] == "hf_bilb_models_tabular_mlp.TabularMlpModel"
    assert "hf_bilb_models_tabular_mlp.py" in there and not list((tmp_path / "run").glob("*.py"))
    assert b"trust_remote_code=True" in there["README.md"]

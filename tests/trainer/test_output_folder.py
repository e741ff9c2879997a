"""An output folder that cannot be written to is one line when the Trainer is built and when it trains."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments, StorageError


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x, labels=None):
        return {"loss": self.linear(x).square().mean()}


def build(folder):
    rows = [{"x": torch.ones(2)} for _ in range(4)]
    args = BilevelMTLTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, save_strategy="no"
    )
    return BilevelMTLTrainer(model=Plain(), args=args, train_dataset=rows)


@pytest.mark.parametrize("name", ["file", "file/inside", "gone/inside"])
def test_the_constructor_refuses_it(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(StorageError, match=r"^output_dir: '.*' cannot be written to, ") as caught:
        build(tmp_path / name)
    assert isinstance(caught.value, OSError)  # what Trainer raises


def test_the_constructor_refuses_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("locked"))
    with pytest.raises(
        StorageError, match=r"^output_dir: '.*locked' cannot be written to, which may not be written to"
    ):
        build(tmp_path / "locked")


def test_training_refuses_what_has_become_a_file(tmp_path):
    trainer = build(tmp_path / "run")
    assert trainer.train().global_step == 1
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("x")
    before = trainer.model.linear.weight.clone()
    with pytest.raises(StorageError, match=r"^output_dir: '.*run' cannot be written to, which is a file"):
        trainer.train()
    assert torch.equal(trainer.model.linear.weight, before)

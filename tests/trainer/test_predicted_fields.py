"""Output fields of sizes that differ between batches and ranks are left out of the predictions, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, Trainer, TrainingArguments

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments

EVEN, UNEVEN = (5, 5, 5, 5), (5, 5, 3, 3)


def build(**outputs: bool) -> GPT2ForSequenceClassification:
    """Returns a cache, too."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=30, n_embd=8, n_layer=2, n_head=2, pad_token_id=0, attn_implementation="eager", **outputs
    )
    return GPT2ForSequenceClassification(config)


def texts(lengths: tuple[int, ...], labelled: bool = True) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i, length in enumerate(lengths):
        row = {"input_ids": torch.randint(1, 30, (length,), generator=generator)}
        rows.append({**row, "labels": torch.tensor(i % 2)} if labelled else row)
    return rows


def losses(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    value = torch.nn.functional.cross_entropy(outputs["logits"], batch["labels"])
    return torch.stack([value, 2 * value]), torch.full((2,), len(batch["labels"]))


def predicted(ours: bool, folder: Path, lengths: tuple[int, ...], call: str, outputs: dict[str, bool]) -> Any:
    """What `compute_metrics` gets in an evaluation, or what `predict` gives for texts without labels."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "per_device_eval_batch_size": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
    }
    seen = []
    common: dict[str, Any] = {"model": build(**outputs), "compute_metrics": lambda p: seen.append(p.predictions) or {}}
    trainer: Trainer
    if ours:
        args = BilevelMTLTrainingArguments(**settings, balancer="ls", task_names=["a", "b"])
        trainer = BilevelMTLTrainer(args=args, task_loss_func=losses, **common)
    else:
        trainer = Trainer(args=TrainingArguments(**settings), **common)
    if call == "predict":
        return trainer.predict(texts(lengths, labelled=False)).predictions
    metrics = trainer.evaluate(texts(lengths))
    if ours:
        assert metrics["eval_loss_b"] == pytest.approx(2 * metrics["eval_loss_a"], rel=1e-6)
    return seen[-1]


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("call", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("outputs", "lengths"),
    [
        ({}, UNEVEN),
        ({"output_hidden_states": True}, EVEN),
        ({"output_hidden_states": True}, UNEVEN),
        ({"output_attentions": True, "output_hidden_states": True}, EVEN),
    ],
)
def test_predictions_are_those_of_trainer(
    outputs: dict[str, bool], lengths: tuple[int, ...], call: str, tmp_path: Path
) -> None:
    found, expected = (predicted(ours, tmp_path, lengths, call, outputs) for ours in (True, False))
    assert isinstance(expected, tuple) == bool(outputs)
    assert_same(found, expected)


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_attentions_of_longer_and_shorter_texts_are_left_out(
    call: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = {"output_attentions": True, "output_hidden_states": True}
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        predicted(False, tmp_path, UNEVEN, call, outputs)
    found = predicted(True, tmp_path, UNEVEN, call, outputs)
    assert_same(found, predicted(False, tmp_path, UNEVEN, call, {"output_hidden_states": True}))
    said = "the output field(s) attentions have other sizes in other batches: they are left out of the predictions"
    assert caplog.text.count(said) == 1

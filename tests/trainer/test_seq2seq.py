"""`class T(BilevelMTLTrainer, Seq2SeqTrainer)`: the tokens that `Seq2SeqTrainer` generates, beside exact losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from tests.trainer.harness import flat_parameters, plain_settings, untimed

PAD, LENGTH, ROWS = 0, 6, 10


class BalancedSeq2Seq(BilevelMTLTrainer, Seq2SeqTrainer):
    """As anybody would write it."""


@dataclass
class Arguments(BilevelMTLTrainingArguments, Seq2SeqTrainingArguments):
    """As anybody would write it."""


class TaskLossT5(T5ForConditionalGeneration):
    """Keeps the contract: the loss of each of two tasks; a row's task is a column that its forward names."""

    accepts_loss_kwargs = False

    def forward(self, input_ids: Any = None, labels: Any = None, task: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        outputs = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is None or task is None:
            return outputs
        losses, counts = by_task(outputs["logits"], labels, task)
        return {"losses": losses, "num_items": counts, "logits": outputs["logits"]}


def build(cls: type[T5ForConditionalGeneration] = T5ForConditionalGeneration) -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=1,
    )
    return cls(config)


def rows(with_task: bool = True, size: int = ROWS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(size):
        words = torch.randint(2, 20, (LENGTH,), generator=generator)
        row = {"input_ids": words, "labels": words.flip(0).clone()}
        row["labels"][LENGTH - i % 3 :] = -100
        # As `DataCollatorForSeq2Seq` makes them: what label smoothing needs, and what generation shall not begin with.
        row["decoder_input_ids"] = torch.cat([torch.tensor([PAD]), row["labels"][:-1].clamp(min=PAD)])
        found.append({**row, "task": torch.tensor(int(i % 3 == 0))} if with_task else row)
    return found


def by_task(logits: Tensor, labels: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the tokens of each task's rows."""
    values = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    tokens = labels.ne(-100)
    counts = torch.stack([tokens[task == k].sum() for k in range(2)])
    return torch.stack([values[task == k].sum() for k in range(2)]) / counts.clamp(min=1), counts


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    generation = {"predict_with_generate": True, "generation_max_length": LENGTH, "learning_rate": 0.5}
    return plain_settings(folder, **{**generation, **more})


def stock(folder: Path, **more: Any) -> Seq2SeqTrainer:
    args = Seq2SeqTrainingArguments(**settings(folder, **more))
    data = rows(with_task=False)
    return Seq2SeqTrainer(model=build(), args=args, train_dataset=data, eval_dataset=data, compute_metrics=share)


def share(prediction: Any) -> dict[str, float]:
    return {"share": float((prediction.predictions[:, 1:] == prediction.label_ids[:, :-1]).mean())}


def test_an_ordinary_model_does_all_as_with_seq2seq_trainer(tmp_path: Path) -> None:
    found = []
    for trainer in (
        stock(tmp_path, eval_strategy="epoch", label_smoothing_factor=0.1),
        BalancedSeq2Seq(
            model=build(),
            args=Arguments(**settings(tmp_path, eval_strategy="epoch", label_smoothing_factor=0.1)),
            train_dataset=rows(with_task=False),
            eval_dataset=rows(with_task=False),
            compute_metrics=share,
        ),
    ):
        first = trainer.predict(rows(with_task=False, size=5), num_beams=2)
        trainer.train()
        found.append((trainer, first, trainer.predict(rows(with_task=False, size=5), max_length=4)))
    (plain, *theirs), (ours, *others) = found
    assert torch.equal(flat_parameters(plain.model), flat_parameters(ours.model))
    assert untimed(plain.state.log_history) == untimed(ours.state.log_history)
    for their, our in zip(theirs, others, strict=True):
        assert np.array_equal(their.predictions, our.predictions)
        assert np.array_equal(their.label_ids, our.label_ids)
        assert untimed([their.metrics]) == untimed([our.metrics])


@pytest.mark.parametrize("kind", ["task_loss_func", "contract", "every column kept"])
def test_tokens_are_seq2seq_trainers_and_losses_exact(kind: str, tmp_path: Path) -> None:
    of_model = kind == "contract"
    given: dict[str, Any] = {"remove_unused_columns": False} if kind == "every column kept" else {}
    model = build(TaskLossT5 if of_model else T5ForConditionalGeneration)
    args = Arguments(
        **settings(tmp_path), balancer="ls", task_names=["a", "b"], label_names=["labels", "task"], **given
    )
    trainer = BalancedSeq2Seq(
        model=model,
        args=args,
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=share,
        task_loss_func=None
        if of_model
        else lambda outputs, batch: by_task(outputs["logits"], batch["labels"], batch["task"]),
    )
    plain = stock(tmp_path)
    plain.model.load_state_dict(model.state_dict())
    batch = {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
    for _ in range(2):
        with torch.no_grad():
            logits = plain.model.eval()(input_ids=batch["input_ids"], labels=batch["labels"]).logits
        losses, _counts = by_task(logits, batch["labels"], batch["task"])
        found = trainer.evaluate()
        assert found["eval_loss_a"] == pytest.approx(float(losses[0]), rel=1e-5)
        assert found["eval_loss_b"] == pytest.approx(float(losses[1]), rel=1e-5)
        assert found["eval_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        expected = plain.predict(rows(with_task=False), num_beams=2)
        predicted = trainer.predict(rows(), num_beams=2)
        assert np.array_equal(predicted.predictions, expected.predictions)
        assert np.array_equal(predicted.label_ids, expected.label_ids)
        assert predicted.metrics["test_share"] == expected.metrics["test_share"]
        # Again with other weights, after training.
        trainer.train()
        plain.model.load_state_dict(model.state_dict())
    bare = [{"input_ids": row["input_ids"]} for row in rows()]
    without_labels = trainer.predict(bare, num_beams=2)
    assert np.array_equal(without_labels.predictions, plain.predict(bare, num_beams=2).predictions)
    assert without_labels.label_ids is None and "test_loss" not in without_labels.metrics


def test_losses_alone_generate_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(T5ForConditionalGeneration, "generate", lambda *args, **kwargs: pytest.fail("generates"))
    args = Arguments(
        **settings(tmp_path, predict_with_generate=False), task_names=["a", "b"], label_names=["labels", "task"]
    )
    trainer = BalancedSeq2Seq(model=build(TaskLossT5), args=args, eval_dataset=rows())
    assert {"eval_loss", "eval_loss_a", "eval_loss_b"} <= trainer.evaluate().keys()

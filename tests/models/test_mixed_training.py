"""A text model with tasks of all types in the Trainer: accumulation with weighted classes, evaluation, predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.data.text.rows import PadTokens
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.models import MultiTaskTextConfig, MultiTaskTextModel
from tests.models.test_text_encoder import MIXED, bert


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Texts of different lengths; a label in five is missing."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for _ in range(count):
            length = int(torch.randint(3, 12, (), generator=generator))
            columns = [torch.randn(1, generator=generator), *(self.classes(size, generator) for size in (3, 5))]
            labels = torch.cat([*columns, torch.randint(2, (4,), generator=generator).float()])
            tags = torch.randint(4, (length, 1), generator=generator)
            self.rows.append({
                "input_ids": torch.randint(5, 50, (length,), generator=generator).tolist(),
                "labels": labels.masked_fill(torch.rand(7, generator=generator) < 0.2, torch.nan).numpy(),
                "tag_labels": tags.masked_fill(torch.rand(length, 1, generator=generator) < 0.2, -100).numpy(),
            })  # fmt: skip

    @staticmethod
    def classes(size: int, generator: torch.Generator) -> Tensor:
        return torch.randint(size, (1,), generator=generator).float()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def trainer_of(folder: Path, batch_size: int, accumulation: int, balancer: str) -> BilevelMTLTrainer:
    torch.manual_seed(0)
    encoder = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = MultiTaskTextModel(MultiTaskTextConfig(encoder, MIXED, dropout=0.0)).double()
    args = BilevelMTLTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", max_steps=4, optim="sgd",
        per_device_train_batch_size=batch_size, per_device_eval_batch_size=5, gradient_accumulation_steps=accumulation,
        learning_rate=0.05, max_grad_norm=0.0, disable_tqdm=True, balancer=balancer, task_names=list(MIXED),
        balance_over="window" if balancer == "bilb" else "micro_batch",
        label_names=["labels", "tag_labels"],
    )  # fmt: skip
    rows = Rows(32)
    return BilevelMTLTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=PadTokens(0),
        task_item_counts=MixedLosses(MIXED).count,
    )  # fmt: skip


@pytest.mark.parametrize("balancer", ["ls", "bilb"])
def test_four_batches_of_two_end_where_one_of_eight_does(
    tmp_path: Path, balancer: str, caplog: pytest.LogCaptureFixture
) -> None:
    states = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = trainer_of(tmp_path / str(size), size, accumulation, balancer)
        trainer.train()
        states.append(trainer.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-10, atol=1e-12, msg=name)
    # The counts of the batches are those of the losses, sums of weights included.
    assert "how many items" not in caplog.text and "other counts" not in caplog.text


def test_evaluation_in_batches_has_the_loss_of_the_whole_set_and_predicts_a_tensor_a_task(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 8, 1, "ls")
    found = trainer.evaluate()
    batch = PadTokens(0)(Rows(32).rows)
    with torch.no_grad():
        output = trainer.model.eval()(**batch)
    for name, loss in zip(MIXED, output.losses.tolist(), strict=True):
        assert found[f"eval_loss_{name}"] == pytest.approx(loss, rel=1e-9)
    predicted = trainer.predict(Rows(32)).predictions
    assert [part.shape[0] for part in predicted] == [32] * 5 and predicted[2].ndim == 3
    for one, other in zip(predicted, output.logits, strict=True):
        if one.ndim == 2:
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-9, atol=1e-12)

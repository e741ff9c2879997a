"""Which columns of a data set reach whom: label columns survive, and are withheld from models that do not take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_bilb import BilevelMTLTrainer
from tests.trainer.harness import BATCH, arguments, flat_parameters, run

NAMES = ["income", "education"]


class TwoHeads(nn.Module):
    """Takes `features` alone; refuses everything else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.Linear(3, 2)
        self.calls: list[set[str]] = []

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        self.calls.append({"features"})
        return {"logits": self.heads(features)}


class Everything(TwoHeads):
    """Takes `features` and anything else, and says what it got."""

    def forward(self, features: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        self.calls.append({"features", *kwargs})
        return {"logits": self.heads(features)}


def rows(size: int = 4 * BATCH) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict(
        {
            "features": torch.randn(size, 3, generator=generator).tolist(),
            "income": torch.randn(size, generator=generator).tolist(),
            "education": torch.randn(size, generator=generator).tolist(),
            "weight": torch.rand(size, generator=generator).tolist(),
        }
    )


seen: list[set[str]] = []


def losses(outputs: Any, batch: Any) -> dict[str, Tensor]:
    seen.append(set(batch))
    return {
        name: (outputs["logits"][:, k] - batch[name]).square().mean() for k, name in enumerate(NAMES) if name in batch
    }


COMMON: dict[str, Any] = {"task_names": NAMES, "label_names": NAMES, "balancer": "ls"}


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("cls", [TwoHeads, Everything])
def test_label_columns_go_to_the_loss_and_not_to_the_model(cls: Any, remove: bool, tmp_path: Path) -> None:
    seen.clear()
    model = cls()
    found = run(
        tmp_path,
        model,
        rows(),
        trainer_arguments={"task_loss_func": losses, "eval_dataset": rows(6)},
        remove_unused_columns=remove,
        eval_strategy="epoch",
        **COMMON,
    )
    expected = {"features", *NAMES} if remove else {"features", "weight", *NAMES}
    assert seen and all(columns == expected for columns in seen)
    extra = {"weight"} if cls is Everything and not remove else set()
    assert all(call == {"features", *extra} for call in model.calls)
    evaluation = found.trainer.state.log_history[-2]
    assert {"eval_loss_income", "eval_loss_education"} <= set(evaluation)
    predicted = found.trainer.predict(rows(6))
    assert predicted.predictions.shape == (6, 2) and len(predicted.label_ids) == 2


def test_prediction_without_label_columns(tmp_path: Path) -> None:
    model = TwoHeads()
    trainer = BilevelMTLTrainer(
        model=model, args=arguments(tmp_path, remove_unused_columns=False, **COMMON), task_loss_func=losses
    )
    bare = rows(6).remove_columns(NAMES)
    assert trainer.predict(bare).predictions.shape == (6, 2)
    partly = rows(6).remove_columns(NAMES[:1])
    output = trainer.predict(partly)
    assert output.label_ids is None and output.predictions.shape == (6, 2)


def test_a_wrong_label_name_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {**COMMON, "label_names": ["income", "eduction"], "remove_unused_columns": False}
    trainer = BilevelMTLTrainer(
        model=TwoHeads(), args=arguments(tmp_path, **settings), eval_dataset=rows(6), task_loss_func=losses
    )
    metrics = trainer.evaluate()
    assert not any("loss" in key for key in metrics)
    assert "no evaluation losses: the batches do not hold all of label_names ['income', 'eduction']" in caplog.text


@pytest.mark.parametrize("label_names", [NAMES, NAMES[::-1]])
def test_columns_of_labels_give_the_counts_of_a_window(label_names: list[str], tmp_path: Path) -> None:
    # Two label columns with gaps: a window of two micro-batches is one batch of twice the size.
    full = rows(4 * BATCH).to_dict()
    for i in (0, 1, 2, 5, 9):
        full["income"][i] = float("nan")
    data = Dataset.from_dict(full)

    def masked(outputs: Any, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values, counts = {}, {}
        for k, name in enumerate(NAMES):
            there = batch[name].isfinite()
            errors = torch.where(there, outputs["logits"][:, k] - batch[name].nan_to_num(), 0.0).square()
            values[name], counts[name] = errors.sum() / there.sum().clamp(min=1), there.sum()
        return values, counts

    vectors = []
    for size, steps in ((BATCH, 2), (2 * BATCH, 1)):
        model = TwoHeads().double()
        model.forward = lambda features, m=model: {"logits": m.heads(features.double())}  # type: ignore[method-assign]
        run(
            tmp_path,
            model,
            data,
            trainer_arguments={"task_loss_func": masked},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **{**COMMON, "label_names": label_names},
        )
        vectors.append(flat_parameters(model))
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-12, atol=1e-14)

"""Models without losses of their own, which return a tensor or a tuple: evaluation keeps every row and every entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_bilb import BilevelMTLTrainer
from hf_bilb.errors import TaskLossError
from hf_bilb.losses.masked import masked_mse
from tests.trainer.harness import BATCH, FLOAT, TASK_NAMES, arguments, build_data, flat_parameters, untimed


class Plain(nn.Module):
    def __init__(self, num_features: int, twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(num_features, len(TASK_NAMES)).double()
        self.twice = twice

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        predictions = self.layer(features)
        return (predictions, 2 * predictions) if self.twice else predictions


@pytest.mark.parametrize("twice", [False, True], ids=["tensor", "tuple"])
def test_predictions_are_whole(twice: bool, tmp_path: Path) -> None:
    data = build_data(2 * BATCH + 1, dtype=FLOAT)
    model = Plain(data[0]["features"].shape[0], twice)

    def losses(outputs: Any, batch: Any) -> Any:
        return masked_mse(outputs[0] if twice else outputs, batch["labels"])

    args = arguments(tmp_path, task_names=TASK_NAMES, label_names=["labels"])
    trainer = BilevelMTLTrainer(model=model, args=args, eval_dataset=data, task_loss_func=losses)
    features = torch.stack([data[i]["features"] for i in range(len(data))])
    expected = model.layer(features).detach().numpy()
    found = trainer.predict(data)
    parts = found.predictions if twice else (found.predictions,)
    for factor, part in enumerate(parts, 1):
        np.testing.assert_allclose(part, factor * expected, rtol=1e-12)
    labels = torch.stack([data[i]["labels"] for i in range(len(data))]).numpy()
    assert found.metrics["test_loss"] == pytest.approx(((expected - labels) ** 2).mean(), rel=1e-10)


@dataclass
class Record:
    losses: Tensor | None
    num_items: Tensor | None
    logits: Tensor


class Named(NamedTuple):
    losses: Any
    num_items: Any
    logits: Tensor


class Contract(Plain):
    """Keeps the contract in another form than a mapping."""

    def __init__(self, num_features: int, form: Any) -> None:
        super().__init__(num_features, twice=False)
        self.form = form

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        predictions = self.layer(features)
        return self.form(*((None, None) if labels is None else masked_mse(predictions, labels)), predictions)


def fields(losses: Any, num_items: Any, logits: Tensor) -> dict[str, Any]:
    found = {"losses": losses, "num_items": num_items, "logits": logits}
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("num_tasks", [1, len(TASK_NAMES)])
@pytest.mark.parametrize("form", [Record, Named])
def test_losses_in_a_dataclass_or_a_named_tuple(form: Any, num_tasks: int, tmp_path: Path) -> None:
    data = build_data(2 * BATCH + 1, dtype=FLOAT, missing=0.3)
    rows = [{**data[i], "labels": data[i]["labels"][:num_tasks]} for i in range(len(data))]
    results = []
    for kind in (fields, form):
        model = Contract(data[0]["features"].shape[0], kind)
        model.layer = nn.Linear(data[0]["features"].shape[0], num_tasks).double()
        with torch.no_grad():
            model.layer.weight.copy_(torch.linspace(-1, 1, model.layer.weight.numel()).view_as(model.layer.weight))
            model.layer.bias.zero_()
        args = arguments(tmp_path, task_names=TASK_NAMES[:num_tasks], eval_strategy="epoch")
        trainer = BilevelMTLTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        predicted = trainer.predict(rows)
        assert predicted.predictions.shape == (len(rows), num_tasks)
        results.append((flat_parameters(model), untimed(trainer.state.log_history), predicted.predictions))
    (plain, logs, predictions), (other, other_logs, others) = results
    assert torch.equal(plain, other) and logs == other_logs and np.array_equal(predictions, others)


@pytest.mark.parametrize("twice", [False, True], ids=["tensor", "tuple"])
def test_a_last_batch_of_one_row_without_labels(twice: bool, tmp_path: Path) -> None:
    # Trainer takes the first entry of an output of length one.
    data = build_data(2 * BATCH + 1, dtype=FLOAT)
    features = [{"features": data[i]["features"]} for i in range(len(data))]
    model = Plain(data[0]["features"].shape[0], twice)
    args = arguments(tmp_path, task_names=TASK_NAMES, label_names=["labels"])
    trainer = BilevelMTLTrainer(model=model, args=args, task_loss_func=lambda outputs, batch: pytest.fail("no labels"))
    expected = model.layer(torch.stack([row["features"] for row in features])).detach().numpy()
    found = trainer.predict(features).predictions
    for factor, part in enumerate(found if twice else (found,), 1):
        np.testing.assert_allclose(part, factor * expected, rtol=1e-12)


def test_an_output_that_no_predictions_can_be_taken_from(tmp_path: Path) -> None:
    class Opaque(Plain):
        def forward(self, features: Tensor) -> Any:
            return SimpleNamespace(logits=self.layer(features))

    data = build_data(BATCH, dtype=FLOAT)
    args = arguments(tmp_path, task_names=TASK_NAMES, label_names=["labels"])
    trainer = BilevelMTLTrainer(
        model=Opaque(data[0]["features"].shape[0], False),
        args=args,
        eval_dataset=data,
        task_loss_func=lambda outputs, batch: masked_mse(outputs.logits, batch["labels"]),
    )
    with pytest.raises(TaskLossError, match=r"^the model returned a SimpleNamespace, which predictions"):
        trainer.evaluate()

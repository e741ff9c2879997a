"""Models without losses of their own, which return a tensor or a tuple: evaluation keeps every row and every entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_bilb import BilevelMTLTrainer
from hf_bilb.task_losses import masked_mse
from tests.trainer.harness import BATCH, FLOAT, TASK_NAMES, arguments, build_data


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

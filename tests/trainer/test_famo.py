"""FAMO in the Trainer, with the same or the next batch's losses: as a loop of one's own, over a window, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bilb import build_balancer
from hf_bilb.errors import OptionError
from hf_bilb.losses.masked import masked_mse
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    assert_goes_on,
    build_data,
    build_model,
    close,
    flat_parameters,
    run,
    with_balancer,
)

FAMO: dict[str, Any] = {"name": "famo", "reevaluate": "next_batch", "learning_rate": 0.2}


def test_as_a_loop_of_ones_own(tmp_path: Path) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.4)
    found = run(tmp_path, data=data, balancer=FAMO)
    model = build_model(FLOAT)
    balancer = build_balancer(FAMO, task_names=TASK_NAMES, dtype=FLOAT)
    coefficients = with_balancer(model, data, balancer)
    assert torch.equal(torch.stack(found.record.coefficients), torch.stack(coefficients))
    assert torch.equal(found.parameters, flat_parameters(model))
    weights = torch.stack(found.record.weights)
    assert not torch.allclose(weights[0], weights[-1], rtol=0.01)
    assert torch.equal(found.trainer.balancer.state_dict()["progress.losses"], balancer.state_dict()["progress.losses"])


def test_a_window_is_one_batch(tmp_path: Path) -> None:
    data = build_data(24 * BATCH, dtype=FLOAT, missing=0.2)
    settings = {"balancer": FAMO, "balance_over": "window"}
    whole = run(tmp_path, data=data, per_device_train_batch_size=4 * BATCH, **settings)
    parts = run(tmp_path, data=data, gradient_accumulation_steps=4, **settings)
    assert close(parts.parameters, whole.parameters)
    assert close(torch.stack(parts.record.weights), torch.stack(whole.record.weights))


def test_a_resumed_run_compares_with_the_last_update_before_it(tmp_path: Path) -> None:
    data = build_data(8 * BATCH, dtype=FLOAT, missing=0.2)
    assert_goes_on(tmp_path, data, 5, balancer=FAMO)


SAME: dict[str, Any] = {"name": "famo", "learning_rate": 0.2}


def test_the_same_batch_once_more_as_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.4)
    found = run(tmp_path, data=data, balancer=SAME)
    model = build_model(FLOAT)
    balancer = build_balancer(SAME, task_names=TASK_NAMES, dtype=FLOAT)
    coefficients = with_balancer(model, data, balancer)
    assert torch.equal(torch.stack(found.record.coefficients), torch.stack(coefficients))
    assert torch.equal(found.parameters, flat_parameters(model))


def test_the_same_window_once_more(tmp_path: Path) -> None:
    data = build_data(24 * BATCH, dtype=FLOAT, missing=0.2)
    settings = {"balancer": SAME, "balance_over": "window"}
    whole = run(tmp_path, data=data, per_device_train_batch_size=4 * BATCH, **settings)
    parts = run(tmp_path, data=data, gradient_accumulation_steps=4, **settings)
    assert close(parts.parameters, whole.parameters)
    assert close(torch.stack(parts.record.weights), torch.stack(whole.record.weights))
    with pytest.raises(OptionError, match=r"^balance_over: 'micro_batch' is not valid with reevaluate: 'same_batch'"):
        run(tmp_path, data=data, gradient_accumulation_steps=4, balancer=SAME)


class Noisy(nn.Module):
    """Dropout and BatchNorm, and a record of which units were dropped."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(num_features, 7).double(), nn.Linear(7, len(TASK_NAMES)).double()
        self.norm, self.dropout = nn.BatchNorm1d(7).double(), nn.Dropout(0.5)
        self.dropped: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.norm(self.first(features))))
        self.dropped.append(hidden == 0)
        return self.last(hidden)


def test_the_second_look_drops_the_same_units_and_leaves_the_buffers_alone(tmp_path: Path) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT)
    model = Noisy(data[0]["features"].shape[0])
    functions = {"task_loss_func": lambda outputs, batch: masked_mse(outputs, batch["labels"])}
    settings = {"task_names": TASK_NAMES, "label_names": ["labels"], "balancer": SAME}
    run(tmp_path, model, data, trainer_arguments=functions, **settings)
    assert len(model.dropped) == 12
    assert all(
        torch.equal(first, second) for first, second in zip(model.dropped[::2], model.dropped[1::2], strict=True)
    )
    assert not torch.equal(model.dropped[0], model.dropped[2])
    assert int(model.norm.num_batches_tracked) == 6

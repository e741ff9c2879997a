"""Methods that keep a record of losses or updates, in the Trainer: as in a loop of one's own, and over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bilb import build_balancer
from tests.trainer.harness import BATCH, FLOAT, TASK_NAMES, batches, build_data, build_model, flat_parameters, run

METHODS: dict[str, dict[str, Any]] = {
    "rlw": {"name": "rlw", "seed": 5},
    "dwa by epoch": {"name": "dwa", "window": "epoch", "temperature": 0.1},
    "dwa by window": {"name": "dwa", "window": 2, "temperature": 0.1},
    "stch": {"name": "stch", "mu": 0.3, "warmup_epochs": 1},
    # Its coefficients have no scale of their own: with plain SGD they run away.
    "go4align": {"name": "go4align", "num_groups": 2, "step_size": 0.01, "coefficient_scale": "sum_to_one"},
}
EPOCHS = 4


@pytest.mark.parametrize("balancer", METHODS.values(), ids=METHODS)
def test_as_a_loop_of_ones_own(balancer: dict[str, Any], tmp_path: Path) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT, missing=0.3)
    found = run(tmp_path, data=data, balancer=balancer, num_train_epochs=EPOCHS)
    model, own = build_model(FLOAT), build_balancer(balancer, task_names=TASK_NAMES, dtype=FLOAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    coefficients = []
    for epoch in range(EPOCHS):
        own.on_epoch_begin(epoch)
        for batch in batches(data):
            optimizer.zero_grad()
            outputs = model(**batch)
            own.backward(outputs.losses, outputs.num_items)
            optimizer.step()
            own.step()
            coefficients.append(own.coefficients.clone())
    assert torch.equal(torch.stack(found.record.coefficients), torch.stack(coefficients))
    assert torch.equal(found.parameters, flat_parameters(model))
    assert not torch.allclose(coefficients[0], coefficients[-1], rtol=0.01)


@pytest.mark.parametrize("balancer", METHODS.values(), ids=METHODS)
def test_a_resumed_run_keeps_its_record(balancer: dict[str, Any], tmp_path: Path) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT, missing=0.3)
    settings = {"balancer": balancer, "num_train_epochs": EPOCHS}
    whole = run(tmp_path, data=data, save_strategy="steps", save_steps=11, **settings)  # in the middle of an epoch
    resumed = run(tmp_path / "nothing", data=data, max_steps=1, balancer=balancer).trainer
    resumed.args.max_steps, resumed.args.num_train_epochs = -1, EPOCHS
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))
    assert resumed.state.global_step == 4 * EPOCHS
    assert torch.equal(flat_parameters(resumed.model), whole.parameters)
    ours, theirs = resumed.balancer.state_dict(), whole.trainer.balancer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

"""Methods that keep a record of losses or updates, in the Trainer: as in a loop of one's own, under accumulation; and
the resume of every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bilb import build_balancer, list_balancers
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    assert_goes_on,
    build_data,
    build_model,
    flat_parameters,
    run,
    with_balancer,
)

METHODS: dict[str, dict[str, Any]] = {
    "rlw": {"name": "rlw", "seed": 5},
    "dwa by epoch": {"name": "dwa", "window": "epoch", "temperature": 0.1},
    "dwa by window": {"name": "dwa", "window": 2, "temperature": 0.1},
    "stch": {"name": "stch", "mu": 0.3, "warmup_epochs": 1},
    # Its coefficients have no scale of their own: with plain SGD they run away.
    "go4align": {"name": "go4align", "num_groups": 2, "step_size": 0.01, "coefficient_scale": "sum_to_one"},
}
#: Every registered method, and what of their options means other state.
RESUMED: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in list_balancers()},
    **METHODS,
    "famo by the next batch": {"name": "famo", "reevaluate": "next_batch"},
    "marigold with trial steps": {"name": "marigold", "mode": "exact", "learning_rate": 0.1},
    "marigold by the next batch": {"name": "marigold", "mode": "lagged", "learning_rate": 0.1},
}
EPOCHS = 4
PARTS = 4


@pytest.mark.parametrize("balancer", METHODS.values(), ids=METHODS)
def test_as_a_loop_of_ones_own(balancer: dict[str, Any], tmp_path: Path) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT, missing=0.3)
    found = run(tmp_path, data=data, balancer=balancer, num_train_epochs=EPOCHS)
    model, own = build_model(FLOAT), build_balancer(balancer, task_names=TASK_NAMES, dtype=FLOAT)
    coefficients = with_balancer(model, data, own, epochs=EPOCHS)
    assert torch.equal(torch.stack(found.record.coefficients), torch.stack(coefficients))
    assert torch.equal(found.parameters, flat_parameters(model))
    assert not torch.allclose(coefficients[0], coefficients[-1], rtol=0.01)


@pytest.mark.parametrize("balancer", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_keeps_its_record(balancer: dict[str, Any], tmp_path: Path) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT, missing=0.3)
    # In the middle of an epoch.
    assert_goes_on(tmp_path, data, 11, balancer=balancer, num_train_epochs=EPOCHS)


def counted(folder: Path, balancer: dict[str, Any], balance_over: str, missing: float = 0.0) -> dict[str, Any]:
    """State after four epochs of two updates, each of four micro-batches, with a model that does not move."""
    found = run(
        folder,
        data=build_data(2 * PARTS * BATCH, dtype=FLOAT, missing=missing),
        balancer=balancer,
        balance_over=balance_over,
        gradient_accumulation_steps=PARTS,
        num_train_epochs=EPOCHS,
        learning_rate=0.0,
    )
    assert found.trainer.state.global_step == 2 * EPOCHS
    return found.trainer.balancer.state_dict()


@pytest.mark.parametrize("name", ["dwa by epoch", "stch"])
def test_an_epoch_has_the_same_mean_under_both_ways_to_accumulate(name: str, tmp_path: Path) -> None:
    by_window, by_parts = (counted(tmp_path, METHODS[name], over, missing=0.4) for over in ("window", "micro_batch"))
    records = [key for key in by_window if key.startswith("objective.")]
    assert records
    for key in records:
        torch.testing.assert_close(by_parts[key], by_window[key], rtol=1e-12, atol=1e-12, msg=key)


def test_a_window_of_losses_counts_micro_batches_where_each_is_decided_on(tmp_path: Path) -> None:
    key = "objective.record.observations"
    for balance_over, losses in (("window", 2 * EPOCHS), ("micro_batch", 2 * EPOCHS * PARTS)):
        assert counted(tmp_path, METHODS["dwa by window"], balance_over)[key].tolist() == [losses] * len(TASK_NAMES)


def test_a_sum_of_losses_grows_with_every_micro_batch_that_is_decided_on(tmp_path: Path) -> None:
    by_window, by_parts = (
        counted(tmp_path, METHODS["go4align"], over)["objective.loss_sums"] for over in ("window", "micro_batch")
    )
    torch.testing.assert_close(by_parts, PARTS * by_window, rtol=1e-12, atol=0)


def test_all_micro_batches_of_an_update_share_a_draw(tmp_path: Path) -> None:
    by_window, by_parts = (
        run(
            tmp_path,
            data=build_data(4 * PARTS * BATCH, dtype=FLOAT),
            balancer=METHODS["rlw"],
            balance_over=over,
            gradient_accumulation_steps=PARTS,
        )
        for over in ("window", "micro_batch")
    )
    assert by_parts.trainer.state.global_step == 4
    torch.testing.assert_close(by_parts.parameters, by_window.parameters, rtol=1e-12, atol=1e-14)

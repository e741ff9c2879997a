"""A Trainer that nobody holds any more is gone at once, with its model, its memory and the workers of its loader."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_bilb import BilevelMTLTrainer
from tests.synthetic import build_data, build_model
from tests.trainer.harness import BATCH, FLOAT, arguments


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize(
    "settings",
    [
        {"balancer": "ls"},
        {"balancer": "famo", "gradient_accumulation_steps": 2, "balance_over": "window"},
        {"balancer": "bilb", "diagnostics": {"every_n_steps": 2, "inner_steps": 1, "inner_learning_rate": 0.01}},
        {"balancer": {"name": "marigold", "mode": "exact"}, "nonfinite_loss": "skip"},
        {"balancer": {"name": "mgda"}, "gradient_accumulation_steps": 2, "balance_over": "window"},
        {"balancer": "uw", "diagnostics": {"gradients": {"every_n_steps": 2}}},
        {
            "balancer": "ls",
            "early_stopping": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "loss",
        },
    ],
    ids=lambda settings: str(settings["balancer"]),
)
def test_a_trainer_holds_itself_nowhere(settings: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(FLOAT)
    held, known = weakref.ref(model), build_data(4 * BATCH, dtype=FLOAT)
    trainer = BilevelMTLTrainer(model, arguments(tmp_path, **settings), train_dataset=known, eval_dataset=known)
    trainer.train()
    trainer.evaluate()
    del model, trainer
    assert held() is None

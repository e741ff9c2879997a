"""Which checkpoints stay: `save_total_limit`, and weights that are not finite."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints as stock_rotation

from hf_bilb.storage.checkpoint_marker import MARKER, read_marker
from hf_bilb.storage.checkpoint_rotation import rotate_checkpoints
from hf_bilb.trainer.finite_weights import weights_are_finite
from tests.checkpoints.runs import Begin, Run, build_trainer

NAN, INF = float("nan"), float("inf")


def folder_with(place: Path, described: str) -> Path:
    """`5f 10n 15?`: checkpoints of steps with finite weights, without, and without a marker; the later the younger."""
    for age, word in enumerate(described.split()):
        checkpoint = place / f"checkpoint-{word[:-1]}"
        checkpoint.mkdir(parents=True)
        if word[-1] != "?":
            content = {"format": 3, "files": {}, "finite_weights": word[-1] == "f"}
            (checkpoint / MARKER).write_text(json.dumps(content))
        os.utime(checkpoint, (1e9 + 10 * age, 1e9 + 10 * age))
    return place


def left(place: Path) -> list[int]:
    assert all(path.name.startswith("checkpoint-") for path in place.iterdir())
    return sorted(int(path.name.split("-")[1]) for path in place.iterdir())


@pytest.mark.parametrize(
    ("there", "limit", "best", "stay"),
    [
        ("5f 10f 15n 20n", 2, None, [5, 10, 20]),
        ("5f 10f 15n 20n", 1, None, [10, 20]),
        ("5f 10n 15f 20n 25f", 2, None, [15, 25]),
        ("5n 10n", 1, None, [10]),
        ("5f 10f 15f 20n", 1, 5, [5, 15, 20]),
        ("5f 10n", 2, None, [5, 10]),
        ("5f 10n 15n", None, None, [5, 10, 15]),
        ("5f 10n 15n", 0, None, [5, 10, 15]),
        ("100f 5f 10f", 2, None, [5, 10]),  # a run that was started over: by age, not by number
    ],
)
def test_no_finite_one_goes_for_one_that_is_not(
    tmp_path: Path, there: str, limit: int | None, best: int | None, stay: list[int]
) -> None:
    place = folder_with(tmp_path, there)
    rotate_checkpoints(place, limit, None if best is None else str(place / f"checkpoint-{best}"))
    assert left(place) == stay


@pytest.mark.parametrize("there", ["5f 10f 15f 20f", "5? 10? 15? 20?", "20f 5f 10f 15f", "5f"])
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("best", [None, 5, 10, 20])
def test_among_finite_ones_it_is_the_rotation_of_trainer(
    tmp_path: Path, there: str, limit: int | None, best: int | None
) -> None:
    ours, stock = folder_with(tmp_path / "ours", there), folder_with(tmp_path / "stock", there)
    rotate_checkpoints(ours, limit, None if best is None else ours / f"checkpoint-{best}")
    stock_rotation(str(stock), limit, None if best is None else str(stock / f"checkpoint-{best}"), use_mtime=True)
    assert left(ours) == left(stock)


@pytest.mark.parametrize(
    ("change", "finite"),
    [
        (lambda model: None, True),
        (lambda model: model.weight.data[0, 0].fill_(NAN), False),
        (lambda model: model.weight.data[0, 0].fill_(-INF), False),
        (lambda model: model.frozen.data.fill_(-INF), True),
        (lambda model: model.mask.fill_(-INF), True),
        (lambda model: model.mask[0].fill_(NAN), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_finite_weights_are(change: Any, finite: bool, dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    model.frozen = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    model.register_buffer("mask", torch.zeros(2, dtype=dtype))
    model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    change(model)
    assert weights_are_finite(model, torch.device("cpu")) is finite


class Poison(TrainerCallback):
    """NaN in a weight from `step` on, behind finite losses: the last column of the features is zero."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = NAN


RUN = Run(
    0, 0, {"balancer": "bilb", "num_train_epochs": 1, "save_steps": 2, "save_total_limit": 2, "nonfinite_loss": "skip"}
)


def is_finite(checkpoint: Path) -> bool:
    return all(bool(value.isfinite().all()) for value in load_file(checkpoint / "model.safetensors").values())


def test_a_run_that_turns_nan_keeps_what_it_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_trainer(RUN, tmp_path)
    trainer.add_callback(Poison(7))
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        trainer.train()
    finite = {step: is_finite(tmp_path / f"checkpoint-{step}") for step in left(tmp_path)}
    assert finite == {4: True, 6: True, 11: False}
    for step, expected in finite.items():
        marker = read_marker(tmp_path / f"checkpoint-{step}")
        assert marker is not None and marker.finite_weights is expected
    assert any("checkpoint-8" in m and "NOT FINITE" in m for m in caplog.messages)


def resumed(folder: Path, resume: str | bool, caplog: pytest.LogCaptureFixture) -> tuple[int, list[str]]:
    trainer, begin = build_trainer(RUN, folder, max_steps=12, save_strategy="no"), Begin()
    trainer.add_callback(begin)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        trainer.train(resume_from_checkpoint=resume)
    return begin.step, [record.getMessage() for record in caplog.records if record.name.startswith("hf_bilb")]


def test_a_resume_takes_the_last_finite_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_trainer(RUN, tmp_path)
    trainer.add_callback(Poison(7))
    trainer.train()
    step, warnings = resumed(tmp_path, True, caplog)
    assert step == 6
    assert "checkpoint-11: its weights are not finite; those of checkpoint-6 are" in warnings[0]
    # Asked for by its path it is taken, with a word; and where there is no other one.
    step, warnings = resumed(tmp_path, str(tmp_path / "checkpoint-11"), caplog)
    assert step == 11 and "checkpoint-11: its weights are NOT FINITE" in warnings[0]
    for name in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / name).rename(tmp_path / f"away-{name}")
    step, warnings = resumed(tmp_path, True, caplog)
    assert step == 11 and "NOT FINITE" in warnings[0]


def test_weights_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    # A metric that likes NaN: with save_total_limit 1, Trainer would delete all other checkpoints at the end.
    settings = {
        "save_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    trainer = build_trainer(RUN, tmp_path, **settings)
    evaluate = trainer._evaluate
    trainer._evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_score": trainer.state.global_step}
    trainer.add_callback(Poison(7))
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-5"
    assert trainer.state.best_metric == 5 and trainer.state.best_global_step == 5
    assert is_finite(tmp_path / "checkpoint-5")
    assert weights_are_finite(trainer.model, torch.device("cpu"))

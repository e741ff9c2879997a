"""`learning_rates`, `freeze` and `early_stopping`: as by hand, after a resume, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_bilb import BilevelMTLTrainer
from hf_bilb.errors import OptionError
from hf_bilb.trainer.early_stopping import evaluations_without_gain
from tests.synthetic import build_data, build_model, flat_parameters, relative_difference
from tests.trainer.harness import BATCH, FLOAT, arguments, assert_goes_on, batches, run

ROWS = 6 * BATCH


def trainer(folder: Path, **settings: Any) -> BilevelMTLTrainer:
    args = arguments(folder, **{"balancer": "ls", **settings})
    return BilevelMTLTrainer(build_model(FLOAT), args, train_dataset=build_data(ROWS, dtype=FLOAT))


# --- learning_rates --------------------------------------------------------------------------------------------------


def test_rates_of_parts_are_those_of_torchs_groups_under_a_schedule(tmp_path: Path) -> None:
    settings = {
        "learning_rates": {"heads.bias": 0.0, "heads": 0.2},
        "learning_rate": 0.05,
        "lr_scheduler_type": "linear",
    }
    found = run(tmp_path, data=build_data(ROWS, dtype=FLOAT), balancer="ls", **settings)
    model = build_model(FLOAT)
    groups = [
        {"params": model.trunk.parameters(), "lr": 0.05},
        {"params": [model.heads.weight], "lr": 0.2},
        {"params": [model.heads.bias], "lr": 0.0},
    ]
    optimizer = torch.optim.SGD(groups)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 6)
    for batch in batches(build_data(ROWS, dtype=FLOAT)):
        optimizer.zero_grad()
        model(batch["features"], batch["labels"]).losses.sum().backward()
        optimizer.step()
        schedule.step()
    assert relative_difference(found.parameters, flat_parameters(model)) <= 1e-14
    assert found.record.learning_rates[0] == pytest.approx(0.05 * 5 / 6)  # the log shows that of all others


def test_weight_decay_stays_where_trainer_puts_it(tmp_path: Path) -> None:
    built = trainer(tmp_path, learning_rates={"heads": 0.2}, weight_decay=0.1, optim="adamw_torch")
    groups = built.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in built.model.named_parameters()}
    by_name = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert by_name["heads.weight"] == (0.2, 0.1) and by_name["heads.bias"] == (0.2, 0.0)
    assert by_name["trunk.0.weight"] == (0.05, 0.1) and by_name["trunk.0.bias"] == (0.05, 0.0)
    assert len(by_name) == len(names)


@pytest.mark.parametrize("settings", [{"learning_rates": {"heads": 0.2}}, {"freeze": ["trunk"]}], ids=str)
def test_a_run_that_goes_on_is_the_same_to_the_last_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    data = build_data(ROWS, dtype=FLOAT)
    assert_goes_on(tmp_path, data, 3, balancer="bilb", optim="adamw_torch", lr_scheduler_type="cosine", **settings)


def test_a_router_follows_the_rate_of_the_arguments(tmp_path: Path) -> None:
    built = trainer(tmp_path, balancer={"name": "uw", "learning_rate": "follow_model"}, learning_rates={"*": 0.2})
    built.train()
    plain = trainer(tmp_path / "plain", balancer={"name": "uw", "learning_rate": 0.05}, learning_rates={"*": 0.2})
    plain.train()
    torch.testing.assert_close(built.balancer.snapshot(), plain.balancer.snapshot())


# --- freeze ----------------------------------------------------------------------------------------------------------


def test_what_is_frozen_stays_and_is_in_no_group(tmp_path: Path) -> None:
    built = trainer(tmp_path, freeze=["trunk.0"], optim="adamw_torch", weight_decay=0.1)
    before = {name: parameter.clone() for name, parameter in built.model.named_parameters()}
    built.train()
    moved = {name for name, parameter in built.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if not name.startswith("trunk.0")}
    assert sum(len(group["params"]) for group in built.optimizer.param_groups) == len(moved)


# --- early_stopping --------------------------------------------------------------------------------------------------


def test_how_many_evaluations_were_no_better() -> None:
    assert evaluations_without_gain([3.0, 2.0, 2.5, 2.1], False, 0.0) == 2
    assert evaluations_without_gain([3.0, 2.0, 1.95, 1.91], False, 0.1) == 2
    assert evaluations_without_gain([3.0, 2.0, 1.95, 1.85], False, 0.1) == 0  # better than the best, not than the last
    assert evaluations_without_gain([0.1, 0.3, 0.2, float("nan")], True, 0.0) == 2
    assert evaluations_without_gain([float("nan"), 0.2], True, 0.0) == 0
    assert evaluations_without_gain([], True, 0.0) == 0


class Scripted(BilevelMTLTrainer):
    """Evaluations of given values."""

    values: list[float]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        number = sum("eval_loss" in entry for entry in self.state.log_history)
        metrics = {"eval_loss": self.values[number]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def scripted(folder: Path, values: list[float], **settings: Any) -> Scripted:
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    args = arguments(folder, **{"balancer": "ls", **evaluating, **settings})
    rows = build_data(ROWS, dtype=FLOAT)
    built = Scripted(build_model(FLOAT), args, train_dataset=rows, eval_dataset=rows)
    built.values = values
    return built


@pytest.mark.parametrize(
    ("given", "steps"), [(2, 4), ("2", 4), ({"patience": 1}, 3), ({"patience": 1, "threshold": 0.5}, 2), (None, 6)]
)
def test_training_ends_when_evaluations_are_no_better(given: Any, steps: int, tmp_path: Path) -> None:
    built = scripted(tmp_path, [1.0, 0.9, 0.95, 0.92, 0.5, 0.4], early_stopping=given)
    built.train()
    assert built.state.global_step == steps


def test_a_resumed_run_stops_where_the_whole_one_does(tmp_path: Path) -> None:
    values = [1.0, 0.9, 0.95, 0.92, 0.91, 0.4]
    whole = scripted(tmp_path, values, early_stopping=3, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = scripted(tmp_path / "other", values, early_stopping=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step == 5


def test_a_list_of_callbacks_that_is_emptied_does_not_keep_it_from_stopping(tmp_path: Path) -> None:
    built = scripted(tmp_path, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], early_stopping=1)
    built.callback_handler.callbacks = built.callback_handler.callbacks[:1]  # Trainer's own, which steers the loop
    built.train()
    assert built.state.global_step == 2


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rates": {"heds": 0.1}}, r"^learning_rates: 'heds' means no parameter .*\"heads\""),
        ({"learning_rates": {"heads": -1}}, r"^learning_rates\.heads: -1\.0 is not valid, expected a number >= 0"),
        ({"learning_rates": {"heads": "fast"}}, r"^learning_rates"),
        ({"learning_rates": {"trunk": 0.1}, "freeze": ["trunk"]}, r"^learning_rates: 'trunk' means no parameter"),
        ({"freeze": ["trunc"]}, r"^freeze: 'trunc' means no parameter .*\"trunk\""),
        ({"freeze": ["*"]}, r"^freeze: \['\*'\] leaves no parameter that is trained"),
        ({"freeze": "trunk"}, r"^freeze"),
        ({"early_stopping": 2}, r"^early_stopping: needs evaluations"),
        ({"early_stopping": 2, "eval_strategy": "epoch"}, r"^early_stopping: needs metric_for_best_model"),
        (
            {"early_stopping": 0, "eval_strategy": "epoch", "metric_for_best_model": "loss"},
            r"^early_stopping\.patience: 0",
        ),
        (
            {"early_stopping": {"patient": 1}},
            r"^early_stopping\.patient: unknown option, value 1 \(did you mean \"patience\"",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_refused_before_training(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        trainer(tmp_path, **settings)


def test_rates_are_refused_with_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = build_model(FLOAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = arguments(tmp_path, balancer="ls", learning_rates={"heads": 0.2})
    with pytest.raises(OptionError, match=r"^learning_rates: would be ignored with an optimizer of your own"):
        BilevelMTLTrainer(model, args, train_dataset=build_data(8, dtype=FLOAT), optimizers=(optimizer, None))

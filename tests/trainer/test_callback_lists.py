"""Training does not depend on the list of callbacks, which users empty, replace and fill with their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_bilb import BilevelMTLTrainer
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    arguments,
    build_data,
    build_model,
    flat_parameters,
    plain_settings,
    run,
    untimed,
)


def remove_all_but_the_flow(trainer: Any) -> None:
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is not DefaultFlowCallback:
            trainer.remove_callback(callback)


def put_another_list(trainer: Any) -> None:
    trainer.callback_handler.callbacks = [DefaultFlowCallback()]


def put_another_handler(trainer: Any) -> None:
    trainer.callback_handler = CallbackHandler([DefaultFlowCallback], trainer.model, None, None, None)


def pop_by_class(trainer: Any) -> None:
    while trainer.callback_handler.callbacks[-1:] and len(trainer.callback_handler.callbacks) > 1:
        trainer.pop_callback(type(trainer.callback_handler.callbacks[-1]))


@pytest.mark.parametrize("habit", [remove_all_but_the_flow, put_another_list, put_another_handler, pop_by_class])
def test_an_emptied_list_changes_nothing(habit: Callable[[Any], None], tmp_path: Path) -> None:
    rows = build_data(5 * BATCH, dtype=FLOAT)
    expected = run(tmp_path, data=rows)
    trainer = BilevelMTLTrainer(build_model(FLOAT), arguments(tmp_path), train_dataset=rows)
    habit(trainer)
    output = trainer.train()
    assert torch.equal(flat_parameters(trainer.model), expected.parameters)
    assert untimed(trainer.state.log_history) == untimed(expected.trainer.state.log_history)
    found, wanted = trainer.balancer.state_dict(), expected.trainer.balancer.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert output.training_loss == expected.trainer.state.log_history[-1]["train_loss"] != 0


def test_an_emptied_list_does_not_turn_the_check_of_losses_off(tmp_path: Path) -> None:
    rows = build_data(2 * BATCH, dtype=FLOAT)
    rows.labels[BATCH, 0] = float("inf")
    trainer = BilevelMTLTrainer(build_model(FLOAT), arguments(tmp_path), train_dataset=rows)
    remove_all_but_the_flow(trainer)
    with pytest.raises(ArithmeticError, match=r"^the loss of task 'alpha' is inf at step 2"):
        trainer.train()


class Exact(TrainerCallback):
    """Takes what the Trainer hands over, by name, and nothing else."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_train_begin(
        self, args, state, control, model, processing_class, optimizer, lr_scheduler, train_dataloader, eval_dataloader
    ):  # fmt: skip
        self.seen.append(("on_train_begin", model))

    def on_step_end(
        self, args, state, control, model=None, processing_class=None, optimizer=None, lr_scheduler=None,
        train_dataloader=None, eval_dataloader=None,
    ):  # fmt: skip
        self.seen.append(("on_step_end", optimizer))

    def on_log(
        self, args, state, control, model, processing_class, optimizer, lr_scheduler, train_dataloader,
        eval_dataloader, logs,
    ):  # fmt: skip
        self.seen.append(("on_log", logs))


class Keeper(TrainerCallback):
    """Keeps every keyword that it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, set[str]]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **kwargs: self.calls.append((name, set(kwargs)))


def test_callbacks_with_exact_keywords(tmp_path: Path) -> None:
    callback = Exact()
    run(tmp_path, max_steps=2, trainer_arguments={"callbacks": [callback]})
    events = [name for name, _ in callback.seen]
    assert events.count("on_train_begin") == 1 and events.count("on_step_end") == 2 and events.count("on_log") == 3
    assert all(value is not None for _, value in callback.seen)


def test_callbacks_get_the_keywords_of_trainer_and_the_balancer(tmp_path: Path) -> None:
    ours, theirs = Keeper(), Keeper()
    settings = plain_settings(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, gradient_accumulation_steps=2)
    rows = build_data(4 * BATCH, dtype=FLOAT)

    class Plain(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            return (outputs.losses.sum(), outputs) if return_outputs else outputs.losses.sum()

    for kind, keeper in ((BilevelMTLTrainer, ours), (Plain, theirs)):
        args = TrainingArguments(**settings)
        kind(build_model(FLOAT), args, train_dataset=rows, eval_dataset=rows, callbacks=[keeper]).train()
    called = [(name, keywords) for name, keywords in ours.calls if name != "on_init_end"]
    assert called == [(name, keywords | {"balancer"}) for name, keywords in theirs.calls if name != "on_init_end"]
    assert {name for name, _ in called} >= {"on_train_begin", "on_pre_optimizer_step", "on_log", "on_evaluate"}


def test_a_callback_may_replace_the_control_and_stop_training(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 2
            return control

    assert run(tmp_path, trainer_arguments={"callbacks": [Stop()]}).trainer.state.global_step == 2


class Reruns(TrainerCallback):
    """How many micro-batches could be run once more, before the optimizer's step and at the end of the step."""

    def __init__(self) -> None:
        self.trainer: BilevelMTLTrainer | None = None
        self.found: list[tuple[str, int]] = []

    def note(self, event: str) -> None:
        assert self.trainer is not None
        self.found.append((event, len(self.trainer.reevaluations())))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("before")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("end")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nothing_is_run_again_once_a_step_is_over(accumulation: int, tmp_path: Path) -> None:
    reruns = Reruns()
    args = arguments(
        tmp_path, balancer="famo", max_steps=2, gradient_accumulation_steps=accumulation, balance_over="window"
    )
    rows = build_data(4 * BATCH, dtype=FLOAT)
    trainer = BilevelMTLTrainer(build_model(FLOAT), args, train_dataset=rows, callbacks=[reruns])
    reruns.trainer = trainer
    trainer.train()
    assert reruns.found == 2 * [("before", accumulation), ("end", 0)]

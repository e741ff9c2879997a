"""Arguments that change after a Trainer was built hold from the next training on: by hand, or in a search's trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bilb import BilevelMTLTrainer, OptionError, build_balancer
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    arguments,
    build_data,
    build_model,
    flat_parameters,
    run,
    with_balancer,
)

ROWS = 4 * BATCH


def fresh_trainer(folder: Path, **settings: Any) -> BilevelMTLTrainer:
    def model_init() -> Any:
        return build_model(FLOAT)

    return BilevelMTLTrainer(
        args=arguments(folder, **settings),
        train_dataset=build_data(ROWS, dtype=FLOAT),
        eval_dataset=build_data(ROWS, dtype=FLOAT, seed=1),
        model_init=model_init,
    )


class Seen(BilevelMTLTrainer):
    """Remembers what each training trained with."""

    found: list[Any]

    def begin_run(self) -> None:
        super().begin_run()
        options = self.balancer.options
        self.found.append((self.balancer.name, options, self.balancer.absent_tasks, self.balancer._rules.has_priors))


@pytest.mark.slow
def test_a_search_over_balancers_trains_each_of_them(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    balancers = ["ls", "famo", {"name": "stch", "mu": 0.25}, {"name": "bilb", "pairs": "all"}, {"name": "uw"}]
    trainer = fresh_trainer(tmp_path, eval_strategy="epoch", balancer="bilb")
    trainer.__class__, trainer.found = Seen, []  # type: ignore[attr-defined]
    priors = [2.0, 1.0, 1.0, 1.0]

    def space(trial: Any) -> dict[str, Any]:
        number = trial.suggest_int("number", 0, 4)
        return {"balancer": balancers[number], "task_priors": priors if number == 0 else None, "absent_tasks": "hold"}

    sampler = optuna.samplers.GridSampler({"number": list(range(5))})
    best = trainer.hyperparameter_search(
        hp_space=space, n_trials=5, direction="minimize", backend="optuna", sampler=sampler,
        compute_objective=lambda metrics: metrics["eval_loss"],
    )  # fmt: skip
    found = {one[0]: one for one in trainer.found}  # type: ignore[attr-defined]
    assert found.keys() == {"ls", "famo", "stch", "bilb", "uw"}
    assert found["stch"][1].mu == 0.25 and found["bilb"][1].pairs == "all"
    assert all(absent == "hold" for _, _, absent, _ in found.values())
    assert found["ls"][3] and not any(one[3] for name, one in found.items() if name != "ls")
    # Each trial's evaluation is what a run of its own gives.
    losses = []
    for number, balancer in enumerate(balancers):
        alone = fresh_trainer(
            tmp_path, balancer=balancer, absent_tasks="hold", task_priors=priors if number == 0 else None
        )
        alone.train()
        losses.append(alone.evaluate()["eval_loss"])
    assert best.objective == min(losses) and best.hyperparameters["number"] == losses.index(min(losses))


def test_a_trial_that_cannot_work_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trainer = fresh_trainer(tmp_path, eval_strategy="epoch")
    with pytest.raises(OptionError, match=r"^balancer: 'blib' is not known \(did you mean"):
        trainer.hyperparameter_search(hp_space=lambda trial: {"balancer": "blib"}, n_trials=1, backend="optuna")


def test_another_method_by_hand_starts_fresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = build_data(ROWS, dtype=FLOAT)
    trainer = run(tmp_path, data=rows, balancer="ls").trainer
    trainer.args.balancer = {"name": "uw"}
    trainer.train()
    assert trainer.balancer.name == "uw"
    assert "the arguments were changed since the last training: balancer uw starts fresh" in caplog.text
    model = build_model(FLOAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for name in ("ls", "uw"):
        with_balancer(model, rows, build_balancer(name, task_names=TASK_NAMES, dtype=FLOAT), optimizer=optimizer)
    assert torch.allclose(flat_parameters(trainer.model), flat_parameters(model), rtol=1e-12, atol=1e-14)
    trainer.args.balancer = "blib"
    with pytest.raises(OptionError, match=r"^balancer: 'blib' is not known"):
        trainer.train()


def test_what_does_not_go_together_is_refused_after_a_change_too(tmp_path: Path) -> None:
    trainer = run(tmp_path, data=build_data(ROWS, dtype=FLOAT), balancer="famo").trainer
    trainer.args.gradient_accumulation_steps = 2
    with pytest.raises(OptionError, match=r"^balance_over: 'micro_batch' is not valid with reevaluate: 'same_batch'"):
        trainer.train()
    trainer.args.gradient_accumulation_steps, trainer.args.task_priors = 1, [1.0]
    for _ in range(2):  # and again, not passed over the second time
        with pytest.raises(OptionError, match=r"^task_priors: got 1 values, expected one for each of the 4 tasks"):
            trainer.train()
    trainer.args.task_priors = None
    trainer.args.balance_over = "windw"
    with pytest.raises(OptionError, match=r"^balance_over: 'windw' is not valid"):
        trainer.train()


def test_other_priors_by_hand_keep_what_was_learned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, data=build_data(ROWS, dtype=FLOAT), balancer="uw").trainer
    learned = trainer.balancer.state_dict()
    trainer.args.task_priors = [0.0, 1.0, 1.0, 1.0]
    trainer.args.num_train_epochs = 0.25
    trainer.train()
    assert "balancer uw goes on" in caplog.text
    assert trainer.balancer.coefficients[0] == 0 and bool((trainer.balancer.coefficients[1:] > 0).all())
    moved = trainer.balancer.state_dict()["objective.log_variance"] - learned["objective.log_variance"]
    assert 0 < float(moved.abs().max()) < 0.05  # a step or two, and not back to the start


def test_unchanged_arguments_go_on_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, data=build_data(ROWS, dtype=FLOAT), balancer="uw").trainer
    balancer = trainer.balancer
    trainer.train()
    assert trainer.balancer is balancer and "were changed" not in caplog.text


def test_other_tasks_and_sampling_by_hand(tmp_path: Path) -> None:
    model = torch.nn.Linear(6, 2, dtype=FLOAT)
    model.forward = lambda features: torch.nn.functional.linear(features, model.weight, model.bias)  # type: ignore

    def losses(outputs: Any, batch: Any) -> Any:
        return (outputs - batch["labels"][:, :2].nan_to_num()).square().mean(0)

    trainer = run(
        tmp_path, model, build_data(ROWS, dtype=FLOAT), task_names=["a", "b"], label_names=["labels"],
        trainer_arguments={"task_loss_func": losses},
    ).trainer  # fmt: skip
    trainer.args.task_names = ["first", "second"]
    trainer.train()
    assert trainer.task_names == trainer.balancer.task_names == ("first", "second")
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"loss/first", "loss/second"} <= last.keys() and "loss/a" not in last
    assert "eval_loss_second" in trainer.evaluate(build_data(ROWS, dtype=FLOAT))
    trainer.args.diagnostics = {"every_n_steps": 1, "inner_steps": 1}
    for count in (1, 1, 0):
        trainer.train()
        names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
        assert names.count("LowerLevelDiagnostics") == count
        if count == 1 and trainer.args.num_train_epochs == 1:
            trainer.args.num_train_epochs = 0.5
        else:
            trainer.args.diagnostics = None

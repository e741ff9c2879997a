"""`eval_loss` and `eval_loss_<task>` are exact, whatever the batches and the balancer; predictions are the logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bilb import BilevelMTLTrainer
from tests.synthetic import SyntheticData
from tests.trainer.harness import BATCH, FLOAT, TASK_NAMES, arguments, batches, build_data, build_model, run


def held_out(size: int = 3 * BATCH + 2) -> SyntheticData:
    """Partial labels, no whole number of batches; task 1 is missing in one batch, task 3 has a single label."""
    data = build_data(size, dtype=FLOAT, missing=0.4, seed=9)
    data.labels[BATCH : 2 * BATCH, 1] = torch.nan
    data.labels[:, 3] = torch.nan
    data.labels[-1, 3] = 0.5
    return data


def exact_losses(model: nn.Module, data: SyntheticData) -> dict[str, float]:
    """By hand, on all examples at once."""
    with torch.no_grad():
        errors = (model(data.features).logits - data.labels).square()
    return {name: float(errors[:, k].nanmean()) for k, name in enumerate(TASK_NAMES)}


def trainer_for(folder: Path, model: nn.Module | None = None, **settings: Any) -> BilevelMTLTrainer:
    more = settings.pop("trainer_arguments", {})
    return BilevelMTLTrainer(
        model=build_model(FLOAT) if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=build_data(3 * BATCH, dtype=FLOAT),
        eval_dataset=held_out(),
        **more,
    )


@pytest.mark.parametrize("batch_size", [1, 4, 5, 14, 64])
@pytest.mark.parametrize("name", ["bilb", "si"])
def test_losses_are_those_of_the_whole_set(name: str, batch_size: int, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, balancer=name, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    expected = exact_losses(trainer.model, trainer.eval_dataset)
    for task, loss in expected.items():
        assert metrics[f"eval_loss_{task}"] == pytest.approx(loss, rel=1e-12)
    assert metrics["eval_loss"] == pytest.approx(sum(expected.values()) / 4, rel=1e-12)


def test_eval_loss_is_independent_of_the_balancer(tmp_path: Path) -> None:
    metrics = []
    for balancer in (
        "ls",
        {"name": "bilb", "initial_logits": [5.0, -5.0, 0.0, 2.0]},
        {"name": "uw", "learning_rate": 9},
    ):
        for priors in (None, [0.0, 3.0, 1.0, 1.0]):
            trainer = trainer_for(tmp_path, balancer=balancer, task_priors=priors)
            metrics.append({k: v for k, v in trainer.evaluate().items() if "loss" in k})
    assert all(entry == metrics[0] for entry in metrics)


def test_evaluation_changes_nothing_of_the_balancer(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, balancer={"name": "bilb", "reference": {"mean_of": 5}}, absent_tasks="hold")
    before = trainer.balancer.state_dict()
    trainer.evaluate()
    after = trainer.balancer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert trainer.balancer.coefficients is None
    # Nor does an evaluation in mid-training, and before step 1.
    often = run(
        tmp_path,
        trainer_arguments={"eval_dataset": held_out()},
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=1,
        gradient_accumulation_steps=2,
    )
    never = run(tmp_path, gradient_accumulation_steps=2)
    assert torch.equal(often.parameters, never.parameters)
    assert sum("eval_loss" in entry for entry in often.trainer.state.log_history) == 4
    ours, theirs = often.trainer.balancer.state_dict(), never.trainer.balancer.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_tasks_without_a_label_have_no_entry(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    data = held_out()
    data.labels[:, 2] = torch.nan
    metrics = trainer.evaluate(data)
    assert "eval_loss_gamma" not in metrics
    losses = [metrics[f"eval_loss_{task}"] for task in TASK_NAMES if task != "gamma"]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 3, rel=1e-12)


def test_a_set_without_any_label_has_no_eval_loss(tmp_path: Path) -> None:
    # Zero would look like a perfect model and be taken for the best checkpoint.
    data = held_out()
    data.labels[:] = torch.nan
    metrics = trainer_for(tmp_path).evaluate(data)
    assert not any("loss" in key for key in metrics)


def test_an_infinite_loss_shows(tmp_path: Path) -> None:
    data = held_out()
    data.labels[3, 0] = torch.inf
    metrics = trainer_for(tmp_path).evaluate(data)
    assert metrics["eval_loss_alpha"] == math.inf and metrics["eval_loss"] == math.inf
    assert math.isfinite(metrics["eval_loss_beta"])


def mean_error(prediction: Any) -> dict[str, float]:
    assert prediction.predictions.shape == prediction.label_ids.shape == (14, 4)
    return {"mae": float(abs(prediction.predictions - prediction.label_ids).mean())}


def test_metrics_see_logits_and_labels_alone(tmp_path: Path) -> None:
    data = build_data(14, dtype=FLOAT, seed=9)
    model = build_model(FLOAT, auxiliary_weight=0.5)
    trainer = trainer_for(tmp_path, model, trainer_arguments={"compute_metrics": mean_error})
    metrics = trainer.evaluate(data)
    with torch.no_grad():
        logits = model(data.features).logits
    assert metrics["eval_mae"] == pytest.approx(float((logits - data.labels).abs().mean()), rel=1e-12)
    # The auxiliary loss is no task.
    assert metrics["eval_loss"] == pytest.approx(sum(exact_losses(model, data).values()) / 4, rel=1e-12)
    output = trainer.predict(data)
    assert torch.equal(torch.from_numpy(output.predictions), logits.to(torch.float64))
    assert output.metrics["test_loss"] == metrics["eval_loss"] and output.metrics["test_mae"] == metrics["eval_mae"]
    assert output.metrics["test_loss_beta"] == metrics["eval_loss_beta"]


def test_a_model_without_a_config_predicts_its_logits_alone(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model(FLOAT, auxiliary_weight=0.5)

        def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {key: value for key, value in self.inner(features, labels).items() if value is not None}

    trainer = trainer_for(tmp_path, Bare(), task_names=TASK_NAMES)
    for data in (held_out(), [{"features": row} for row in held_out().features]):
        output = trainer.predict(data)
        assert output.predictions.shape == (14, 4)


def test_predict_without_labels(tmp_path: Path) -> None:
    data = build_data(7, dtype=FLOAT)
    trainer = trainer_for(tmp_path)
    output = trainer.predict([{"features": row} for row in data.features])
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(output.predictions), trainer.model(data.features).logits)
    assert output.label_ids is None and not any("loss" in key for key in output.metrics)


@pytest.mark.slow
def test_several_evaluation_sets_and_the_best_checkpoint_by_a_task(tmp_path: Path) -> None:
    sets = {"near": held_out(), "far": held_out(10)}
    trainer = trainer_for(tmp_path)
    trainer.eval_dataset = sets
    metrics = trainer.evaluate()
    for name, data in sets.items():
        expected = exact_losses(trainer.model, data)
        for task, loss in expected.items():
            assert metrics[f"eval_{name}_loss_{task}"] == pytest.approx(loss, rel=1e-12)
    best = run(
        tmp_path,
        trainer_arguments={"eval_dataset": held_out()},
        eval_strategy="epoch",
        save_strategy="epoch",
        num_train_epochs=3,
        metric_for_best_model="loss_alpha",
        load_best_model_at_end=True,
    )
    losses = [entry["eval_loss_alpha"] for entry in best.trainer.state.log_history if "eval_loss" in entry]
    assert best.trainer.state.best_metric == min(losses)
    assert best.trainer.evaluate()["eval_loss_alpha"] == min(losses)


def test_batch_eval_metrics_and_dropout(tmp_path: Path) -> None:
    model = build_model(FLOAT, dropout=0.5)
    trainer = trainer_for(tmp_path, model)
    metrics = trainer.evaluate()
    model.eval()
    expected = exact_losses(model, trainer.eval_dataset)
    assert metrics["eval_loss"] == pytest.approx(sum(expected.values()) / 4, rel=1e-12)


def test_evaluation_with_a_task_loss_func_and_counts(tmp_path: Path) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model(FLOAT)

        def forward(self, features: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(features).logits}

    def losses(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        there = batch["labels"].isfinite()
        errors = torch.where(there, outputs["logits"] - batch["labels"].nan_to_num(), 0.0).square()
        return errors.sum(0) / there.sum(0).clamp(min=1), there.sum(0)

    model = Logits()
    more = {"task_loss_func": losses}
    trainer = trainer_for(
        tmp_path, model, trainer_arguments=more, task_names=TASK_NAMES, label_names=["labels"], eval_strategy="no"
    )
    metrics = trainer.evaluate()
    expected = exact_losses(model.inner, trainer.eval_dataset)
    assert [metrics[f"eval_loss_{task}"] for task in TASK_NAMES] == pytest.approx(list(expected.values()), rel=1e-12)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (14, 4)
    without = trainer.predict([{"features": row} for row in trainer.eval_dataset.features])
    assert without.predictions.shape == (14, 4)


def test_the_loss_of_one_batch_is_the_mean_over_the_tasks_with_labels(tmp_path: Path) -> None:
    # What a subclass or a callback sees; `eval_loss` is made of the exact sums of all batches.
    data = build_data(BATCH, dtype=FLOAT)
    data.labels[:, 1] = torch.nan
    trainer = run(tmp_path, data=build_data(BATCH, dtype=FLOAT), max_steps=1).trainer
    (batch,) = batches(data)
    found = trainer.compute_loss(trainer.model.eval(), batch)
    losses = trainer.model(**batch).losses
    torch.testing.assert_close(found, losses[[0, 2, 3]].mean(), rtol=1e-14, atol=0)

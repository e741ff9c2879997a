"""Metrics of tasks in the Trainer, batch by batch: exact, without keeping predictions, afresh in every evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer
from tests.metrics.mixture import (
    LABEL_NAMES,
    SCORE,
    TASKS,
    MixtureData,
    build_mixture,
    build_mixture_model,
    expected_metrics,
    task_metrics,
)
from tests.trainer.harness import BATCH, TIMED, arguments

pytest.importorskip("sklearn", reason="the references are scikit-learn and scipy")

ROWS = 9 * BATCH + 3


def trainer_for(folder: Path, callbacks: list[TrainerCallback] | None = None, **settings: Any) -> BilevelMTLTrainer:
    given = {"balancer": "ls", "label_names": LABEL_NAMES, "batch_eval_metrics": True, **settings}
    return BilevelMTLTrainer(
        model=build_mixture_model(),
        args=arguments(folder, **given),
        train_dataset=build_mixture(6 * BATCH, seed=2),
        eval_dataset=build_mixture(ROWS),
        compute_metrics=task_metrics(),
        callbacks=callbacks,
    )


def untimed(metrics: dict[str, Any], prefix: str = "eval") -> dict[str, float]:
    return {
        key.removeprefix(f"{prefix}_"): value
        for key, value in metrics.items()
        if not any(word in key for word in (*TIMED, "epoch", "model_preparation_time"))
    }


@pytest.mark.parametrize("batch_size", [1, BATCH, 7, 64])
@pytest.mark.parametrize("by_batch", [True, False])
def test_metrics_and_losses_are_those_of_the_whole_set(batch_size: int, by_batch: bool, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, batch_eval_metrics=by_batch, per_device_eval_batch_size=batch_size)
    expected = expected_metrics(trainer.model, trainer.eval_dataset)
    assert len(expected) == 12, "every task is to have labels"
    for _ in range(2):
        assert untimed(trainer.evaluate()) == pytest.approx(expected, rel=1e-10)


def test_predictions_are_not_kept(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    kept = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation")
    assert kept.predictions is None and kept.label_ids is None and kept.num_samples == ROWS
    assert untimed(kept.metrics)[SCORE] == pytest.approx(expected_metrics(trainer.model, trainer.eval_dataset)[SCORE])


def test_a_task_without_labels_in_the_set(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    data = build_mixture(ROWS)
    data.labels[data.task_ids == TASKS.index("stsb")] = torch.nan
    found = untimed(trainer.evaluate(data))
    assert not any("stsb" in key for key in found) and len(found) == 9
    assert found == pytest.approx(expected_metrics(trainer.model, data), rel=1e-10)
    data.labels[:] = torch.nan
    assert untimed(trainer.evaluate(data)) == {}


def test_several_evaluation_sets(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    sets = {"near": build_mixture(ROWS), "far": build_mixture(2 * BATCH + 1, seed=5)}
    found = untimed(trainer.evaluate(sets))
    for name, data in sets.items():
        part = {key.removeprefix(f"{name}_"): value for key, value in found.items() if key.startswith(name)}
        assert part == pytest.approx(expected_metrics(trainer.model, data), rel=1e-10)


# --- predict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_batch", [True, False])
def test_predict_without_labels_gives_predictions_and_no_metrics(by_batch: bool, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, batch_eval_metrics=by_batch)
    data = build_mixture(ROWS)
    output = trainer.predict(data.without_labels())
    with torch.no_grad():
        expected = trainer.model(data.features, data.task_ids).logits
    assert np.array_equal(output.predictions, expected.numpy())
    assert output.label_ids is None and untimed(output.metrics, "test") == {}
    # And it leaves nothing behind.
    assert untimed(trainer.evaluate()) == pytest.approx(
        expected_metrics(trainer.model, trainer.eval_dataset), rel=1e-10
    )


def test_predict_with_labels_gives_both(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    data = build_mixture(ROWS, seed=7)
    output = trainer.predict(data)
    assert output.predictions.shape == (ROWS, 3)
    labels, task_ids = output.label_ids
    assert np.array_equal(labels, data.labels.numpy(), equal_nan=True)
    assert np.array_equal(task_ids, data.task_ids.numpy())
    assert untimed(output.metrics, "test") == pytest.approx(expected_metrics(trainer.model, data), rel=1e-10)


# --- an evaluation that dies --------------------------------------------------------------------------------------


class DiesOnce(TrainerCallback):
    """Raises after the second batch of the first evaluation."""

    def __init__(self) -> None:
        self.batches = 0

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.batches += 1
        if self.batches == 3:
            raise KeyboardInterrupt


def test_what_a_dead_evaluation_left_does_not_count_in_the_next(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, callbacks=[DiesOnce()])
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(build_mixture(ROWS, seed=11))
    assert untimed(trainer.evaluate()) == pytest.approx(
        expected_metrics(trainer.model, trainer.eval_dataset), rel=1e-10
    )


# --- the best checkpoint ------------------------------------------------------------------------------------------


def best_of(folder: Path, metric: str, **settings: Any) -> tuple[BilevelMTLTrainer, dict[int, float]]:
    """A run that ends with its best checkpoint, and step -> the metric by which it is the best."""
    trainer = trainer_for(
        folder,
        num_train_epochs=8,
        learning_rate=0.05,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model=metric,
        load_best_model_at_end=True,
        **settings,
    )
    trainer.train()
    key = f"eval_{metric.removeprefix('eval_')}"
    return trainer, {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.mark.parametrize(
    ("metric", "settings", "better"),
    [
        (f"eval_{SCORE}", {"greater_is_better": True}, max),
        (SCORE, {}, max),
        ("eval_loss_stsb", {}, min),
        ("cola_matthews_correlation", {}, max),
    ],
)
def test_the_best_checkpoint_by_a_tasks_loss_or_metric(
    metric: str, settings: dict[str, Any], better: Any, tmp_path: Path
) -> None:
    trainer, values = best_of(tmp_path, metric, **settings)
    assert len(values) == 8
    best = better(values, key=values.get)
    assert best != max(values), "the last checkpoint would be the best without being chosen"
    assert trainer.state.best_metric == values[best] == better(values.values())
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    found = untimed(trainer.evaluate())
    assert found[metric.removeprefix("eval_")] == pytest.approx(values[best], rel=1e-12)
    assert found == pytest.approx(expected_metrics(trainer.model, trainer.eval_dataset), rel=1e-10)


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="eval_glue_scores"):
        best_of(tmp_path, "eval_glue_scores")


def test_labels_that_are_no_classes_stop_the_evaluation_with_one_line(tmp_path: Path) -> None:
    # -1 is what the hub has for the hidden labels of GLUE's test sets.
    data = build_mixture(ROWS)
    hidden = MixtureData(data.features, torch.full((ROWS,), -1.0), data.task_ids)
    trainer = trainer_for(tmp_path)
    trainer.model.forward = _without_losses(trainer.model.forward)
    with pytest.raises(
        ValueError, match=r"task 'cola': labels: \d+ are not valid, expected classes 0 to 1, NaN or -100"
    ):
        trainer.evaluate(hidden)


def _without_losses(forward: Any) -> Any:
    """The model's own loss would stumble over such labels first."""

    def wrapped(features: torch.Tensor, task_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return forward(features, task_ids, None if labels is None else labels.clamp(min=0))

    return wrapped

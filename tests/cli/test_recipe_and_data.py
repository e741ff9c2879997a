"""What the data decide about a recipe: which way up its metrics are, and which models go with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hf_bilb.data import MetricInfo, TaskData
from hf_bilb.errors import OptionError
from hf_bilb.experiments.build import build_model, training_arguments
from hf_bilb.experiments.recipe import parse_recipe

DATA = TaskData(
    train=[], validation=[], test=[], task_names=("homo", "toxic"), label_names=("labels",), data_collator=None,
    compute_metrics=lambda prediction: {},
    metrics=(
        MetricInfo("mae_homo", "homo", "MAE", "meV", higher_is_better=False),
        MetricInfo("auc_toxic", "toxic", "AUROC", "", higher_is_better=True),
        MetricInfo("delta_m", "", "Delta_m", "%", higher_is_better=False),
    ),
    trivial_metrics={}, model_arguments={},
)  # fmt: skip


def arguments(**trainer: Any) -> Any:
    sections = {"model": "qm9_mlp", "data": "qm9", "balancer": "ls", "trainer": {"output_dir": "runs/x", **trainer}}
    return training_arguments(parse_recipe(sections, "x"), DATA)


@pytest.mark.parametrize(
    ("metric", "upwards"),
    [
        ("delta_m", False),
        ("eval_mae_homo", False),
        ("auc_toxic", True),
        ("loss", False),
        ("eval_loss_toxic", False),
    ],
)
def test_its_direction_is_the_data_sets(metric: str, upwards: bool) -> None:
    assert arguments(metric_for_best_model=metric).greater_is_better is upwards
    for said in (upwards, None):
        assert arguments(metric_for_best_model=metric, greater_is_better=said).greater_is_better is upwards
    better = "higher" if upwards else "lower"
    with pytest.raises(
        OptionError, match=f"^trainer.greater_is_better: {not upwards} is wrong for .*better when {better}"
    ):
        arguments(metric_for_best_model=metric, greater_is_better=not upwards)


def test_one_that_is_not_measured_is_named_before_training() -> None:
    with pytest.raises(OptionError, match=r"metric_for_best_model: 'eval_mae_hmo' is not measured .*\"mae_homo\""):
        arguments(metric_for_best_model="eval_mae_hmo")


def test_a_model_for_other_data_is_refused_before_training() -> None:
    sections = {"model": "mpnn", "data": "qm9", "balancer": "ls", "trainer": {"output_dir": "runs/x"}}
    data = dataclasses.replace(DATA, model_arguments={"num_features": 34, "task_names": ["homo", "toxic"]})
    with pytest.raises(OptionError, match=r"^model.name: the model 'mpnn' and the data 'qm9' do not go together"):
        build_model(parse_recipe(sections, "x"), data)

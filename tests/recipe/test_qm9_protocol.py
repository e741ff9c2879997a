"""The recipes of the papers' QM9 runs carry the papers' protocol, and the Trainer does what they ask of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bilb import BilevelMTLTrainingArguments
from hf_bilb.data.molecules.qm9_targets import TARGETS
from hf_bilb.data.task_data import DELTA_M_INFO, TaskData
from hf_bilb.experiments.build import training_arguments
from hf_bilb.experiments.recipe import Recipe, read_recipe
from tests.trainer.harness import BATCH, FLOAT, batches, build_data, build_model, close, flat_parameters, run

FOLDER = Path(__file__).parents[2] / "recipes" / "qm9"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("mlp_"))
RECIPES = {name: read_recipe(FOLDER / f"{name}.yaml") for name in NAMES if not name.endswith("_small")}


def arguments(recipe: Recipe) -> BilevelMTLTrainingArguments:
    """The recipe's training arguments, settled with the metrics of QM9, whose rows play no part in them."""
    nothing: list[Any] = []
    data = TaskData(
        train=nothing,
        validation=nothing,
        test=nothing,
        task_names=tuple(target.name for target in TARGETS),
        label_names=("labels",),
        data_collator=None,
        compute_metrics=lambda _: {},
        metrics=(*(target.metric for target in TARGETS), DELTA_M_INFO),
        trivial_metrics={},
        model_arguments={},
    )
    return training_arguments(recipe, data)


def test_the_papers_runs_are_there() -> None:
    assert {"ls", "si", "uw", "famo", "bilb"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_carries_the_papers_protocol(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.model["name"] == "mpnn"
    assert (recipe.data["name"], recipe.data["tasks"]) == ("qm9_graphs", None)
    # All other molecules are for training.
    assert [recipe.data[f"num_{part}"] for part in ("train", "validation", "test")] == [None, 10_000, 10_000]
    assert recipe.evaluation.split == "test"
    args = arguments(recipe)
    protocol = {
        "num_train_epochs": 300,
        "max_steps": -1,
        "per_device_train_batch_size": 120,
        "gradient_accumulation_steps": 1,
        "optim": "adamw_torch",  # with weight_decay 0: Adam
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"mode": "min", "factor": 0.7, "patience": 5, "min_lr": 1e-5},
        "warmup_steps": 0,
        "step_lr": None,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "delta_m",
        "greater_is_better": False,
    }
    assert {key: getattr(args, key) for key in protocol} == protocol


# --- what the Trainer makes of it ---------------------------------------------------------------------------------

# Delta_m of the evaluations: at its lowest in the third one, as low once more in the fifth, and never lower.
DELTAS = [177.0, 120.0, 80.0, 81.0, 80.0, *[90.0] * 12]
# Patience 5: the sixth evaluation in a row without a lower one, the ninth of all, cuts the rate; then the sixth after.
RATES = [*[1e-3] * 9, *[0.7e-3] * 6, *[0.49e-3] * 2]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What the recipe sets of the Trainer, but for the folder and the size of the run."""
    sized = {"output_dir", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "seed"}
    settings = {key: value for key, value in recipe.trainer.items() if key not in sized}
    return {**settings, "balancer": recipe.balancer, "greater_is_better": arguments(recipe).greater_is_better}


def plain_adam(rates: list[float], data: Any) -> list[torch.Tensor]:
    """The parameters after each update of torch's Adam on the plain sum of the losses of one batch."""
    model = build_model(FLOAT)
    optimizer = torch.optim.Adam(model.parameters())
    found = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model(**batches(data)[0]).losses.sum().backward()
        optimizer.step()
        found.append(flat_parameters(model))
    return found


@pytest.mark.slow
def test_the_rate_falls_when_delta_m_stands_still_and_the_best_model_is_left(tmp_path: Path) -> None:
    data, deltas = build_data(BATCH, dtype=FLOAT), iter(DELTAS)  # one update an epoch
    of_evaluation = {"eval_dataset": data, "compute_metrics": lambda _: {"delta_m": next(deltas)}}
    done = run(
        tmp_path,
        data=data,
        trainer_arguments=of_evaluation,
        num_train_epochs=len(DELTAS),
        **settings_of(RECIPES["ls"]),
    )
    assert done.record.learning_rates == pytest.approx(RATES, rel=1e-12)
    found = done.record.parameters
    for step, (ours, plain) in enumerate(zip(found, plain_adam(RATES, data), strict=True)):
        assert close(ours, plain), step
    assert done.trainer.state.best_metric == 80.0
    assert torch.equal(done.parameters, found[2])

    schedule = done.trainer.lr_scheduler
    for _ in range(200):
        schedule.step(90.0)
    assert done.trainer.optimizer.param_groups[0]["lr"] == 1e-5

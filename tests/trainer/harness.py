"""Short training runs with the Trainer and by hand, in float64 on the synthetic model, through the data in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.balancers import LossBalancer
from hf_bilb.losses.contract import TaskLosses
from tests.synthetic import TASK_NAMES, build_data, build_model, flat_parameters

BATCH = 4
FLOAT = torch.float64
#: Log entries that time decides.
TIMED = ("runtime", "per_second", "preparation_time", "flos")


def arguments(folder: Path, **settings: Any) -> BilevelMTLTrainingArguments:
    """Arguments for a run that does nothing but train, evaluate and log."""
    return BilevelMTLTrainingArguments(**plain_settings(folder, **settings))


def plain_settings(folder: Path, **settings: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "num_train_epochs": 1,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "seed": 3,
    }
    return {**defaults, **settings}


@dataclass
class Recorder(TrainerCallback):
    """What a callback of the user sees of the balancer after each step."""

    coefficients: list[Tensor] = field(default_factory=list)
    weights: list[Tensor | None] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)

    def on_step_end(self, *args: Any, balancer: LossBalancer, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        self.coefficients.append(balancer.coefficients.clone())
        self.weights.append(None if balancer.weights is None else balancer.weights.clone())
        self.parameters.append(flat_parameters(model))
        self.learning_rates.append(optimizer.param_groups[0]["lr"])


@dataclass
class Run:
    """A finished run."""

    trainer: BilevelMTLTrainer
    record: Recorder

    @property
    def parameters(self) -> Tensor:
        return flat_parameters(self.trainer.model)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The log entries of training steps."""
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]

    def logged(self, key: str) -> list[float | None]:
        return [entry.get(key) for entry in self.steps]


def run(
    folder: Path,
    model: nn.Module | None = None,
    data: Dataset | None = None,
    *,
    trainer_arguments: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Train with `BilevelMTLTrainer`; `settings` go to the arguments."""
    recorder = Recorder()
    trainer = BilevelMTLTrainer(
        model=build_model(FLOAT) if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=build_data(5 * BATCH, dtype=FLOAT) if data is None else data,
        **{"callbacks": [recorder], **(trainer_arguments or {})},
    )
    trainer.train()
    return Run(trainer, recorder)


def batches(data: Any, size: int = BATCH) -> list[dict[str, Tensor]]:
    """The data in order, as batches."""
    rows = [data[i] for i in range(len(data))]
    return [
        {key: torch.stack([row[key] for row in rows[i : i + size]]) for key in rows[0]}
        for i in range(0, len(rows), size)
    ]


def by_hand(
    model: nn.Module,
    data: Any,
    objective: Callable[[Tensor, Tensor, int], Tensor],
    *,
    rate: float = 0.05,
    size: int = BATCH,
) -> list[float]:
    """Plain SGD on `objective(losses [K], num_items [K], step)`, an independent formula; returns its values."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    values = []
    for step, batch in enumerate(batches(data, size)):
        outputs = model(**batch)
        value = objective(outputs.losses, outputs.num_items, step)
        if outputs.auxiliary_loss is not None:
            value = value + outputs.auxiliary_loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    return values


def with_balancer(
    model: nn.Module,
    data: Any,
    balancer: LossBalancer,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    epochs: int = 1,
    before_step: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """The same loop with a balancer of one's own, whatever it needs; returns the coefficients of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05) if optimizer is None else optimizer
    balancer.bind(model, optimizer)
    coefficients = []
    for epoch in range(epochs):
        balancer.on_epoch_begin(epoch)
        for batch in batches(data):

            def losses(batch: dict[str, Tensor] = batch) -> TaskLosses:
                outputs = model(**batch)
                return TaskLosses(outputs.losses, outputs.num_items)

            balancer.look_ahead(losses, before_step=before_step)
            optimizer.zero_grad()
            found = losses()
            balancer.backward(found.losses, found.num_items)
            before_step()
            optimizer.step()
            balancer.step(reevaluate=losses)
            coefficients.append(balancer.coefficients.clone())
    return coefficients


def assert_goes_on(folder: Path, data: Any, at: int, **settings: Any) -> None:
    """Train, and again from the checkpoint of step `at`: model and balancer end the same to the last bit."""
    whole = run(folder, data=data, save_strategy="steps", save_steps=at, **settings)
    resumed = run(folder / "nothing", data=data, max_steps=1, **settings).trainer
    resumed.args.max_steps = -1
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}"))
    assert resumed.state.global_step == whole.trainer.state.global_step > at
    assert torch.equal(flat_parameters(resumed.model), whole.parameters)
    ours, theirs = resumed.balancer.state_dict(), whole.trainer.balancer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log entries without what time decides."""
    return [{k: v for k, v in entry.items() if not any(word in k for word in TIMED)} for entry in history]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return float((found - expected).norm() / expected.norm()) <= tolerance


__all__ = [
    "BATCH",
    "FLOAT",
    "TASK_NAMES",
    "Recorder",
    "Run",
    "arguments",
    "assert_goes_on",
    "batches",
    "build_data",
    "build_model",
    "by_hand",
    "close",
    "flat_parameters",
    "plain_settings",
    "run",
    "untimed",
    "with_balancer",
]

"""`compute_loss` is pure: only the step that calls it learns from it, whatever is called by hand before or between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer, list_balancers
from hf_bilb.errors import TrainerError
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    Run,
    arguments,
    batches,
    build_data,
    build_model,
    flat_parameters,
    run,
    untimed,
)

#: Methods whose step needs accumulation over windows are run with it, so that looks fall into a window, too.
METHODS: list[Any] = [*list_balancers(), {"name": "bilb", "reference": {"mean_of": 3}}, {"name": "dwa", "window": 2}]


def strange_batch() -> dict[str, Tensor]:
    """Losses a thousand times the usual ones, and one task without labels."""
    (batch,) = batches(build_data(BATCH, dtype=FLOAT))
    labels = batch["labels"] * 1000
    labels[:, 1] = torch.nan
    return {"features": batch["features"], "labels": labels}


class Looker(TrainerCallback):
    """Looks at the loss of a batch in training mode at every event of the loop."""

    trainer: BilevelMTLTrainer

    def look(self) -> float:
        loss = self.trainer.compute_loss(self.trainer.model.train(), strange_batch())
        return float(loss.detach())

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.look()

    on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = on_epoch_begin = on_step_begin


def trained(folder: Path, looks: bool, **settings: Any) -> Run:
    callback = Looker()
    trainer = BilevelMTLTrainer(
        build_model(FLOAT),
        arguments(folder, **settings),
        train_dataset=build_data(6 * BATCH, dtype=FLOAT),
        callbacks=[callback] if looks else None,
    )
    callback.trainer = trainer
    if looks:
        callback.look()
    trainer.train()
    return Run(trainer, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("balancer", METHODS, ids=str)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_looks_change_nothing(balancer: Any, accumulation: int, tmp_path: Path) -> None:
    over = {"gradient_accumulation_steps": accumulation, "balance_over": "window"} if accumulation > 1 else {}
    plain = trained(tmp_path / "plain", False, balancer=balancer, **over)
    looked = trained(tmp_path / "looked", True, balancer=balancer, **over)
    assert torch.equal(plain.parameters, looked.parameters)
    expected, found = plain.trainer.balancer.state_dict(), looked.trainer.balancer.state_dict()
    assert all(torch.equal(found[name].nan_to_num(7), expected[name].nan_to_num(7)) for name in expected)
    assert untimed(looked.trainer.state.log_history) == untimed(plain.trainer.state.log_history)


def test_looks_between_the_micro_batches_of_a_step_change_nothing(tmp_path: Path) -> None:
    settings = {
        "gradient_accumulation_steps": 3,
        "balancer": {"name": "bilb", "pairs": "all"},
        "nonfinite_loss": "skip",
    }
    plain, looked = (trained(tmp_path / str(looks), looks, **settings) for looks in (False, True))
    assert torch.equal(plain.parameters, looked.parameters)
    assert untimed(looked.trainer.state.log_history) == untimed(plain.trainer.state.log_history)


def test_a_look_shows_the_loss_that_the_next_step_has(tmp_path: Path) -> None:
    rows = build_data(3 * BATCH, dtype=FLOAT)
    found = run(tmp_path, data=rows, balancer={"name": "uw"}, max_steps=2)
    last = batches(rows)[2]
    shown = found.trainer.compute_loss(found.trainer.model.train(), last)
    # uw at its learned variances: sum l / (2 v) + s / 2 with v = exp(s); here by the definition of its objective
    losses = found.trainer.model(**last).losses.detach()
    (log_variance,) = (p.detach() for p in found.trainer.balancer.objective.parameters())
    expected = (losses * torch.exp(-log_variance) + log_variance).sum()
    scale = float(shown.detach()) / float(expected)
    assert min(abs(scale - 1), abs(scale - 0.5)) < 1e-12
    slope = torch.autograd.grad(shown, list(found.trainer.model.parameters()))
    assert any(bool(one.any()) for one in slope)


def test_two_passes_in_one_step_learn_from_the_first(tmp_path: Path) -> None:
    class Twice(BilevelMTLTrainer):
        """Two passes of each batch, as consistency losses do."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            first = super().compute_loss(model, dict(inputs), False)
            loss, outputs = super().compute_loss(model, dict(inputs), True)
            assert torch.equal(first, loss)
            loss = (first + loss) / 2
            return (loss, outputs) if return_outputs else loss

    rows = build_data(5 * BATCH, dtype=FLOAT)
    for settings in (
        {},
        {"gradient_accumulation_steps": 2, "balance_over": "window"},
        {"gradient_accumulation_steps": 2},
    ):
        expected = run(tmp_path, data=rows, **settings)
        trainer = Twice(build_model(FLOAT), arguments(tmp_path, **settings), train_dataset=rows)
        trainer.train()
        assert torch.allclose(flat_parameters(trainer.model), expected.parameters, rtol=1e-12, atol=1e-14)
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [one["loss/beta"] for one in steps] == expected.logged("loss/beta")


def test_looks_during_an_evaluation_change_nothing(tmp_path: Path) -> None:
    class Look(TrainerCallback):
        trainer: BilevelMTLTrainer

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            self.trainer.compute_loss(self.trainer.model.eval(), strange_batch())

    class Twice(BilevelMTLTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, dict(inputs), return_outputs, **kwargs)
            super().compute_loss(model, {k: v * 3 for k, v in inputs.items()}, False, **kwargs)
            return loss

    rows, callback = build_data(3 * BATCH, dtype=FLOAT, missing=0.3), Look()
    expected = BilevelMTLTrainer(build_model(FLOAT), arguments(tmp_path)).evaluate(rows)
    for kind in (BilevelMTLTrainer, Twice):
        trainer = kind(build_model(FLOAT), arguments(tmp_path), callbacks=[callback])
        callback.trainer = trainer
        found = trainer.evaluate(rows)
        assert {k: v for k, v in found.items() if "loss" in k} == {k: v for k, v in expected.items() if "loss" in k}


def test_a_trainer_that_goes_around_the_balancer_is_told(tmp_path: Path) -> None:
    class OwnLoss(BilevelMTLTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**inputs)
            return (outputs.losses.sum(), outputs) if return_outputs else outputs.losses.sum()

    class OwnStep(BilevelMTLTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            loss = self.compute_loss(model.train(), inputs)
            self.accelerator.backward(loss)
            return loss.detach()

    for kind, name in ((OwnLoss, "compute_loss of OwnLoss"), (OwnStep, "training_step of OwnStep")):
        model = build_model(FLOAT)
        before = flat_parameters(model).clone()
        trainer = kind(model, arguments(tmp_path), train_dataset=build_data(BATCH, dtype=FLOAT))
        with pytest.raises(TrainerError, match=f"^{name} never called that of BilevelMTLTrainer: .*call super"):
            trainer.train()
        assert torch.equal(flat_parameters(model), before)

"""A loss that is not finite: `raise` names task, step and value; `skip` leaves everything as it was and counts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bilb.errors import NonFiniteLossError
from tests.synthetic import SyntheticData, SyntheticModel
from tests.trainer.harness import BATCH, FLOAT, TASK_NAMES, Run, build_data, build_model, flat_parameters, run

STEPS, BAD = 6, 3


class NormalisedModel(SyntheticModel):
    """With BatchNorm, whose buffers a forward pass changes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.trunk.append(nn.BatchNorm1d(config.hidden_size))


def model() -> NormalisedModel:
    plain = build_model(FLOAT)
    torch.manual_seed(0)
    built = NormalisedModel(plain.config).double()
    missing = built.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    return built


def data(*without: int, poison: float | None = None, task: int = 2, at: int = BAD) -> SyntheticData:
    """Six batches, without those numbered `without`; one label of batch `at` makes the task's loss not finite."""
    full = build_data(STEPS * BATCH, dtype=FLOAT)
    if poison is not None:
        # An infinite label: the loss is infinite, its gradient NaN.
        full.labels.view(STEPS, BATCH, -1)[at, 1, task] = poison
    kept = torch.tensor([row for row in range(STEPS * BATCH) if row // BATCH not in without])
    return SyntheticData(full.features[kept], full.labels[kept])


def everything(run: Run) -> dict[str, Tensor]:
    """All that a step may change: parameters, buffers, the optimizer's and the balancer's state."""
    found = {f"model.{k}": v for k, v in run.trainer.model.state_dict().items()}
    found.update({f"balancer.{k}": v for k, v in run.trainer.balancer.state_dict().items()})
    optimizer = run.trainer.optimizer.state_dict()["state"]
    found.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for i, entry in optimizer.items() for k, v in entry.items()})
    return found


ADAM: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.01}


@pytest.mark.parametrize("poison", [float("inf"), float("-inf")])
def test_raise_names_task_step_and_value(poison: float, tmp_path: Path) -> None:
    network = model()
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path, network, data(poison=poison), **ADAM)
    message = "the loss of task 'gamma' is inf at step 4; fix the data or the model, or set nonfinite_loss: skip"
    assert str(caught.value) == message
    before = run(tmp_path, model(), data(3, 4, 5), **ADAM)
    assert torch.equal(flat_parameters(network), before.parameters)


def test_nan_comes_out_as_nan(tmp_path: Path) -> None:
    def losses(outputs: Any, batch: Any) -> Tensor:
        values = outputs.losses
        return values * torch.where(batch["features"].sum() == 0, torch.nan, 1.0)

    rows = data()
    rows.features[2 * BATCH : 3 * BATCH] = 0
    with pytest.raises(NonFiniteLossError, match=r"^the loss of task 'alpha' is nan at step 3; fix the data"):
        run(tmp_path, data=rows, trainer_arguments={"task_loss_func": losses})


@pytest.mark.parametrize("name", ["ls", "uw", "bilb"])
def test_skip_leaves_everything_as_it_was(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**ADAM, "balancer": name, "nonfinite_loss": "skip"}
    found = run(tmp_path, model(), data(poison=float("inf")), **settings)
    expected = run(tmp_path, model(), data(BAD), **settings)
    assert found.trainer.state.global_step == STEPS and expected.trainer.state.global_step == STEPS - 1
    ours, theirs = everything(found), everything(expected)
    assert ours.keys() == theirs.keys() and any("running_mean" in key for key in ours)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert torch.equal(found.record.parameters[BAD], found.record.parameters[BAD - 1])


def test_skip_with_gradient_clipping_and_a_schedule(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**ADAM, "nonfinite_loss": "skip", "max_grad_norm": 0.5}
    schedule: dict[str, Any] = {"lr_scheduler_type": "linear"}
    found = run(tmp_path, model(), data(poison=float("inf")), **settings, **schedule)
    # The schedule stands still in the dropped step.
    rates = found.record.learning_rates
    assert rates[BAD] == rates[BAD - 1] and len(set(rates)) == STEPS - 1
    assert found.trainer.lr_scheduler.last_epoch == STEPS - 1
    expected = run(tmp_path, model(), data(BAD), **settings, max_steps=STEPS - 1)
    constant = run(tmp_path, model(), data(poison=float("inf")), **settings)
    ours, theirs = everything(constant), everything(expected)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("at", [2, 3])
def test_skip_drops_the_whole_window(at: int, tmp_path: Path) -> None:
    # Batches 2 and 3 are one update: a bad loss in either drops both, whichever comes first.
    settings: dict[str, Any] = {**ADAM, "nonfinite_loss": "skip", "gradient_accumulation_steps": 2}
    found = run(tmp_path, model(), data(poison=float("inf"), at=at), **settings)
    expected = run(tmp_path, model(), data(2, 3), **settings)
    ours, theirs = everything(found), everything(expected)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert found.trainer.state.global_step == 3


def test_two_dropped_steps_in_a_row_and_the_last_one(tmp_path: Path) -> None:
    rows = data(poison=float("inf"), at=1)
    rows.labels.view(STEPS, BATCH, -1)[2, 0, 0] = torch.inf
    rows.labels.view(STEPS, BATCH, -1)[5, 0, 0] = torch.inf
    found = run(tmp_path, model(), rows, nonfinite_loss="skip", **ADAM)
    expected = run(tmp_path, model(), data(1, 2, 5), nonfinite_loss="skip", **ADAM)
    ours, theirs = everything(found), everything(expected)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    last = found.steps[-1]
    assert last["dropped_steps/gamma"] == 1 and last["dropped_steps/alpha"] == 2


def test_dropped_steps_are_counted_per_task_and_leave_the_means_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"nonfinite_loss": "skip", "logging_steps": STEPS, "balancer": "ls"}
    found = run(tmp_path, model(), data(poison=float("inf")), **settings)
    assert "step 4 is dropped: the loss of task 'gamma' is not finite" in caplog.text
    expected = run(tmp_path, model(), data(BAD), **{**settings, "logging_steps": STEPS - 1})
    (entry,), (clean,) = found.steps, expected.steps
    assert entry.pop("dropped_steps/gamma") == 1.0
    assert all("dropped" not in key for key in clean)
    for key, value in clean.items():
        if key not in ("step", "epoch", "grad_norm"):
            assert entry[key] == pytest.approx(value, rel=1e-12), key
    assert found.trainer.state.log_history[-1]["train_loss"] == pytest.approx(entry["loss"], rel=1e-12)


def test_the_log_of_a_dropped_step_alone_holds_no_nan(tmp_path: Path) -> None:
    found = run(tmp_path, model(), data(poison=float("inf")), nonfinite_loss="skip", logging_steps=1)
    entries = [entry for entry in found.trainer.state.log_history if entry["step"] == BAD + 1]
    assert len(entries) == 1 and entries[0]["dropped_steps/gamma"] == 1.0
    bad = {k: v for k, v in entries[0].items() if v != v or abs(v) == float("inf")}
    # There is no F to report in an interval without an update; the gradient's norm is Trainer's.
    assert set(bad) <= {"loss", "grad_norm"}
    assert not any(key.startswith(("loss/", "coefficient/", "weight/")) for key in entries[0])


def test_an_auxiliary_loss_that_is_not_finite(tmp_path: Path) -> None:
    class Poisoned(SyntheticModel):
        def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
            outputs = super().forward(features, labels)
            outputs.auxiliary_loss = torch.log(features[0, 0].detach()) + 0 * outputs.logits.sum()
            return outputs

    rows = data()
    rows.features[:, 0] = 1.0
    rows.features[BAD * BATCH, 0] = -1.0
    network = Poisoned(build_model(FLOAT).config).double()
    with pytest.raises(NonFiniteLossError, match=r"^the auxiliary loss is nan at step 4"):
        run(tmp_path, copy.deepcopy(network), rows)
    found = run(tmp_path, network, rows, nonfinite_loss="skip")
    assert found.steps[-1]["dropped_steps/auxiliary_loss"] == 1.0 and found.parameters.isfinite().all()


@pytest.mark.parametrize("nonfinite_loss", ["raise", "skip"])
@pytest.mark.parametrize(
    ("balancer", "cause"),
    [("si", "takes logarithms"), ({"name": "bilb", "normalization": "log"}, "has normalization: log")],
)
def test_a_negative_loss_under_a_logarithm_always_raises(
    balancer: Any, cause: str, nonfinite_loss: str, tmp_path: Path
) -> None:
    # No accident of one batch: the method does not fit the losses.
    def losses(outputs: Any, batch: Any) -> Tensor:
        return outputs.losses - torch.tensor([0.0, 100.0, 0.0, 0.0], dtype=FLOAT)

    network = build_model(FLOAT)
    with pytest.raises(
        NonFiniteLossError, match=rf"^the loss of task 'beta' is -9.* at step 1, but balancer .* {cause}"
    ):
        run(
            tmp_path,
            network,
            trainer_arguments={"task_loss_func": losses},
            balancer=balancer,
            nonfinite_loss=nonfinite_loss,
        )
    assert torch.equal(flat_parameters(network), flat_parameters(build_model(FLOAT)))


def test_missing_labels_are_no_nonfinite_losses(tmp_path: Path) -> None:
    rows = data(poison=float("nan"))
    rows.labels.view(STEPS, BATCH, -1)[BAD, :, 2] = torch.nan
    found = run(tmp_path, model(), rows, nonfinite_loss="raise")
    assert found.trainer.state.global_step == STEPS and found.logged("loss/gamma")[BAD] is None
    assert len(TASK_NAMES) == 4

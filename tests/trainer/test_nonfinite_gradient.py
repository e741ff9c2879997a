"""A gradient that is not finite behind finite losses: found before the optimizer steps, and whose it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bilb.engine.gradient_check import tasks_with_nonfinite_slope
from hf_bilb.errors import NonFiniteLossError
from hf_bilb.losses.contract import TaskLosses
from tests.trainer.harness import BATCH, FLOAT, build_data, flat_parameters, run

NAMES = ["first", "second", "third"]


class Rows(torch.utils.data.Dataset):
    """Five batches; `bad` marks the batch in which the second task's slope is infinite."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        self.features = build_data(5 * BATCH, dtype=FLOAT).features
        self.bad = torch.zeros(5 * BATCH, dtype=FLOAT)
        for number in bad:
            self.bad[number * BATCH : (number + 1) * BATCH] = 1

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": self.features[index], "labels": self.bad[index]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features)


def as_vector(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Root of the mean square of what is 0 in a bad batch: a loss of 0, a slope of 0 times infinity."""
    squares = outputs.square().mean(0)
    bad = batch["labels"].mean()
    return torch.where(torch.tensor([False, True, False]), squares * (1 - bad), squares + 1).sqrt()


def as_dict(outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(NAMES, as_vector(outputs, batch), strict=True))


def masked_afterwards(outputs: Tensor, batch: dict[str, Tensor]) -> Any:
    """A mean over no items, for which a count of 0 stands: the loss is not looked at, its slope is in the graph."""
    mask = 1 - batch["labels"]
    second = (outputs[:, 1].square() * mask).sum() / mask.sum()
    losses = {"first": outputs[:, 0].square().mean(), "second": second, "third": outputs[:, 2].square().mean()}
    return losses, {"first": BATCH, "second": mask.sum(), "third": BATCH}


def settings(losses: Any, **others: Any) -> dict[str, Any]:
    ours = {"task_names": NAMES, "label_names": ["labels"], "optim": "adamw_torch"}
    return {"trainer_arguments": {"task_loss_func": losses}, **ours, **others}


@pytest.mark.parametrize("losses", [as_vector, as_dict, masked_afterwards])
@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_raise_names_step_and_task_before_the_model_moves(losses: Any, clipped: float, tmp_path: Path) -> None:
    network = Net()
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path, network, Rows((3,)), **settings(losses, max_grad_norm=clipped))
    message = "the gradient is not finite at step 4, though all losses are: that of task 'second' is not defined"
    assert str(caught.value).startswith(message) and "nonfinite_loss: skip" in str(caught.value)
    good = run(tmp_path, Net(), Rows(()), max_steps=3, **settings(losses, max_grad_norm=clipped))
    assert torch.equal(flat_parameters(network), good.parameters) and bool(good.parameters.isfinite().all())


@pytest.mark.parametrize("accumulation", [{}, {"gradient_accumulation_steps": 2, "balance_over": "window"}], ids=str)
def test_skip_drops_the_step_and_nothing_else(accumulation: dict[str, Any], tmp_path: Path) -> None:
    rows = Rows((2,))
    skipped = run(tmp_path, Net(), rows, nonfinite_loss="skip", **settings(as_vector), **accumulation)
    kept = Rows(())
    left_out = range(2 * BATCH, 3 * BATCH) if not accumulation else range(2 * BATCH, 4 * BATCH)
    order = [index for index in range(5 * BATCH) if index not in left_out]
    kept.features, kept.bad = kept.features[order], kept.bad[order]
    expected = run(tmp_path, Net(), kept, **settings(as_vector), **accumulation)
    assert torch.equal(skipped.parameters, expected.parameters)
    for (name, found), wanted in zip(
        skipped.trainer.model.named_buffers(), expected.trainer.model.buffers(), strict=True
    ):
        assert torch.equal(found, wanted), name
    state, wanted_state = skipped.trainer.balancer.state_dict(), expected.trainer.balancer.state_dict()
    assert all(torch.equal(state[name], wanted_state[name]) for name in wanted_state)
    assert skipped.logged("dropped_steps/gradient")[-1] == 1


def test_training_stops_after_so_many_dropped_steps_in_a_row(tmp_path: Path) -> None:
    options = settings(as_vector, nonfinite_loss="skip", max_dropped_steps=2)
    scattered = run(tmp_path, Net(), Rows((1, 3)), **options)
    assert scattered.trainer.state.global_step == 5
    network = Net()
    with pytest.raises(NonFiniteLossError, match=r"^step 4: the last 2 steps were dropped because .*max_dropped_steps"):
        run(tmp_path, network, Rows((2, 3)), **options)
    assert bool(flat_parameters(network).isfinite().all())


def test_dropped_losses_count_too(tmp_path: Path) -> None:
    def infinite(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.square().mean(0) + torch.where(batch["labels"].mean() > 0, torch.inf, 0.0)

    with pytest.raises(NonFiniteLossError, match=r"^step 3: the last 3 steps were dropped"):
        run(tmp_path, Net(), Rows((0, 1, 2)), **settings(infinite, nonfinite_loss="skip", max_dropped_steps=3))


def test_the_tasks_are_told_apart_where_one_backward_pass_mixes_them() -> None:
    weight = torch.tensor([1.0, 0.0, 2.0, 3.0], requires_grad=True)

    def run_once() -> TaskLosses:
        values = torch.stack([weight, weight * 0]).square().sum(0)  # of the second task 0 at a weight of 0
        return TaskLosses(values.sqrt(), torch.ones(4))

    (mixed,) = torch.autograd.grad(run_once().losses[0], weight)
    assert bool(mixed.isnan().any())  # so that asking for one loss's gradient would blame the first task
    assert tasks_with_nonfinite_slope([run_once], [weight], ["a", "b", "c", "d"]) == ["b"]


def test_a_gradient_too_large_for_its_number_type_names_the_largest_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def huge(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        factors = torch.tensor([1.0, 1.0, 1e300], dtype=FLOAT) if bool(batch["labels"].any()) else torch.ones(3)
        return outputs.square().mean(0) * factors

    options = settings(huge, balancer="ls")
    with pytest.raises(NonFiniteLossError, match=r"the largest loss is that of task 'third', \S+e\+(29|30)\d, whose"):
        run(tmp_path, Net(), Rows((3,)), **options)
    # Clipped to a norm of 1, it is zero: the step changes nothing that is not finite, and training goes on.
    clipped = run(tmp_path, Net(), Rows((3,)), **options, max_grad_norm=1.0)
    assert clipped.trainer.state.global_step == 5 and bool(clipped.parameters.isfinite().all())
    assert "step 4: the gradient's norm is beyond its number type" in caplog.text and "'third'" in caplog.text

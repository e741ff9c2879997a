"""Our methods against torchjd's own scalarizers, side by side; every deviation that we list is shown to be one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchjd", reason="the reference is torchjd, in the extras [gradient] and [dev]")

from torchjd.scalarization import DWA, FAMO, IMTLL, STCH, UW, Constant, GeometricMean, Mean, Random, Scalarizer, Sum

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.errors import NonFiniteLossError, OptionError
from tests.balancers.torchjd_reference import DEVIATIONS, PAIRS, TASKS, Pair, compare_with_torchjd, preference
from tests.contract.cases import advance, random_losses


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("pair", PAIRS, ids=[pair.name for pair in PAIRS])
@pytest.mark.slow
def test_trajectory(pair: Pair, num_tasks: int) -> None:
    deviations = compare_with_torchjd(pair, num_tasks)
    assert {"losses", "total", "coefficients", "params"} <= deviations.keys()
    assert ("state" in deviations) == (pair.states is not None)
    too_large = {key: deviation for key, deviation in deviations.items() if not deviation <= pair.tolerance}
    assert not too_large, f"{pair.name}, K = {num_tasks}: {too_large}, tolerance {pair.tolerance}"


def test_every_deviation_has_its_test() -> None:
    assert {deviation.test for deviation in DEVIATIONS} <= globals().keys()


# --- deviations ----------------------------------------------------------------------------------------------------


def built(name: str, num_tasks: int = 3, **options: Any) -> LossBalancer:
    return build_balancer(name, num_tasks, dtype=torch.float64, **options)


def coefficients(scalarizer: Scalarizer, losses: Tensor) -> Tensor:
    """What torchjd multiplies the gradients of the `losses [K]` with."""
    leaf = losses.clone().requires_grad_()
    scalarizer(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-13, atol=0)


def test_random_draws_from_the_global_generator() -> None:
    row, both = random_losses(3, 1)[0], {}
    for extra in (0, 1):
        torch.manual_seed(0)
        torch.rand(extra)
        both[extra] = coefficients(Random(), row), advance(built("rlw"), row)
    assert not close(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])
    assert Random().state_dict() == {}


def dwa_epochs(num_tasks: int = 2) -> list[list[tuple[Tensor, Tensor]]]:
    """Three epochs of two batches with different numbers of items: (losses `[K]`, items `[K]`)."""
    rows = random_losses(num_tasks, 6)
    items = [torch.full((num_tasks,), count, dtype=torch.float64) for count in (1.0, 7.0)]
    return [[(rows[2 * epoch + i], items[i]) for i in range(2)] for epoch in range(3)]


def test_dwa_averages_batches_where_we_average_items() -> None:
    ours, batches, items = built("dwa", 2, window="epoch"), DWA(), DWA()
    for epoch, rows in enumerate(dwa_epochs()):
        ours.on_epoch_begin(epoch)
        # One call an epoch, with the mean over its items: what torchjd would need to be given.
        items(sum(n * losses for losses, n in rows) / sum(n for _, n in rows))
        items.step()
        for losses, n in rows:
            mine, theirs = advance(ours, losses, n), coefficients(batches, losses)
        batches.step()
        if epoch == 1:
            weighted = coefficients(items, rows[0][0])
            items.reset()
    assert not torch.allclose(mine, theirs, rtol=1e-3)
    assert not close(weighted, torch.ones(2, dtype=torch.float64))
    assert close(mine, weighted)


def test_dwa_counts_epochs_by_calls() -> None:
    forgotten = DWA()
    for rows in dwa_epochs():
        for losses, _ in rows:
            assert torch.equal(coefficients(forgotten, losses), torch.ones(2, dtype=torch.float64))
    with pytest.raises(OptionError, match=r"on_epoch_begin"):
        advance(built("dwa", 2, window="epoch"), dwa_epochs()[0][0][0])


def test_dwa_divides_by_a_mean_loss_of_zero() -> None:
    rows = torch.tensor([[0.0, 1.0], [0.0, 0.5], [0.3, 0.4]], dtype=torch.float64)
    ours, theirs = built("dwa", 2, window="epoch"), DWA()
    for epoch, losses in enumerate(rows):
        ours.on_epoch_begin(epoch)
        mine, other = advance(ours, losses), coefficients(theirs, losses)
        theirs.step()
    raised = [math.exp(ratio / 2) for ratio in (1.0, 0.5)]
    assert mine.tolist() == pytest.approx([2 * value / sum(raised) for value in raised], rel=1e-14)
    assert other.isnan().all()


def test_resume_of_dwa() -> None:
    rows = random_losses(2, 4)
    theirs, ours = DWA(), built("dwa", 2, window="epoch")
    for epoch, losses in enumerate(rows[:3]):
        ours.on_epoch_begin(epoch)
        advance(ours, losses)
        theirs(losses)
        theirs.step()
    resumed, again = DWA(), built("dwa", 2, window="epoch")
    assert theirs.state_dict() == {}
    resumed.load_state_dict(theirs.state_dict())
    again.load_state_dict(ours.state_dict())
    for balancer in (ours, again):
        balancer.on_epoch_begin(3)
    expected = coefficients(theirs, rows[3])
    assert torch.equal(coefficients(resumed, rows[3]), torch.ones(2, dtype=torch.float64))
    assert close(advance(ours, rows[3]), expected)
    assert close(advance(again, rows[3]), expected)


def test_resume_of_famo() -> None:
    rows = random_losses(3, 8)

    def train(ours: LossBalancer, theirs: FAMO, steps: range) -> tuple[Tensor, Tensor]:
        for t in steps:
            leaf = rows[t].clone().requires_grad_()
            ours.backward(leaf)
            ours.step(reevaluate=lambda t=t: rows[t + 1])
            last = coefficients(theirs, rows[t])
            theirs.update(rows[t + 1])
        assert leaf.grad is not None
        return leaf.grad, last

    whole, theirs, resumed, again = built("famo"), FAMO(3).double(), FAMO(3).double(), built("famo")
    train(whole, theirs, range(4))
    resumed.load_state_dict(theirs.state_dict())
    again.load_state_dict(whole.state_dict())
    mine, expected = train(whole, theirs, range(4, 7))
    mine_again, lost = train(again, resumed, range(4, 7))
    assert torch.allclose(mine, expected, rtol=1e-12)
    assert torch.equal(mine_again, mine)
    assert not torch.allclose(lost, expected, rtol=1e-3)


def test_famo_below_its_bound() -> None:
    losses = torch.tensor([0.5, 0.1], dtype=torch.float64)
    bound = torch.tensor([0.2, 0.2], dtype=torch.float64)
    theirs = FAMO(2, min_losses=bound).double()
    assert theirs(losses).isnan()
    assert coefficients(theirs, losses).min() < 0
    with pytest.raises(NonFiniteLossError, match="task_1"):
        built("famo", 2, min_losses=0.2).backward(losses.requires_grad_())


def test_geometric_mean_of_zero() -> None:
    losses = torch.tensor([0.5, 0.0], dtype=torch.float64)
    assert GeometricMean()(losses) == 0
    assert coefficients(GeometricMean(), losses).isnan().any()
    with pytest.raises(NonFiniteLossError, match="task_1"):
        built("gls", 2).backward(losses.requires_grad_())


@pytest.mark.parametrize(("scalarizer", "name"), [(UW, "uw"), (IMTLL, "imtl_l")])
def test_own_parameters_in_the_model_s_optimizer(scalarizer: type[UW] | type[IMTLL], name: str) -> None:
    theirs, ours = scalarizer(3), built(name, optimizer="sgd", learning_rate="follow_model")
    (own,) = theirs.parameters()
    assert own.dtype == torch.float32
    (entry,) = (key for key in ours.state_dict() if key.startswith("objective."))
    with torch.no_grad():
        own.fill_(2.0)
    state = ours.state_dict()
    state[entry] = torch.full((3,), 2.0, dtype=torch.float64)
    ours.load_state_dict(state)
    model = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([model, own], lr=0.1, weight_decay=0.5)
    ours.bind(optimizer=optimizer)
    advance(ours, torch.ones(3, dtype=torch.float64))
    theirs(torch.ones(3)).backward()
    optimizer.step()
    # The decay of 0.1 * 0.5 * 2 is theirs alone.
    assert torch.allclose(ours.state_dict()[entry] - 0.1, own.detach().double(), rtol=1e-6)


@pytest.mark.parametrize(
    ("scalarizer", "name", "options"),
    [
        (Sum(), "ls", {}),
        (Mean(), "ls", {"coefficient_scale": "sum_to_one"}),
        (GeometricMean(), "gls", {}),
        (STCH(0.5), "stch", {"mu": 0.5}),
        (DWA(), "dwa", {"window": "epoch"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Scalarizer) else None,
)
def test_absent_tasks(scalarizer: Scalarizer, name: str, options: dict) -> None:
    losses, items = random_losses(3, 1)[0], torch.tensor([4.0, 0.0, 4.0], dtype=torch.float64)
    present = items > 0
    balancer = built(name, **options)
    balancer.on_epoch_begin(0)
    ours = advance(balancer, torch.where(present, losses, 0.0), items)
    assert ours[1] == 0
    assert close(ours[present], coefficients(scalarizer, losses[present]))
    assert type(scalarizer)(*[0.5] * (name == "stch"))(torch.where(present, losses, torch.nan)).isnan()


def test_a_shape_may_not_change() -> None:
    losses = random_losses(3, 1)[0]
    weights = torch.tensor(preference(3), dtype=torch.float64)
    for scalarizer in (Constant(weights), UW(3), IMTLL(3), FAMO(3), STCH(0.5, weights)):
        with pytest.raises(ValueError, match="shape"):
            scalarizer(losses[:2])

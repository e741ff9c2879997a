"""Normalization of the losses: the formulas, and when a task's reference is taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_bilb.engine.records import MeanOf, Normalization

ALL = torch.tensor([True, True, True])


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def build(kind: str, reference: str | MeanOf = "first_step", power: float = 0.5) -> Normalization:
    return Normalization(3, kind, reference, power).double()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("none", lambda loss, l0, smallest: loss),
        ("initial", lambda loss, l0, smallest: loss / l0),
        ("rescaled", lambda loss, l0, smallest: loss * smallest / l0),
        ("log", lambda loss, l0, smallest: math.log(loss / l0)),
        ("power", lambda loss, l0, smallest: (loss / l0) ** 0.25 / 0.25),
    ],
)
def test_formulas(kind: str, formula) -> None:
    normalization = build(kind, power=0.25)
    references, losses = vector(2.0, 0.5, 8.0), vector(1.0, 3.0, 0.1)
    normalization.observe(references, ALL, normalization.forming())
    normalization.observe(losses, ALL, normalization.forming())
    expected = [formula(float(a), float(b), 0.5) for a, b in zip(losses, references, strict=True)]
    torch.testing.assert_close(normalization(losses), vector(*expected), rtol=1e-14, atol=1e-14)


def test_power_one_is_initial_and_power_towards_zero_is_log() -> None:
    losses = vector(1.0, 3.0, 0.1)
    results = {}
    for kind, power in (("power", 1.0), ("initial", 0.5), ("power", 1e-6), ("log", 0.5)):
        normalization = build(kind, power=power)
        normalization.observe(vector(2.0, 0.5, 8.0), ALL, normalization.forming())
        results[kind, power] = normalization(losses)
    assert torch.equal(results["power", 1.0], results["initial", 0.5])
    near = results["power", 1e-6] - 1e6
    torch.testing.assert_close(near, results["log", 0.5], rtol=1e-4, atol=1e-5)


def test_first_step_is_kept() -> None:
    normalization = build("initial")
    for losses in (vector(2, 4, 8), vector(1, 1, 1), vector(9, 9, 9)):
        normalization.observe(losses, ALL, normalization.forming())
    assert normalization.reference_losses.tolist() == [2.0, 4.0, 8.0]


def test_a_late_task_gets_its_reference_when_first_seen() -> None:
    normalization = build("rescaled")
    normalization.observe(vector(2, 4, math.nan), torch.tensor([True, True, False]), normalization.forming())
    normalization.observe(vector(9, 9, 1), torch.tensor([True, True, False]), normalization.forming())
    assert normalization.seen.tolist() == [True, True, False]
    # The smallest reference is taken over the tasks seen so far.
    torch.testing.assert_close(normalization(vector(2, 4, 1))[:2], vector(2, 2), rtol=1e-15, atol=0)
    normalization.observe(vector(9, 9, 0.5), ALL, normalization.forming())
    assert normalization.reference_losses.tolist() == [2.0, 4.0, 0.5]
    torch.testing.assert_close(normalization(vector(2, 4, 0.5)), vector(0.5, 0.5, 0.5), rtol=1e-15, atol=0)


def test_mean_of_runs_until_its_window_is_full() -> None:
    normalization = build("initial", MeanOf(3))
    seen = [(vector(1, 10, 5), ALL), (vector(3, 20, 0), torch.tensor([True, True, False]))]
    seen += [(vector(5, 30, 7), ALL), (vector(100, 100, 12), ALL), (vector(100, 100, 100), ALL)]
    expected = [[1, 10, 5], [2, 15, 5], [3, 20, 6], [3, 20, 8], [3, 20, 8]]
    for (losses, present), references in zip(seen, expected, strict=True):
        normalization.observe(losses, present, normalization.forming())
        torch.testing.assert_close(normalization.reference_losses, vector(*references), rtol=1e-15, atol=0)


def test_every_epoch_replaces_the_reference_at_the_first_step_that_has_the_task() -> None:
    normalization = build("initial", "every_epoch")
    normalization.begin_epoch()
    normalization.observe(vector(1, 2, 3), ALL, normalization.forming())
    normalization.begin_epoch()
    normalization.observe(vector(4, 5, 6), torch.tensor([True, False, True]), normalization.forming())
    assert normalization.reference_losses.tolist() == [4.0, 2.0, 6.0]
    normalization.observe(vector(7, 8, 9), ALL, normalization.forming())
    assert normalization.reference_losses.tolist() == [4.0, 8.0, 6.0]
    other = build("initial", "first_step")
    other.observe(vector(1, 2, 3), ALL, other.forming())
    other.begin_epoch()
    other.observe(vector(4, 5, 6), ALL, other.forming())
    assert other.reference_losses.tolist() == [1.0, 2.0, 3.0]


def test_which_tasks_have_been_seen_is_state() -> None:
    # The smallest reference is the absent task's: without `seen`, a resumed run would scale by another one.
    normalization, resumed = build("rescaled"), build("rescaled")
    normalization.observe(vector(2, 0.5, 8), ALL, normalization.forming())
    resumed.load_state_dict(normalization.state_dict())
    later = torch.tensor([True, False, True])
    for each in (normalization, resumed):
        each.observe(vector(3, 3, 3), later, each.forming())
    assert torch.equal(resumed(vector(1, 1, 1)), normalization(vector(1, 1, 1)))


@pytest.mark.parametrize(
    ("kind", "first", "later"),
    [
        ("none", [False] * 3, [False] * 3),
        ("initial", [False, True, True], [False] * 3),
        ("rescaled", [False, True, True], [False] * 3),
        ("log", [False, True, True], [False, True, True]),
        ("power", [False, True, True], [False, False, True]),
    ],
)
def test_outside_domain(kind: str, first: list[bool], later: list[bool]) -> None:
    normalization = build(kind)
    bad = vector(1, 0, -1)
    assert normalization.outside_domain(bad, ALL, normalization.forming()).tolist() == first
    assert not normalization.outside_domain(bad, torch.tensor([True, False, False]), normalization.forming()).any()
    normalization.observe(vector(1, 1, 1), ALL, normalization.forming())
    assert normalization.outside_domain(bad, ALL, normalization.forming()).tolist() == later


def test_a_solved_task_keeps_a_finite_slope_under_power() -> None:
    normalization = build("power", power=0.5)
    normalization.observe(vector(2, 2, 2), ALL, normalization.forming())
    losses = vector(0, 1e-6, 2e-6).requires_grad_()
    normalised = normalization(losses)
    normalised.sum().backward()
    # At l / l0 = 1e-6: value (1e-6)^p / p and slope (1e-6)^(p - 1) / l0; at 0 the tangent's.
    slope = 1e-6**-0.5 / 2
    assert losses.grad.tolist() == pytest.approx([slope, slope, slope], rel=1e-9)
    assert normalised.tolist() == pytest.approx([2e-3 - 1e-3, 2e-3 - 5e-4, 2e-3], rel=1e-9)


def test_power_keeps_the_digits_of_float32() -> None:
    normalization = build("power", power=0.5).float()
    normalization.observe(vector(2, 2, 2).float(), ALL, normalization.forming())
    losses = vector(1.7, 0.3, 5).float().requires_grad_()
    normalization(losses).sum().backward()
    exact = [(loss / 2) ** -0.5 / 2 for loss in losses.tolist()]
    assert losses.grad.tolist() == pytest.approx(exact, rel=3e-7)


@pytest.mark.parametrize(("reference", "steps"), [("first_step", 1), (MeanOf(3), 3), ("every_epoch", 1)])
def test_references_that_are_formed_are_settled_until_something_new_comes(reference: str | MeanOf, steps: int) -> None:
    asked, not_asked = build("initial", reference), build("initial", reference)

    def observe(losses: Tensor, present: Tensor = ALL) -> None:
        for normalization in (asked, not_asked):
            normalization.observe(losses, present, normalization.forming())
        asked.settle()
        ours, theirs = asked.state_dict(), not_asked.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    late = torch.tensor([True, False, True])
    fresh = {name: tensor.clone() for name, tensor in asked.state_dict().items()}
    for t in range(9):
        observe(vector(1.0 + t, 2.0 - t / 10, 3.0), late)  # the second task is still to come: nothing is settled
    for t in range(9):
        observe(vector(5.0 + t, 6.0, 7.0))
    assert asked.reference_losses[1] == 6.0
    for normalization in (asked, not_asked):
        normalization.begin_epoch()
    for t in range(9):
        observe(vector(8.0 + t, 9.0, 10.0))
    assert (asked.reference_losses[1] == 9.0) == (reference == "every_epoch")
    for normalization in (asked, not_asked):
        normalization.load_state_dict(fresh)
    for _ in range(steps):
        observe(vector(0.5, 0.5, 0.5))
    assert asked.reference_losses.tolist() == [0.5] * 3


def test_settled_references_cost_nothing() -> None:
    normalization = build("initial")
    for _ in range(4):
        normalization.observe(vector(1.0, 2.0, 3.0), ALL, normalization.forming())
        normalization.settle()
    references = normalization.reference_losses
    normalization.observe(vector(4.0, 5.0, 6.0), ALL, normalization.forming())
    assert normalization.reference_losses is references

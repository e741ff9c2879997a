"""`phase`: the warm-up is `ls` and learns nothing, frozen goes on weighting; beginning with what a run has learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.engine.objective import HistoryObjective, ProgressObjective
from hf_bilb.errors import NonFiniteLossError, TaskLossError
from tests.contract.cases import CASES, DOUBLE_LOOP, Case, Tilted, advance, batch_for, features_for, random_losses

K = 4
every_case = pytest.mark.parametrize("case", CASES, ids=str)
SOME = torch.tensor([2.0, 0.0, 1.0, 3.0], dtype=torch.float64)


def build(case: Case, **more: Any) -> LossBalancer:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    balancer = case.build(K, **more).bind(Tilted(K, torch.float64), optimizer)
    balancer.on_epoch_begin(0)
    return balancer


def changed(before: dict[str, Tensor], balancer: LossBalancer) -> set[str]:
    after = balancer.state_dict()
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


# --- warm-up ------------------------------------------------------------------------------------------------------


def check_warm_up(case: Case, absent_tasks: Any, rules: dict[str, Any]) -> None:
    balancer = build(case, absent_tasks=absent_tasks, **rules)
    ls = build_balancer("ls", K, dtype=torch.float64, absent_tasks="skip", **rules)
    balancer.phase = "warmup"
    before = balancer.state_dict()
    lone = torch.tensor([0.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    for row, counts in zip(random_losses(K, 4), (None, SOME, lone, torch.zeros(K)), strict=True):
        leaf, plain = row.clone().requires_grad_(), row.clone().requires_grad_()
        value = balancer.backward(leaf, counts, router_features=features_for(balancer))
        expected = ls.backward(plain, counts)
        balancer.step()
        assert torch.equal(leaf.grad, plain.grad) and torch.equal(balancer.coefficients, ls.coefficients)
        torch.testing.assert_close(value, expected, rtol=1e-15, atol=0)
        assert balancer.weights is None
    assert changed(before, balancer) == {"memory.last_losses", "memory.seen"}
    assert balancer.diagnose() == []


@every_case
def test_the_warm_up_is_ls_and_leaves_no_trace_but_the_last_losses(case: Case) -> None:
    check_warm_up(case, "auto", {})


@pytest.mark.parametrize(
    "rules",
    [{"coefficient_scale": "sum_to_k"}, {"coefficient_floor": 0.5, "task_priors": [1.0, 0.5, 2.0, 3.0]}],
    ids=["scale", "floor_priors"],
)
@pytest.mark.parametrize("absent_tasks", ["auto", "skip", "hold"])
@pytest.mark.parametrize("name", ["bilb", "si", "uw"])
def test_the_warm_up_is_ls_with_the_same_rules(name: str, absent_tasks: str, rules: dict[str, Any]) -> None:
    check_warm_up(Case(name, "default"), absent_tasks, rules)


def test_the_warm_up_takes_losses_that_the_method_cannot() -> None:
    row = torch.tensor([-1.0, 0.0, 2.0, 1.0])
    for name, options in (("bilb", {"normalization": "log"}), ("si", {}), ("ls", {"normalization": "initial"})):
        balancer = build_balancer(name, K, **options)
        balancer.phase = "warmup"
        assert advance(balancer, row).tolist() == [1.0] * K
        with pytest.raises(NonFiniteLossError, match=r"^the loss of task 'task_1' is inf; "):
            advance(balancer, torch.tensor([1.0, torch.inf, 1.0, 1.0]))
        balancer.phase = "balancing"
        with pytest.raises(NonFiniteLossError, match=r"^the loss of task 'task_0' is -1.0, but balancer"):
            advance(balancer, row)


def test_references_are_taken_at_the_first_step_after_the_warm_up() -> None:
    balancer = build_balancer("bilb", K, dtype=torch.float64, reference={"mean_of": 2})
    rows = random_losses(K, 5)
    balancer.phase = "warmup"
    for row in rows[:2]:
        advance(balancer, row)
    balancer.phase = "balancing"
    for row in rows[2:]:
        advance(balancer, row)
    torch.testing.assert_close(balancer.reference_losses, (rows[2] + rows[3]) / 2, rtol=1e-15, atol=0)


@every_case
def test_after_the_warm_up_the_run_is_one_that_begins_there(case: Case) -> None:
    warmed, fresh = build(case), build(case)
    rows = random_losses(K, 8)
    warmed.phase = "warmup"
    for row in rows[:3]:
        advance(warmed, row)
    warmed.phase = "balancing"
    for row in rows[3:]:
        assert torch.equal(advance(warmed, row), advance(fresh, row))
    assert changed(fresh.state_dict(), warmed) == set()


# --- frozen -------------------------------------------------------------------------------------------------------


# RLW goes on drawing, which its own tests look at.
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "rlw"], ids=str)
def test_frozen_goes_on_weighting_and_learns_nothing(case: Case) -> None:
    balancer, rows = build(case), random_losses(K, 8)
    for row in rows[:3]:
        advance(balancer, row)
    balancer.phase = "frozen"
    before = balancer.state_dict()
    # What the method says with the parameters and references it has: an update that is dropped changes neither.
    other = build(case)
    if isinstance(other.objective, (HistoryObjective, ProgressObjective)):
        other.phase = "frozen"  # a further step compares, or takes a record, before it weighs
    found = []
    for row in rows[3:]:
        other.load_state_dict(before)
        leaf = row.clone().requires_grad_()
        other.backward(leaf, router_features=features_for(other))
        if case.option("reference") == "first_step":
            assert torch.equal(advance(balancer, row), leaf.grad)
        else:
            advance(balancer, row)
        found.append(balancer.coefficients)
    assert changed(before, balancer) <= {"memory.last_losses", "guards.counts", "guards.dominated"}
    if case.option("normalization") in ("log", "power"):
        assert not torch.equal(found[0], found[1])


def test_a_dropped_step_teaches_nothing_after_it_is_frozen() -> None:
    balancer, rows = build_balancer("famo", K, dtype=torch.float64), random_losses(K, 3)
    after = rows[2]
    balancer.backward(rows[0].clone().requires_grad_())
    balancer.step(reevaluate=lambda: after)
    before = balancer.snapshot()
    balancer.backward(rows[1].clone().requires_grad_())
    balancer.rollback(before)  # the step is dropped, and the next one is frozen
    balancer.phase = "frozen"
    balancer.backward(rows[1].clone().requires_grad_())
    balancer.step(reevaluate=lambda: after)
    assert torch.equal(balancer.objective.logits, before["objective.logits"])


@pytest.mark.parametrize("reference", ["first_step", "every_epoch", {"mean_of": 3}], ids=str)
def test_frozen_keeps_references_but_a_late_task_gets_one(reference: Any) -> None:
    balancer = build_balancer("bilb", K, dtype=torch.float64, reference=reference, absent_tasks="skip")
    rows = random_losses(K, 6)
    balancer.on_epoch_begin(0)
    advance(balancer, rows[0], SOME)
    balancer.phase = "frozen"
    balancer.on_epoch_begin(1)
    advance(balancer, rows[1], SOME)
    here = SOME > 0
    assert torch.equal(balancer.reference_losses[here], rows[0][here]) and balancer.reference_losses[1].isnan()
    for row in rows[2:]:
        balancer.on_epoch_begin(2)
        assert advance(balancer, row)[1] != 0
    expected = torch.where(here, rows[0], rows[2])
    assert torch.equal(balancer.reference_losses, expected)


@pytest.mark.parametrize("reference", ["every_epoch", {"mean_of": 3}], ids=str)
@pytest.mark.parametrize("normalization", ["initial", "power"])
def test_frozen_takes_a_solved_task(normalization: str, reference: Any) -> None:
    # Loss 0 cannot be a reference, but none is taken.
    balancer = build_balancer("bilb", K, dtype=torch.float64, reference=reference, normalization=normalization)
    balancer.on_epoch_begin(0)
    advance(balancer, random_losses(K, 1)[0], SOME)
    solved = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    balancer.on_epoch_begin(1)
    with pytest.raises(NonFiniteLossError, match=r"the loss of task 'task_0' is 0.0"):
        advance(balancer, solved, SOME)
    balancer.phase = "frozen"
    assert advance(balancer, solved, SOME).isfinite().all()
    with pytest.raises(NonFiniteLossError, match=r"the loss of task 'task_1' is 0.0"):
        advance(balancer, torch.zeros(K, dtype=torch.float64) + torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_freezing_does_not_stop_guards_and_errors() -> None:
    balancer = build_balancer("bilb", K, preset="celeba", discrepancy_weight=10.0)
    balancer.phase = "frozen"
    advance(balancer, torch.tensor([1.0, 9.0, 1.0, 9.0]))
    assert len(balancer.diagnose()) == 2


# --- start_from ---------------------------------------------------------------------------------------------------


def trained(case: Case, steps: int = 4) -> LossBalancer:
    balancer = build(case)
    balancer.on_epoch_begin(3)
    for row in random_losses(K, steps, seed=5):
        advance(balancer, row)
    return balancer


@every_case
def test_start_from_takes_over_what_was_learned(case: Case) -> None:
    source, target = trained(case), build(case)
    target.start_from(source.state_dict())
    ours, theirs = target.state_dict(), source.state_dict()
    different = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    own = {"epoch", "guards.counts", "guards.dominated", "lower_level.started", "lower_level.z.tilt"}
    own |= {name for name in ours if name.startswith("progress.")}  # another model's losses are no progress of this one
    assert different <= own and {"epoch", "guards.counts"} <= different
    assert int(ours["epoch"]) == 0 and not ours["guards.counts"].any()
    row = random_losses(K, 1, seed=6)[0]
    if isinstance(source.objective, ProgressObjective) and source.objective.reevaluate == "next_batch":
        source.phase = target.phase = "frozen"
    assert torch.equal(advance(target, row), advance(source, row))


def test_start_from_does_not_compare_with_the_other_runs_losses() -> None:
    case = Case("famo", "next_batch", {"reevaluate": "next_batch"})
    target = build(case)
    target.start_from(trained(case).state_dict())
    learned = target.objective.logits.detach().clone()
    first, second = random_losses(K, 2, seed=6)
    advance(target, first)
    assert torch.equal(target.objective.logits, learned)
    advance(target, second)
    assert not torch.equal(target.objective.logits, learned)


def test_start_from_with_epochs_takes_new_references_at_the_first() -> None:
    case = next(case for case in CASES if case.label == "every_epoch")
    target = case.build(K)
    target.start_from(trained(case).state_dict())
    row = random_losses(K, 1, seed=8)[0]
    target.on_epoch_begin(0)
    advance(target, row)
    assert torch.equal(target.reference_losses, row)


def test_start_from_drops_the_z_of_the_other_run() -> None:
    double = Case("bilb", "double", {"lower_level": DOUBLE_LOOP})
    state = trained(double).state_dict()
    assert state["lower_level.z.tilt"].any() and state["lower_level.started"]
    target = build(double)
    target.start_from(state)
    assert not target.state_dict()["lower_level.z.tilt"].any()
    # A balancer at work, too: z begins where the model is.
    busy = trained(double)
    busy.start_from(state)
    assert not busy.state_dict()["lower_level.started"]
    row = random_losses(K, 1)[0]
    busy.backward(row.clone().requires_grad_())
    assert not busy.state_dict()["lower_level.z.tilt"].any()
    busy.step(reevaluate=lambda: batch_for(busy, row))
    # A single loop has no use for it, and an unbound balancer nowhere to put it.
    for other in (build_balancer("bilb", K, dtype=torch.float64), double.build(K)):
        other.start_from(state)
        assert torch.equal(other.reference_losses, state["normalization.reference_losses"])
    # Nor does a double loop miss the z of a single loop.
    target.start_from(trained(Case("bilb", "single")).state_dict())


def test_start_from_refuses_what_does_not_fit_and_changes_nothing() -> None:
    target = trained(Case("bilb", "default"))
    before = target.state_dict()
    for state, message in (
        (build_balancer("uw", K).state_dict(), "was it saved by another method"),
        (build_balancer("bilb", K + 1).state_dict(), r"has shape \(5,\), expected \(4,\) for 4 tasks"),
    ):
        with pytest.raises(TaskLossError, match=message):
            target.start_from(state)
        assert changed(before, target) == set()

"""`absent_tasks`: `auto` is `hold` for global batches of one task and `skip` for others; what holding means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.losses.contract import TaskLosses
from tests.contract.cases import CASES, Case, Tilted, advance, features_for, random_losses
from tests.products import in_turn

every_case = pytest.mark.parametrize("case", CASES, ids=str)
K = 4


def items(*tasks: int) -> Tensor:
    """Counts of a batch that holds these tasks, each with another number of items."""
    counts = torch.zeros(K, dtype=torch.float64)
    counts[list(tasks)] = torch.tensor([3.0, 1.0, 2.0, 5.0], dtype=torch.float64)[list(tasks)]
    return counts


ALONE = [items(k) for k in (2, 0, 2, 1, 1, 3, 0, 2, 3)]
TOGETHER = [items(*tasks) for tasks in ((0, 1), (0, 1, 2, 3), (2, 3), (1, 2, 3), (0, 3))]
MIXED = [items(*tasks) for tasks in ((1,), (0, 2), (), (2,), (0, 1, 2, 3), (3,), (1, 3), (0,), (), (2,))]


def build(case: Case, absent_tasks: str) -> LossBalancer:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    balancer = case.build(K, absent_tasks=absent_tasks).bind(Tilted(K, torch.float64), optimizer)
    balancer.on_epoch_begin(0)
    return balancer


def assert_same(one: LossBalancer, other: LossBalancer) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize(("case", "rule"), in_turn(CASES, ["hold", "skip"]), ids=str)
def test_auto_is_hold_for_lone_tasks_and_skip_for_others(case: Case, rule: str) -> None:
    batches = {"hold": ALONE, "skip": TOGETHER}[rule]
    automatic, fixed = build(case, "auto"), build(case, rule)
    for row, counts in zip(random_losses(K, len(batches)), batches, strict=True):
        row = torch.where(counts > 0, row, torch.nan)
        assert torch.equal(advance(automatic, row, counts), advance(fixed, row, counts))
        assert_same(automatic, fixed)


@every_case
@pytest.mark.slow
def test_auto_in_a_mixed_stream_takes_each_batch_for_what_it_is(case: Case) -> None:
    automatic = build(case, "auto")
    for row, counts in zip(random_losses(K, len(MIXED)), MIXED, strict=True):
        # A balancer with the other rule that has come to the same state.
        fixed = build(case, "hold" if (counts > 0).sum() == 1 else "skip")
        fixed.load_state_dict(automatic.state_dict())
        row = torch.where(counts > 0, row, torch.nan)
        assert torch.equal(advance(automatic, row, counts), advance(fixed, row, counts))
        assert torch.equal(automatic._last.value, fixed._last.value)
        assert_same(automatic, fixed)


def test_auto_is_the_default() -> None:
    assert build_balancer("bilb", K).absent_tasks == "auto"


PLAIN: dict[str, Any] = {
    "normalization": "none", "discrepancy_weight": 0.1, "pairs": "adjacent", "initial_logits": [0.5, -0.5, 1.0, 0.0],
    "weight_denominator": "none", "learning_rate": 0.0,
}  # fmt: skip


def test_hold_compares_with_the_last_losses_by_hand() -> None:
    balancer = build_balancer("bilb", K, dtype=torch.float64, **PLAIN)
    sigma = torch.sigmoid(torch.tensor(PLAIN["initial_logits"], dtype=torch.float64))
    last: dict[int, float] = {}
    for row, counts in zip(random_losses(K, len(ALONE), seed=4), ALONE, strict=True):
        k = int(counts.argmax())
        last[k] = float(row[k])
        found = advance(balancer, row, counts)
        values = {i: float(sigma[i]) * last[i] for i in sorted(last)}
        seen = list(values)
        gaps = [(seen[j], seen[j + 1]) for j in range(len(seen) - 1)]
        value = sum(values.values()) + 0.1 * sum(abs(values[i] - values[j]) for i, j in gaps)
        slope = sum((1.0 if values[k] > values[j if i == k else i] else -1.0) for i, j in gaps if k in (i, j))
        assert float(balancer._last.value) == pytest.approx(value, rel=1e-13)
        assert float(found[k]) == pytest.approx(float(sigma[k]) * (1 + 0.1 * slope), rel=1e-13)
        assert found.count_nonzero() == 1
        assert balancer.coefficients.count_nonzero() == 1, "zero for absent tasks, held ones among them"


# --- micro-batches ------------------------------------------------------------------------------------------------


def decide(absent_tasks: str, *windows: list[Tensor]) -> LossBalancer:
    """A balancer that has seen all tasks, and then these windows of micro-batches."""
    balancer = build_balancer("bilb", K, dtype=torch.float64, absent_tasks=absent_tasks, **PLAIN)  # type: ignore[arg-type]
    advance(balancer, random_losses(K, 1)[0])
    for window in windows:
        rows = random_losses(K, len(window), seed=9)
        balancer.decide([TaskLosses(row, counts) for row, counts in zip(rows, window, strict=True)])
    return balancer


@pytest.mark.parametrize(
    ("window", "rule"),
    [
        ([items(1)], "hold"),
        ([items(1), items(1), items()], "hold"),
        ([items(1), items(2)], "skip"),
        ([items(1), items(2, 3)], "skip"),
        ([items(), items()], "skip"),
    ],
)
def test_auto_looks_at_all_micro_batches_together(window: list[Tensor], rule: str) -> None:
    automatic, fixed, other = (decide(kind, window) for kind in ("auto", rule, {"hold": "skip", "skip": "hold"}[rule]))
    assert torch.equal(automatic._last.coefficients, fixed._last.coefficients)
    assert torch.equal(automatic._last.value, fixed._last.value)
    assert not torch.equal(automatic._last.value, other._last.value)


@pytest.mark.parametrize("name", ["bilb", "stch", "si", "famo"])
def test_auto_is_the_same_for_any_split(name: str) -> None:
    # Sums and counts of two micro-batches, or one batch of all their items: the same decisions, by the same state.
    options = {"reevaluate": "next_batch"} if name == "famo" else {}
    parts, whole = (build_balancer(name, K, dtype=torch.float64, **options) for _ in range(2))
    windows = [(items(0), items(0)), (items(0), items(1)), (items(), items(3)), (items(2), items(0, 2)), (items(1),)]
    advance(parts, random_losses(K, 1)[0])
    advance(whole, random_losses(K, 1)[0])
    for seed, window in enumerate(windows):
        rows = random_losses(K, len(window), seed=seed)
        counts = sum(window)
        together = sum(row * here for row, here in zip(rows, window, strict=True)) / counts.clamp(min=1)
        parts.decide([TaskLosses(row, here) for row, here in zip(rows, window, strict=True)])
        whole.decide([TaskLosses(together, counts)])
        for balancer in (parts, whole):
            balancer.step()
        torch.testing.assert_close(parts.coefficients, whole.coefficients, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-12, atol=1e-14)


# --- a step without any task --------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent_tasks", ["auto", "skip"])
def test_a_step_without_any_task_is_worth_nothing(absent_tasks: str) -> None:
    options = {**PLAIN, "learning_rate": 0.1, "optimizer": "sgd"}
    balancer = build_balancer("bilb", K, dtype=torch.float64, absent_tasks=absent_tasks, **options)  # type: ignore[arg-type]
    for row, counts in zip(random_losses(K, 4), ALONE, strict=False):
        advance(balancer, row, counts)
    before = balancer.state_dict()
    assert not advance(balancer, torch.full((K,), torch.nan, dtype=torch.float64), items()).any()
    assert balancer._last.value == 0 and balancer.refused([balancer._last])[0] is None
    after = balancer.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["guards.counts"]


# --- what holding must not spoil ----------------------------------------------------------------------------------


def test_a_loss_of_the_warm_up_is_not_compared_before_it_has_a_reference() -> None:
    # All tasks are seen in the warm-up; then each comes alone, with a loss a thousand times its neighbour's.
    losses = torch.tensor([1.0, 1e3, 1e6, 1e9], dtype=torch.float64)
    for absent_tasks in ("auto", "hold"):
        warmed = build_balancer("bilb", K, dtype=torch.float64, absent_tasks=absent_tasks)  # type: ignore[arg-type]
        fresh = build_balancer("bilb", K, dtype=torch.float64, absent_tasks=absent_tasks)  # type: ignore[arg-type]
        warmed.phase = "warmup"
        for k in range(K):
            assert advance(warmed, losses, items(k)).sum() == 1
        warmed.phase = "balancing"
        for k in (2, 0, 1, 3, 0):
            assert torch.equal(advance(warmed, losses * 0.9, items(k)), advance(fresh, losses * 0.9, items(k)))
        # Without a normalization the losses of the warm-up are as good as any.
        plain = build_balancer("bilb", K, dtype=torch.float64, absent_tasks=absent_tasks, **PLAIN)  # type: ignore[arg-type]
        plain.phase = "warmup"
        advance(plain, losses)
        plain.phase = "balancing"
        advance(plain, losses, items(0))
        assert plain._last.discrepancy > 1e8


@pytest.mark.parametrize("absent_tasks", ["auto", "hold"])
@pytest.mark.parametrize(("scale", "target"), [("sum_to_one", 1.0), ("sum_to_k", float(K))])
def test_a_scale_does_not_undo_the_balancing_of_lone_tasks(absent_tasks: Any, scale: str, target: float) -> None:
    # si: c = 1 / l of all tasks, those held included, brought to the target; alone, every c would be the same.
    balancer = build_balancer("si", K, dtype=torch.float64, absent_tasks=absent_tasks, coefficient_scale=scale)
    losses = torch.tensor([0.1, 1.0, 10.0, 2.0], dtype=torch.float64)
    for k in range(K):
        advance(balancer, losses, items(k))
    expected = target / losses / (1 / losses).sum()
    for k in range(K):
        found = advance(balancer, losses, items(k))
        assert float(found[k]) == pytest.approx(float(expected[k]), rel=1e-14) and found.count_nonzero() == 1


def test_a_floor_looks_at_all_tasks_of_f() -> None:
    balancer = build_balancer("si", K, dtype=torch.float64, absent_tasks="auto", coefficient_floor=0.5)
    losses = torch.tensor([0.1, 1.0, 10.0, 2.0], dtype=torch.float64)
    for k in (*range(K), *range(K)):
        found = advance(balancer, losses, items(k))
    assert float(found[3]) == pytest.approx(0.5 * float((1 / losses).mean()), rel=1e-14)


@pytest.mark.parametrize("options", [{}, {"coefficient_scale": "sum_to_one"}, {"task_priors": [1.0, 2.0, 1.0, 0.5]}])
@pytest.mark.parametrize("name", ["ls", "si", "uw", "bilb"])
def test_lone_tasks_dominate_nobody(name: str, options: dict[str, Any]) -> None:
    balancer = build_balancer(name, K, absent_tasks="auto", **options)
    losses = torch.tensor([2.0, 3.0, 4.0, 5.0])
    for t in range(130):
        advance(balancer, losses, items(t % K).float())
    assert balancer.diagnose() == []


def test_a_task_that_does_dominate_is_named_where_each_comes_alone() -> None:
    balancer = build_balancer("si", task_names=["a", "b", "c", "d"], absent_tasks="auto")
    losses = torch.tensor([2.0, 1e-3, 4.0, 5.0])
    for t in range(130):
        advance(balancer, losses, items(t % K).float())
    (message,) = balancer.diagnose()
    assert message.startswith("task 'b' had over 90 % of the sum of |coefficients| in 12")


def test_features_of_lone_tasks() -> None:
    # The features' gradient is that of an F over all tasks seen.
    case = next(case for case in CASES if case.label == "features")
    balancer = build(case, "auto")
    losses = random_losses(K, 1)[0]
    for k in range(K):
        advance(balancer, losses, items(k))
    features = features_for(balancer).requires_grad_()
    balancer.backward(losses.clone().requires_grad_(), items(1), router_features=features)
    alone = build(case, "skip")
    alone.load_state_dict(balancer.state_dict())
    other = features_for(alone).requires_grad_()
    alone.backward(losses.clone().requires_grad_(), items(1), router_features=other)
    assert features.grad.any() and not torch.allclose(features.grad, other.grad, rtol=0.1)


@pytest.mark.parametrize("name", ["ls", "mgda"])
def test_a_task_that_no_micro_batch_has_in_a_loop_of_one_s_own(name: str) -> None:
    # Several micro-batches, one decision, each part applied without a share of a window.
    counts = [items(0, 2), items(2, 3), items(0, 3)]
    model = Tilted(K, torch.float64)
    row = random_losses(K, 1)[0]
    gradients = []
    for parts in (counts, [sum(counts)]):
        balancer = build_balancer(name, K, dtype=torch.float64, absent_tasks="skip").bind(model)
        model.zero_grad()
        # A loss of NaN whose gradient is not.
        batches = [TaskLosses(model(row) + torch.where(n > 0, 0.0, torch.nan), n) for n in parts]
        weighting = balancer.decide(batches)
        for batch in batches:
            balancer.apply(batch, weighting).backward()
        balancer.step()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].isfinite().all() and gradients[0].any()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)

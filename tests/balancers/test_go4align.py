"""GO4Align's groups against every possible cut, its weights against a plain loop, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.balancers.go4align import group_means, lloyd_means
from hf_bilb.errors import NonFiniteLossError, OptionError
from tests.balancers.reference import load
from tests.contract.cases import advance, random_losses


def go4align(num_tasks: int, **options: Any) -> LossBalancer:
    return build_balancer("go4align", num_tasks, dtype=torch.float64, **options)


def distance(values: np.ndarray, means: np.ndarray) -> float:
    return float(np.square(values - means).sum())


def best_cut(values: np.ndarray, num_groups: int) -> float:
    """The smallest sum of squared distances over all ways to cut the sorted values into at most so many groups."""
    ranked = np.sort(values)
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(ranked) + 1), num_groups - 1):
        parts = [part for part in np.split(ranked, cuts) if len(part)]
        best = min(best, sum(distance(part, part.mean()) for part in parts))
    return best


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_groups_are_the_best_of_all_cuts(num_groups: int, seed: int) -> None:
    values = random_losses(8, 1, seed=seed)[0]
    means = group_means(values, torch.ones(8, dtype=torch.bool), num_groups)
    assert len(means.unique()) == num_groups
    assert distance(values.numpy(), means.numpy()) == pytest.approx(best_cut(values.numpy(), num_groups), abs=1e-12)
    for mean in means.unique():
        torch.testing.assert_close(mean, values[means == mean].mean())


@pytest.mark.slow
def test_forty_values_are_grouped_no_worse_than_by_the_best_of_many_starts() -> None:
    from sklearn.cluster import KMeans

    for num_groups, seed in itertools.product((2, 5), range(3)):
        values = random_losses(40, 1, seed=seed)[0]
        found = distance(values.numpy(), group_means(values, torch.ones(40, dtype=torch.bool), num_groups).numpy())
        fitted = KMeans(num_groups, n_init=100, random_state=0).fit(values.numpy()[:, None])
        assert found == pytest.approx(fitted.inertia_, rel=1e-9)


def test_values_of_very_different_sizes_and_equal_ones() -> None:
    everyone = torch.ones(6, dtype=torch.bool)
    values = torch.tensor([1e-6, 1e6, 2e-6, 1.0, 1e6 + 1, 1.0], dtype=torch.float64)
    expected = torch.tensor([1.5e-6, 1e6 + 0.5, 1.5e-6, 1.0, 1e6 + 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(group_means(values, everyone, 3), expected, rtol=1e-9, atol=0)
    alike = torch.full((6,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(group_means(alike, everyone, 3), alike)


def test_inactive_values_are_in_no_group() -> None:
    values = random_losses(6, 1)[0]
    active = torch.tensor([True, False, True, True, False, True])
    for num_groups in (1, 2, 3, 6):
        means = group_means(values.where(active, torch.nan), active, num_groups)
        there = values[active]
        expected = group_means(there, torch.ones(4, dtype=torch.bool), min(num_groups, 4))
        torch.testing.assert_close(means[active], expected, rtol=1e-14, atol=0)
        assert not means[~active].any()


class ByHand:
    """The official update, in plain numbers: q in the simplex, the indicator, groups by trying every cut."""

    def __init__(self, num_tasks: int, step_size: float) -> None:
        self.q = np.full(num_tasks, 1 / num_tasks)
        self.step_size = step_size

    def indicator(self, losses: Tensor) -> np.ndarray:
        values = losses.numpy()
        self.q = self.q * np.exp(-self.step_size * values)
        self.q = self.q / self.q.sum()
        return values.sum() / values * self.q


@pytest.mark.parametrize("num_groups", [1, 5])
def test_the_weights_are_those_of_a_plain_loop(num_groups: int) -> None:
    balancer, reference = go4align(5, num_groups=num_groups, step_size=0.2), ByHand(5, 0.2)
    for row in random_losses(5, 30):
        expected = reference.indicator(row)
        if num_groups == 1:
            expected = np.full(5, expected.mean())
        torch.testing.assert_close(advance(balancer, row).numpy(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["go4align_g1_K3_adam", "go4align_g2_K2_sgd", "go4align_g2_K3_adam"])
def test_the_recorded_indicator_and_groups(name: str) -> None:
    # Beside the float32 trajectory of the parity test: the float64 parts of the file, step by step at its own losses.
    case = load(name)
    num_groups = case["num_groups"]
    balancer = go4align(case["K"], num_groups=case["K"], step_size=case["robust_step_size"])
    everyone = torch.ones(case["K"], dtype=torch.bool)
    for t, losses in enumerate(torch.from_numpy(case["losses"])):
        np.testing.assert_allclose(advance(balancer, losses).numpy(), case["raw_weight"][t], rtol=1e-9)
        sums = balancer.state_dict()["objective.loss_sums"]
        np.testing.assert_allclose(torch.softmax(-case["robust_step_size"] * sums, 0), case["adv_probs"][t], rtol=1e-9)
        means = group_means(torch.from_numpy(case["raw_weight"][t]), everyone, num_groups)
        np.testing.assert_allclose(means, case["weights"][t], rtol=1e-5)


def lloyd_by_hand(values: np.ndarray, start: list[int]) -> np.ndarray:
    """The official search, in plain loops."""
    centers = [float(values[i]) for i in start]
    while True:
        group = [min(range(len(centers)), key=lambda j, v=v, c=centers: abs(v - c[j])) for v in values]
        means = [np.mean([v for v, g in zip(values, group, strict=True) if g == j]) for j in range(len(centers))]
        shift = sum(abs(a - b) for a, b in zip(means, centers, strict=True))
        centers = means
        if shift**2 < 1e-4:
            return np.array([centers[g] for g in group])


@pytest.mark.parametrize("num_groups", [2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_lloyd_s_search_from_given_centres(num_groups: int, seed: int) -> None:
    values = 10 * random_losses(12, 1, seed=seed)[0]
    start = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:num_groups]
    found = lloyd_means(values, torch.ones(12, dtype=torch.bool), start)
    torch.testing.assert_close(found.numpy(), lloyd_by_hand(values.numpy(), start.tolist()), rtol=1e-12, atol=0)
    some = torch.arange(14) < 12
    padded = lloyd_means(torch.cat([values, torch.full((2,), torch.nan)]), some, start)
    torch.testing.assert_close(padded[:12], found, rtol=1e-12, atol=0)
    assert not padded[12:].any()


def test_lloyd_s_search_can_stop_short_of_the_optimum_and_starts_differ() -> None:
    balancer, exact = go4align(8, num_groups=3, assignment="lloyd"), go4align(8, num_groups=3)
    worse, rows = 0, random_losses(8, 40, seed=1)
    for row in rows:
        found, best = advance(balancer, row), advance(exact, row)
        indicator = (row.sum() / row * torch.softmax(-1e-4 * balancer.state_dict()["objective.loss_sums"], 0)).numpy()
        assert distance(indicator, found.numpy()) >= distance(indicator, best.numpy()) - 1e-9
        worse += distance(indicator, found.numpy()) > 1.01 * distance(indicator, best.numpy())
    assert 0 < worse < 40


def test_searches_begin_elsewhere_in_every_update_and_with_every_seed() -> None:
    row = random_losses(8, 1, seed=1)[0]
    found = []
    for seed in (0, 0, 1):
        balancer = go4align(8, num_groups=3, assignment="lloyd", seed=seed, step_size=0.0)
        found.append(torch.stack([advance(balancer, row) for _ in range(20)]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert len(found[0].unique(dim=0)) > 1


def test_only_tasks_that_are_there_fall_behind() -> None:
    some = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    rows = random_losses(3, 2)
    for absent_tasks, expected in (("skip", rows[0, 1]), ("hold", 2 * rows[0, 1])):
        balancer = go4align(3, absent_tasks=absent_tasks)
        advance(balancer, rows[0])
        advance(balancer, rows[1].where(some > 0, torch.nan), some)
        assert balancer.state_dict()["objective.loss_sums"][1] == expected


def test_a_batch_that_is_refused_leaves_no_trace_and_frozen_keeps_the_sums() -> None:
    balancer = go4align(3, num_groups=2)
    rows = random_losses(3, 3)
    advance(balancer, rows[0])
    before = balancer.state_dict()["objective.loss_sums"]
    assert torch.equal(before, rows[0])
    for bad, message in ((torch.nan, "is nan"), (0.0, "is 0.0, but balancer 'go4align'"), (5e-324, "coefficient")):
        with pytest.raises(NonFiniteLossError, match=message):
            balancer.backward(torch.tensor([1.0, bad, 1.0], dtype=torch.float64, requires_grad=True))
        assert torch.equal(balancer.state_dict()["objective.loss_sums"], before)
    balancer.phase = "frozen"
    advance(balancer, rows[1])
    assert torch.equal(balancer.state_dict()["objective.loss_sums"], before)


def test_what_is_refused() -> None:
    for options, message in (
        ({"num_groups": 0}, r"^balancer.num_groups: 0 is not valid, expected an integer >= 1$"),
        ({"step_size": -1.0}, r"^balancer.step_size: -1.0 is not valid, expected a number >= 0$"),
        ({"assignment": "kmean"}, r"^balancer.assignment: 'kmean' is not valid, .*kmeans"),
        ({"normalization": "log"}, r"^balancer.normalization: 'log' is not valid"),
    ):
        with pytest.raises(OptionError, match=message):
            go4align(3, **options)

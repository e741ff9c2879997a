"""No factor of 2, 4 or 8: models with `**kwargs`, gradient accumulation and ranks in all combinations, under plain SGD.

Trainer multiplies and divides losses depending on all three; Adam would hide a constant factor.
"""

from __future__ import annotations

import pytest

from tests.distributed.conftest import Runs
from tests.synthetic import relative_difference

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kwargs_forward", [False, True])
def test_ls_equals_a_plain_loop_over_the_global_batch(
    runs: Runs, kwargs_forward: bool, accumulation: int, ranks: int
) -> None:
    found = (runs.one if ranks == 1 else runs.ranks[0])[f"factor/{kwargs_forward}/{accumulation}"]
    assert found["world_size"] == ranks
    assert found["steps"] == 6
    assert relative_difference(found["parameters"], found["plain"]) <= 1e-12


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (1, 4), (2, 2), (2, 4)])
def test_accumulation_with_partial_labels_equals_whole_batches(runs: Runs, ranks: int, accumulation: int) -> None:
    # With an auxiliary loss and a last window of half the size.
    found = (runs.one if ranks == 1 else runs.ranks[0])[f"accumulated/ls/{accumulation}"]
    expected = runs.one["accumulated/ls/1"]
    assert found["steps"] == expected["steps"] == 18
    assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-11)


def test_a_nonlinear_method_under_accumulation_is_the_same_on_two_ranks(runs: Runs) -> None:
    name = "accumulated/bilb/2"
    # Two ranks take two micro-batches of two rows each, one process two of four: the same global micro-batches.
    found, expected = runs.ranks[0][name], runs.one[name]
    assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-11)

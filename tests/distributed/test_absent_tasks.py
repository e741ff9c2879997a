"""`absent_tasks: auto` with sparse labels: the same decision, whatever the split into ranks and micro-batches."""

from __future__ import annotations

import pytest

from tests.distributed.absent_tasks import BALANCERS
from tests.distributed.checks import assert_equals_one_process, assert_same_balancer
from tests.distributed.conftest import Runs
from tests.synthetic import relative_difference

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("balancer", BALANCERS)
def test_two_ranks_with_sparse_labels_equal_one_process(runs: Runs, balancer: str) -> None:
    assert_equals_one_process(runs, f"sparse/{balancer}/auto")


@pytest.mark.parametrize("balancer", BALANCERS)
def test_windows_of_micro_batches_with_sparse_labels_equal_whole_batches(runs: Runs, balancer: str) -> None:
    # Two ranks with four micro-batches each against one process with one batch.
    assert_equals_one_process(runs, f"sparse_windows/{balancer}")


def test_micro_batches_on_one_process_do_too(runs: Runs) -> None:
    found, expected = runs.one["sparse_micro_batches/stch"], runs.one["sparse_windows/stch"]
    assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
    assert_same_balancer(found["balancer"], expected["balancer"], 1e-11)


def test_the_rule_is_neither_hold_nor_skip_there(runs: Runs) -> None:
    parameters = runs.one["sparse/stch/auto"]["parameters"]
    for absent in ("hold", "skip"):
        assert_equals_one_process(runs, f"sparse/stch/{absent}")
        assert relative_difference(runs.one[f"sparse/stch/{absent}"]["parameters"], parameters) > 1e-4

"""`absent_tasks: auto`: whether batches hold one task each is decided over all ranks and micro-batches."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.checks import assert_ranks_agree, assert_same_balancer, assert_same_logs, assert_same_state
from tests.distributed.conftest import Runs
from tests.synthetic import relative_difference

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("in_windows", [False, True])
def test_one_task_on_each_rank_holds_on_both(runs: Runs, in_windows: bool) -> None:
    name = f"one_task_each/auto/{in_windows}"
    assert_ranks_agree(runs, name)
    # One process sees several tasks in its batch: there `auto` would skip.
    found, held, skipped = (
        results[f"one_task_each/{absent}/{in_windows}"]
        for results, absent in ((runs.ranks[0], "auto"), (runs.one, "hold"), (runs.one, "skip"))
    )
    assert relative_difference(found["parameters"], held["parameters"]) <= 1e-12
    assert_same_balancer(found["balancer"], held["balancer"], 1e-11)
    assert_same_logs(found["logs"], held["logs"], 1e-11)
    assert relative_difference(found["parameters"], skipped["parameters"]) > 1e-4
    assert torch.equal(runs.one[name]["parameters"], skipped["parameters"])


def test_two_tasks_on_one_rank_skip_on_both(runs: Runs) -> None:
    name = "switching/auto"
    assert_ranks_agree(runs, name)
    found, expected = runs.ranks[0][name], runs.one[name]
    assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
    assert_same_balancer(found["balancer"], expected["balancer"], 1e-11)
    torch.testing.assert_close(found["values"], expected["values"], rtol=1e-11, atol=1e-11)
    for absent in ("hold", "skip"):
        assert relative_difference(found["parameters"], runs.one[f"switching/{absent}"]["parameters"]) > 1e-4


@pytest.mark.parametrize("absent", ["hold", "skip"])
def test_what_is_said_holds_on_every_rank(runs: Runs, absent: str) -> None:
    found, expected = runs.ranks[0][f"switching/{absent}"], runs.one[f"switching/{absent}"]
    assert relative_difference(found["parameters"], expected["parameters"]) <= 1e-12
    assert_same_state(found["balancer"], runs.ranks[1][f"switching/{absent}"]["balancer"])

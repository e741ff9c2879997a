"""FSDP2: a feature router over windows as on one process; what needs whole parameters is refused."""

from __future__ import annotations

import pytest

from tests.distributed.checks import assert_equals_one_process
from tests.distributed.conftest import Runs

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("balancer", ["features", "nyuv2"])
def test_sharded_parameters_equal_whole_ones(runs: Runs, balancer: str) -> None:
    assert_equals_one_process(runs, f"sharded/{balancer}")


@pytest.mark.parametrize(
    ("scenario", "key"),
    [
        ("lower_level", "balancer.lower_level"),
        ("diagnostics", "diagnostics"),
        ("gradients", "diagnostics.gradients"),
        ("by_hand", "lower_level"),
    ],
)
def test_what_needs_whole_parameters_is_refused(runs: Runs, scenario: str, key: str) -> None:
    for rank in runs.ranks:
        error = rank[f"sharded_refused/{scenario}"]["error"]
        assert error.startswith(f"{key}: ") and "FSDP" in error and "\n" not in error

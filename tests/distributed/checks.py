"""What the distributed tests compare, and how closely."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.conftest import Runs
from tests.synthetic import relative_difference

#: Relative L2 of the parameters, DESIGN "What exact and the same mean": Adam in float64, SGD in float32.
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
#: Of logged numbers and of the balancer's state; in float32 a coefficient 1 / l amplifies rounding.
LOG_TOLERANCE = {"float64": 1e-11, "float32": 2e-5}
#: How near zero no difference d in F's |d| may come: there its sign would be a matter of rounding, equality of luck.
MARGIN = {"float64": 1e-6, "float32": 1e-4}


def assert_ranks_agree(runs: Runs, name: str) -> None:
    first, second = (rank[name] for rank in runs.ranks)
    assert first["world_size"] == second["world_size"] == 2
    assert runs.one[name]["world_size"] == 1
    assert_same_state(first["balancer"], second["balancer"])
    assert torch.equal(first["parameters"], second["parameters"])


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for key in found:
        assert torch.equal(found[key], expected[key]), f"{key} differs"


def assert_same_balancer(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(
            found[key], expected[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def assert_same_logs(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    assert len(found) == len(expected) > 1
    for ours, theirs in zip(found, expected, strict=True):
        # The gradient norm of a dropped step is NaN.
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance, nan_ok=True)


def assert_equals_one_process(runs: Runs, name: str, precision: str = "float64") -> None:
    """Both ranks alike, bit for bit; parameters, balancer and logs those of one process with the whole batch."""
    found, expected = runs.ranks[0][name], runs.one[name]
    assert_ranks_agree(runs, name)
    assert found["steps"] == expected["steps"]
    assert relative_difference(found["parameters"], expected["parameters"]) <= TOLERANCE[precision]
    assert_same_balancer(found["balancer"], expected["balancer"], LOG_TOLERANCE[precision])
    if "logs" in found:
        assert_same_logs(found["logs"], expected["logs"], LOG_TOLERANCE[precision])
    if "smallest_gap" in expected:
        assert MARGIN[precision] < expected["smallest_gap"] < 1

"""FSDP2 and DeepSpeed on CPUs: sharded for sure, and the parameters of one process with the whole batch.

A launch of two processes for each backend; `campaigns/backends.py` runs the whole matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.backend_runs import STEPS, precision_of
from tests.distributed.backends import has_deepspeed
from tests.distributed.checks import MARGIN, TOLERANCE
from tests.distributed.conftest import Runs, launch
from tests.synthetic import relative_difference

pytestmark = pytest.mark.distributed
BACKENDS = [
    "fsdp2",
    *(
        pytest.param(name, marks=pytest.mark.skipif(not has_deepspeed(), reason="needs the package deepspeed"))
        for name in ("zero2", "zero3")
    ),
]
#: Of 164 parameters, what one of two ranks holds, and what its optimizer's state is of (ZeRO-3 keeps its own).
HALVES = {"fsdp2": ("parameters", "updated"), "zero2": ("updated",), "zero3": ("parameters",)}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ran(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return launch(tmp_path_factory.mktemp(backend), "tests.distributed.every_backend", ["--few", backend])


def pairs(ran: Runs, backend: str, word: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Names that end so, with the results of the first rank and of one process."""
    names = [name for name in ran.ranks[0] if name.endswith(word)]
    assert names
    alone = [name.replace(backend, precision_of(backend), 1).removesuffix("/sabotage") for name in names]
    return [(name, ran.ranks[0][name], ran.one[one]) for name, one in zip(names, alone, strict=True)]


@pytest.mark.parametrize("over", ["micro_batch", "window"])
def test_the_same_as_one_process(ran: Runs, backend: str, over: str) -> None:
    precision = precision_of(backend)
    for name, found, expected in pairs(ran, backend, over):
        assert found["steps"] == expected["steps"] == STEPS
        assert torch.equal(found["parameters"], ran.ranks[1][name]["parameters"])
        assert relative_difference(found["parameters"], expected["parameters"]) <= TOLERANCE[precision], name
        assert expected["smallest_gap"] > MARGIN[precision], name


def test_it_is_sharded(ran: Runs, backend: str) -> None:
    for rank in ran.ranks:
        for name in (name for name in rank if name.endswith("/window")):
            held = rank[name]["watched"]
            assert held["whole"] == 164
            assert [held[what] for what in HALVES[backend]] == [82] * len(HALVES[backend])
            assert held["placements"] == (["S(0)"] if backend == "fsdp2" else [])


def test_a_wrong_denominator_is_noticed(ran: Runs, backend: str) -> None:
    for name, found, expected in pairs(ran, backend, "/sabotage"):
        assert relative_difference(found["parameters"], expected["parameters"]) > 1e-4, name


def test_what_needs_whole_parameters_is_refused(ran: Runs, backend: str) -> None:
    kind = "FSDP" if backend == "fsdp2" else "DeepSpeed"
    for rank in ran.ranks:
        for name in ("marigold-exact", "mgda-default", "bilb-double_loop"):
            error = rank[f"{backend}/{name}/refused"]["refused"]
            assert "balancer" in error and f"is not valid with {kind}" in error and "\n" not in error


def test_a_head_that_one_rank_does_not_run(ran: Runs, backend: str, tmp_path: Path) -> None:
    found, expected = (runs["heads"] for runs in (ran.ranks[0], ran.one))
    if backend == "fsdp2":
        assert relative_difference(found["parameters"], expected["parameters"]) <= TOLERANCE["float64"]
    else:  # silently wrong sums, or an endless wait
        for rank in ran.ranks:
            assert rank["heads"]["error"].startswith("losses: the ranks reach different parameters (this one leaves")

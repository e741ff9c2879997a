"""How many torch operations a training step has beside those of the plain Trainer's: on a GPU each is a launch."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

from hf_bilb import list_balancers
from hf_bilb.balancers.registry import GRADIENT_METHODS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from steady_step import operations

K = 40
#: At most so many more in a steady step with complete labels, on one process. None of them may grow; what makes one
#: smaller puts the smaller number here. `famo` and `marigold` run the model once more, which is 17 of theirs.
AT_MOST = {
    "ls": 12,
    "si": 16,
    "rlw": 17,
    "gls": 22,
    "stch": 28,
    "imtl_l": 31,
    "uw": 35,
    "go4align": 41,
    "dwa": 42,
    "bilb": 77,
    "famo": 88,
    "marigold": 117,
}
#: At most so many on average: logs and guards are put together every 64 steps.
TOGETHER = 5


@functools.cache
def plain(steps: int = 1) -> int:
    return len(operations(None, K, steps))


def test_every_loss_balancer_is_here() -> None:
    assert set(AT_MOST) == set(list_balancers()) - set(GRADIENT_METHODS)


@pytest.mark.parametrize("name", AT_MOST)
def test_operations_that_a_step_adds(name: str) -> None:
    assert len(operations(name, K)) - plain() <= AT_MOST[name]


@pytest.mark.parametrize("name", ["ls", "bilb"])
def test_what_waits_is_cheap_when_it_is_put_together(name: str) -> None:
    added = (len(operations(name, K, 64)) - plain(64)) / 64
    assert added <= AT_MOST[name] + TOGETHER


def test_the_host_reads_no_more_than_trainer_and_the_look_at_the_losses() -> None:
    # Where a step ends one number says whether it can be taken; `tolist` of a tensor is no operation on a CPU.
    reads = [operations(name, K).count("_local_scalar_dense") for name in (None, "ls", "gls")]
    assert reads[0] == reads[1] == reads[2]

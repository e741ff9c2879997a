"""Two ranks, and micro-batches, equal one process with the whole batch: a sample of the methods, of those that keep a
record or look at a batch twice. `make campaign` takes every method and variant."""

from __future__ import annotations

import pytest

from tests.contract.cases import Case
from tests.distributed.conftest import Runs
from tests.distributed.method_checks import CHECKS, SAMPLED, sample

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("case", "check"), [pytest.param(*pair, id=f"{pair[0]}/{pair[1]}") for pair in sample()])
def test_a_method_is_the_same(runs: Runs, case: Case, check: str) -> None:
    CHECKS[check].verify(runs, case)


def test_the_sample_covers_every_kind_of_check() -> None:
    assert {check for _, check in sample()} == set(SAMPLED)

"""A language model on two ranks, with accumulation, ends where one process with whole batches does: exact in tokens."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.conftest import Runs, launch
from tests.distributed.token_mixture import KINDS
from tests.synthetic import relative_difference

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return launch(tmp_path_factory.mktemp("mixtures"), "tests.distributed.token_mixture")


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(mixtures: Runs, kind: str) -> None:
    one, ranks = mixtures.one[kind], [rank[kind] for rank in mixtures.ranks]
    assert one["world_size"] == 1 and one["steps"] == 3
    assert relative_difference(one["parameters"], one["before"]) > 0.02
    for rank in ranks:
        assert rank["world_size"] == 2 and rank["steps"] == 3
        assert relative_difference(rank["parameters"], one["parameters"]) <= 1e-12
        assert rank["measured"] == pytest.approx(one["measured"], rel=1e-12)
        # Under micro_batch the (unused) reference losses are those of the first one.
        for name, value in one["balancer"].items() if KINDS[kind][1] == "window" else ():
            torch.testing.assert_close(rank["balancer"][name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])

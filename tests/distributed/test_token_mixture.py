"""A language model on two ranks, with accumulation, ends where one process with whole batches does: exact in tokens."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.conftest import Runs, launch
from tests.distributed.token_mixture import KINDS
from tests.models.language_training import data_of
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
        # Of several under micro_batch the (unused) reference losses are those of the first one.
        _, over, _, micro_batches = KINDS[kind]
        for name, value in one["balancer"].items() if over == "window" or micro_batches == 1 else ():
            torch.testing.assert_close(rank["balancer"][name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])


def test_the_ranks_batches_differ_in_tokens_and_in_tasks() -> None:
    """What the other test stands on."""
    rows = list(data_of(48))
    items = [[0, 0, 0] for _ in range(6)]  # one after the other, of rank 0, 1, 0, ...
    for number, row in enumerate(rows):
        items[number // 8][row["task_ids"]] += int((row["token_labels"] >= 0).sum())
    assert all(sum(mine) != sum(other) for mine, other in zip(items[::2], items[1::2], strict=True))
    assert any(mine[2] == 0 < other[2] for mine, other in zip(items[::2], items[1::2], strict=True))

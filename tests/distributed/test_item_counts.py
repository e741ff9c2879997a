"""Losses that come without counts, or with others than the label columns tell: two ranks train and evaluate as one."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.checks import assert_equals_one_process
from tests.distributed.conftest import Runs
from tests.distributed.item_counts import EVALUATED
from tests.distributed.training import STEPS_PER_EPOCH
from tests.synthetic import TASK_NAMES, build_data, build_model

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("name", ["uncounted/bilb/1", "uncounted/ls/2", "coded"])
def test_two_ranks_equal_one_process_that_is_told_the_counts(runs: Runs, name: str) -> None:
    assert_equals_one_process(runs, name)


def test_labels_that_one_rank_does_not_tell_are_counted_by_a_pass_on_both(runs: Runs) -> None:
    # Two micro-batches in each of the windows; one process, whose columns tell, looks at the first one.
    assert [rank["coded"]["looks"] for rank in runs.ranks] == [2 * STEPS_PER_EPOCH] * 2
    assert runs.one["coded"]["looks"] == 2


@pytest.mark.parametrize("rows", EVALUATED)
def test_evaluation_without_counts_is_exact(runs: Runs, rows: int) -> None:
    data = build_data(rows, dtype=torch.float64, missing=0.5)
    with torch.no_grad():
        means = (build_model(torch.float64)(data.features).logits - data.labels).square().nanmean(0).tolist()
    expected = {f"eval_loss_{task}": mean for task, mean in zip(TASK_NAMES, means, strict=True)}
    expected["eval_loss"] = sum(means) / len(means)
    for results in (runs.one, *runs.ranks):
        assert results[f"evaluated_uncounted/{rows}"]["metrics"] == pytest.approx(expected, rel=1e-12)

"""Data without a length on two ranks, however they are read: every row is evaluated once, a resumed run is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.distributed.conftest import Runs
from tests.distributed.streams import CASES, sizes
from tests.synthetic import TASK_NAMES, build_data, build_model

pytestmark = pytest.mark.distributed


def by_rows(values: Tensor) -> Tensor:
    """In an order of their own: worker processes give rows in turn."""
    return values[values[:, 0].argsort()]


@pytest.mark.parametrize(
    ("kind", "loading", "rows"),
    [(kind, loading, rows) for kind in CASES for loading in CASES[kind] for rows in sizes(loading)],
)
def test_every_row_counts_once(runs: Runs, kind: str, loading: str, rows: int) -> None:
    data = build_data(rows, dtype=torch.float64, missing=0.3)
    with torch.no_grad():
        logits = build_model(torch.float64)(data.features).logits
    means = (logits - data.labels).square().nanmean(0).tolist()
    expected = {f"eval_loss_{name}": mean for name, mean in zip(TASK_NAMES, means, strict=True) if mean == mean}
    expected["eval_loss"] = sum(expected.values()) / len(expected)
    name = f"streams/{kind}/{loading}/{rows}"
    for results in (runs.one, *runs.ranks):
        found = results[name]
        metrics = dict(found["metrics"])
        assert metrics.pop("eval_rows") == rows
        assert metrics.pop("eval_sum") == pytest.approx(float(logits.sum()), rel=1e-11)
        assert metrics == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(by_rows(found["predictions"]), by_rows(logits), rtol=1e-12, atol=1e-14)
    assert [results[name]["world_size"] for results in (runs.one, *runs.ranks)] == [1, 2, 2]


@pytest.mark.parametrize("case", ["True/1", "True/2", "False/1"])
def test_a_resumed_run_sees_the_rows_of_an_uninterrupted_one(runs: Runs, case: str) -> None:
    for results in (runs.one, *runs.ranks):
        found = results[f"stream_resumed/{case}"]
        whole, *resumed = found["runs"]
        assert len(resumed) == 2
        for run in resumed:
            assert torch.equal(run["parameters"], whole["parameters"])
            if found["rank"] == 0:  # where the logs before the checkpoint come from
                assert run["logs"] == whole["logs"]
        ranks = range(found["world_size"])
        assert found["files"] == [f"data_position_{rank}.json" for rank in ranks]


def test_a_stream_without_a_row_is_said_before_the_first_step(runs: Runs) -> None:
    for results in (runs.one, *runs.ranks):
        found = results["stream_empty"]["error"]
        assert found == "OptionError: train_dataset: gave no batch at all, expected at least one example"

"""Metrics and losses of a mixture on two ranks: those of one process, and of a count by other means."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.conftest import Runs
from tests.distributed.mixture_evaluation import ROWS
from tests.metrics.mixture import build_mixture, build_mixture_model, expected_metrics

pytestmark = pytest.mark.distributed
pytest.importorskip("sklearn", reason="the references are scikit-learn and scipy")


@pytest.mark.parametrize("scenario", ["mixture", "mixture_stream"])
@pytest.mark.parametrize("rows", ROWS)
def test_every_example_counts_once(runs: Runs, rows: int, scenario: str) -> None:
    expected = {
        f"eval_{key}": pytest.approx(value, rel=1e-10)
        for key, value in expected_metrics(build_mixture_model(), build_mixture(rows)).items()
    }
    for results in (runs.one, *runs.ranks):
        assert results[f"{scenario}/{rows}"]["metrics"] == expected
    for results in runs.ranks:
        assert results[f"{scenario}/{rows}"]["world_size"] == 2


def test_predictions_without_labels(runs: Runs) -> None:
    data = build_mixture(43)
    with torch.no_grad():
        expected = build_mixture_model()(data.features, data.task_ids).logits
    for results in (runs.one, *runs.ranks):
        found = results["mixture_predicted/43"]
        assert torch.equal(found["predictions"], expected) and found["metrics"] == set()

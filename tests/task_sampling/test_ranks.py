"""Two real processes (gloo) against one that takes the batches of both as one: what they see, and what they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.conftest import Runs
from tests.distributed.test_data_parallel import assert_same_balancer, assert_same_logs
from tests.synthetic import relative_difference
from tests.task_sampling.training import TASKS_OF_SETS, TaskData, expected_batches
from tests.task_sampling.worker import BALANCERS, BATCH, EPOCHS, LOADERS, SAMPLINGS, SETS

pytestmark = pytest.mark.distributed

ACCUMULATED = ["uniform-different", "temperature-same", "uniform-mixed"]
EXACT = [f"{balancer}/{name}" for balancer in BALANCERS for name in SAMPLINGS]
EXACT += [f"{balancer}/{name}/accumulated" for balancer in BALANCERS for name in ACCUMULATED]
EXACT += [f"sets/{name}" for name in SETS]
LOADED = [f"{loader}/{name}" for loader in LOADERS for name in ("proportional-different", "uniform-mixed")]


def tasks_of(batches: list[list[int]]) -> list[list[int]]:
    return TaskData().task_ids[torch.tensor(batches)].tolist()


def designed(name: str, rank: int) -> list[list[int]]:
    return expected_batches(TaskData(), SAMPLINGS[name], EPOCHS, BATCH, num_ranks=2, rank=rank)


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_learn_what_one_process_learns_from_both_batches(sampled: Runs, name: str) -> None:
    one, (first, second) = sampled.one[name], (results[name] for results in sampled.ranks)
    assert (one["world_size"], first["world_size"], second["world_size"]) == (1, 2, 2)
    assert one["steps"] == first["steps"] > 12
    assert one["seen"] == [a + b for a, b in zip(first["seen"], second["seen"], strict=True)]
    assert torch.equal(first["parameters"], second["parameters"])
    assert relative_difference(first["parameters"], one["parameters"]) <= 1e-12
    assert_same_balancer(first["balancer"], one["balancer"], 1e-11)
    assert_same_logs(first["logs"], one["logs"], 1e-11)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_rank_sees_every_second_batch(sampled: Runs, name: str) -> None:
    for rank, results in enumerate(sampled.ranks):
        assert results[f"ls/{name}"]["seen"] == designed(name, rank)


@pytest.mark.parametrize("name", LOADED)
def test_every_kind_of_loader_shows_the_same_batches(sampled: Runs, name: str) -> None:
    for rank, results in enumerate(sampled.ranks):
        assert results[name]["seen"] == designed(name.split("/")[1], rank)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulation_changes_nothing_in_the_order(sampled: Runs, name: str) -> None:
    for results in sampled.ranks:
        whole: dict[str, Any] = results[f"ls/{name}"]
        accumulated = results[f"ls/{name}/accumulated"]
        assert accumulated["seen"] == whole["seen"]
        assert accumulated["steps"] < whole["steps"] / 2


@pytest.mark.parametrize("name", [name for name in SAMPLINGS if not name.endswith("mixed")])
def test_the_tasks_of_the_two_ranks(sampled: Runs, name: str) -> None:
    first, second = (tasks_of(results[f"ls/{name}"]["seen"]) for results in sampled.ranks)
    for ours, theirs in zip(first, second, strict=True):
        assert len(set(ours)) == len(set(theirs)) == 1, "a batch holds one task"
    equal = sum(a[0] == b[0] for a, b in zip(first, second, strict=True))
    if name.endswith("same"):
        assert equal == len(first)
    elif not name.startswith("proportional"):
        # No task has more than half of the batches.
        assert equal == 0
    assert len({batch[0] for batch in first}) > 1


def test_mixed_batches_hold_several_tasks(sampled: Runs) -> None:
    batches = tasks_of(sampled.ranks[0]["ls/uniform-mixed"]["seen"])
    assert sum(len(set(batch)) > 1 for batch in batches) > 0.9 * len(batches)


@pytest.mark.parametrize("name", [*SETS, "default/workers", "default/dispatched"])
def test_a_data_set_for_each_task(sampled: Runs, name: str) -> None:
    sampling = SETS[name.split("/")[0]] or {}
    for rank, results in enumerate(sampled.ranks):
        expected = expected_batches(TASKS_OF_SETS, sampling, EPOCHS, BATCH, num_ranks=2, rank=rank)
        assert results[f"sets/{name}"]["seen"] == expected


@pytest.mark.parametrize("name", SETS)
def test_two_ranks_evaluate_each_set_as_one_process_does(sampled: Runs, name: str) -> None:
    # Each has 5 rows, or 3, which two ranks fill up with repetitions.
    one, (first, second) = sampled.one[f"sets/{name}"], (results[f"sets/{name}"] for results in sampled.ranks)
    keys = [key for key in one["evaluation"] if "loss" in key]
    assert len(keys) == 9
    for key in keys:
        assert first["evaluation"][key] == second["evaluation"][key] == pytest.approx(one["evaluation"][key], rel=1e-11)

"""Gradient methods on two ranks equal one process, and the usual way to get it wrong is seen."""

from __future__ import annotations

import pytest

from tests.distributed.checks import assert_equals_one_process
from tests.distributed.conftest import Runs
from tests.distributed.gradient_methods import HEADS, METHODS
from tests.synthetic import relative_difference

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("kind", "find_unused"), HEADS)
def test_heads_without_a_label_on_one_rank(runs: Runs, kind: str, find_unused: bool) -> None:
    assert_equals_one_process(runs, f"gradient/heads/{kind}/{find_unused}")


def test_a_look_by_one_rank_alone(runs: Runs) -> None:
    assert_equals_one_process(runs, "gradient/looked_at")


@pytest.mark.parametrize("name", METHODS)
def test_aggregating_on_each_rank_and_averaging_is_something_else(runs: Runs, name: str) -> None:
    assert_equals_one_process(runs, f"gradient/whole/{name}")
    expected = runs.one[f"gradient/whole/{name}"]["parameters"]
    found = runs.ranks[0][f"gradient/by_rank/{name}"]
    assert found["world_size"] == 2
    assert relative_difference(found["parameters"], expected) > 1e-3

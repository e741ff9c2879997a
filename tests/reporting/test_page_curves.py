"""The curves of a page: what the log holds, and nothing of it lost that a reader has to see."""

from __future__ import annotations

import json
import math
import random

import pytest

from hf_bilb.errors import OptionError
from hf_bilb.reporting.page_curves import ALL_POINTS, FEWEST_POINTS, MOST_POINTS, points_per_curve, read_curves, thinned
from tests.reporting.made_up_pages import history, write_history, write_vectors


def test_curves_are_what_was_logged(tmp_path):
    write_history(tmp_path, history(["a", "b"], [10, 20], loss=lambda k, step: k + step / 8))
    assert read_curves(tmp_path, ["a", "b"]) == {
        "loss": [([10, 20], [1.25, 2.5]), ([10, 20], [2.25, 3.5])],
        "eval_loss": [([20], [0.9048]), ([20], [1.81])],
        "weight": [([10, 20], [1.0, 1.0]), ([10, 20], [0.5, 0.5])],
        "coefficient": [([10, 20], [1.0, 1.0]), ([10, 20], [1.0, 1.0])],
    }


def test_what_was_not_logged_is_left_out_and_what_is_no_number_stays(tmp_path):
    entries = [
        {"step": 1, "loss/a": 1.0, "loss/b": None},
        {"step": 2, "loss/a": math.nan},
        {"step": 3, "loss/a": math.inf, "loss/b": 3.0},
    ]
    write_history(tmp_path, entries)
    assert read_curves(tmp_path, ["a", "b", "c"]) == {"loss": [([1, 2, 3], [1.0, None, None]), ([3], [3.0]), ([], [])]}


def test_many_tasks_are_read_from_the_vectors_and_few_are_not(tmp_path):
    tasks = [f"t{k}" for k in range(33)]
    entries = history(tasks, [10, 20], loss=lambda k, step: k + step)
    write_history(tmp_path, [{key: v for key, v in e.items() if "/" not in key} for e in entries])
    assert read_curves(tmp_path, tasks).keys() == {"eval_loss"}
    write_vectors(tmp_path, entries, tasks)
    found = read_curves(tmp_path, tasks)
    assert found["loss"][32] == ([10, 20], [42.0, 52.0]) and found["eval_loss"][0][0] == [20]
    assert read_curves(tmp_path, tasks[:2]).keys() == {"eval_loss"}


def test_a_folder_without_a_log_has_no_curves(tmp_path):
    assert read_curves(tmp_path, ["a"]) == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"log_history": [1]}', '{"log_history": null}', "[" * 100_000])
def test_a_log_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(OptionError, match=r"trainer_state\.json: cannot be read: [^\n]+$"):
        read_curves(tmp_path, ["a"])


def test_vectors_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "task_vectors.jsonl").write_text(json.dumps({"step": 1, "loss": [1.0] * 40}) + '\n{"step": 2, "lo')
    with pytest.raises(OptionError, match=r"task_vectors\.jsonl: cannot be read"):
        read_curves(tmp_path, [f"t{k}" for k in range(40)])


@pytest.mark.parametrize("length", [299, 300, 301, 302, 1000, 12_345])
def test_thinning_keeps_ends_and_peaks_in_order(length):
    draw = random.Random(length)
    values = [draw.gauss(0, 1) for _ in range(length)]
    high, low = length // 3, length // 2
    values[high], values[low] = 50.0, -50.0
    steps = [7 * i for i in range(length)]
    kept, thin = thinned((steps, values), MOST_POINTS)
    assert len(kept) == len(thin) <= MOST_POINTS and len(kept) >= min(length, MOST_POINTS * 0.9)
    assert kept == sorted(set(kept)) and all(values[step // 7] == value for step, value in zip(kept, thin, strict=True))
    assert {0, 7 * high, 7 * low, 7 * (length - 1)} <= set(kept)
    if length <= MOST_POINTS:
        assert thin == values


def test_thinning_keeps_a_single_value_that_is_no_number():
    values = [1.0] * 5000
    for place in (1234, 3333):
        values[place] = None
    kept, thin = thinned((list(range(5000)), values), 60)
    assert [step for step, value in zip(kept, thin, strict=True) if value is None] == [1234, 3333]


def test_a_page_with_very_many_curves_has_fewer_points_of_each():
    assert points_per_curve(4) == MOST_POINTS
    curves = 60 * 40 * 4
    assert points_per_curve(curves) > FEWEST_POINTS and points_per_curve(curves) * curves <= ALL_POINTS
    assert points_per_curve(10**6) == FEWEST_POINTS

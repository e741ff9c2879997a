"""`results.json`: written whole, read back equal, refused in one line."""

from __future__ import annotations

import json
import math

import pytest

from hf_bilb.errors import OptionError
from hf_bilb.reporting.results import MetricResult, RunResults, finite, read_results, write_results
from hf_bilb.storage.writing import write_text

RESULTS = RunResults(
    recipe="mlp_ls",
    model="mlp",
    data="made_up",
    balancer="ls",
    split="test",
    metrics=[MetricResult("mae_homo", "homo", "MAE", "meV", False, 1 / 3, None)],
    losses={"test": {"mean": 0.25, "homo": None}},
    training={"steps": 10, "measured_checkpoint": None},
    settings={"balancer": {"name": "ls"}},
    versions={"python": "3.11.7"},
)


def test_round_trip_is_exact(tmp_path):
    write_results(RESULTS, tmp_path)
    assert read_results(tmp_path) == RESULTS
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_files_from_before_scores_had_an_ideal_are_still_read(tmp_path):
    values = json.loads(write_results(RESULTS, tmp_path).read_text())
    del values["trivial_predictor"], values["metrics"][0]["ideal"]
    (tmp_path / "results.json").write_text(json.dumps(values))
    assert read_results(tmp_path) == RESULTS


def test_only_finite_numbers_are_written(tmp_path):
    assert (finite(math.nan), finite(math.inf), finite(None), finite(2)) == (None, None, None, 2.0)
    broken = RunResults("r", "m", "d", "ls", "test", metrics=[], training={"mean_loss": math.nan})
    with pytest.raises(ValueError):
        write_results(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results.json, so it is no run, or one that has not finished"),
        ('{"recipe": "mlp', "results.json: cannot be read: "),
        ("[]", "is not a results file of format 1"),
        ('{"format": 99}', "is not a results file of format 1"),
        ('{"format": 1, "recipe": "r"}', "results.json.model: is required"),
    ],
)
def test_what_is_no_results_file_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(OptionError) as caught:
        read_results(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_is_strict_json(tmp_path):
    values = json.loads(write_results(RESULTS, tmp_path).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["metrics"][0]["value"] == 1 / 3

"""The heat-maps of `gradients.jsonl`, looked at as data, and as files of a sane size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_bilb.reporting.gradient_plots import Cosines, conflicts_figure, plot_gradients, read_cosines
from hf_bilb.reporting.plots import plot_run

TASKS = ("homo", "lumo", "gap")
#: Of three looks; `gap` is absent from the second.
LOOKS = (
    [[1.0, 0.2, -0.4], [0.2, 1.0, 0.1], [-0.4, 0.1, 1.0]],
    [[1.0, 0.6, None], [0.6, 1.0, None], [None, None, None]],
    [[1.0, -0.2, -0.6], [-0.2, 1.0, 0.004], [-0.6, 0.004, 1.0]],
)


def write(folder: Path, looks=LOOKS, tasks=TASKS) -> Path:
    lines = [
        json.dumps({"step": 1 + 50 * i, "epoch": 0.5, "tasks": list(tasks), "norms": [1.0] * len(tasks), "cosines": c})
        for i, c in enumerate(looks)
    ]
    (folder / "gradients.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder / "gradients.jsonl"


def random_cosines(tasks: int) -> Cosines:
    rows = np.random.default_rng(0).normal(size=(2, tasks, 30))
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    return Cosines(tuple(f"task_{k}" for k in range(tasks)), np.array([1, 101]), rows @ rows.swapaxes(1, 2))


def panels(figure):
    """The two heat-maps, without the bar."""
    left, right, _ = figure.axes
    return left, right


def test_the_mean_is_over_looks_with_both_tasks(tmp_path):
    found = read_cosines(write(tmp_path))
    assert found.tasks == TASKS and found.steps.tolist() == [1, 51, 101]
    expected = [[1, 0.2, -0.5], [0.2, 1, 0.052], [-0.5, 0.052, 1]]
    np.testing.assert_allclose(found.mean, expected, rtol=1e-12)


def test_a_line_cut_short_and_looks_at_other_tasks_do_not_count(tmp_path):
    path = write(tmp_path)
    whole = path.read_text(encoding="utf-8")
    other = json.dumps({"step": 1, "epoch": 0.1, "tasks": ["a"], "norms": [1.0], "cosines": [[1.0]]})
    path.write_text(f'{other}\n{whole}{{"step": 151, "cos', encoding="utf-8")
    assert read_cosines(path).steps.tolist() == [1, 51, 101]


def test_two_panels_on_one_scale_centred_at_zero(tmp_path):
    figure = conflicts_figure(read_cosines(write(tmp_path)), "run")
    left, right = panels(figure)
    assert left.get_title() == "mean of 3 looks" and right.get_title() == "step 101, the last look"
    for axis, values in ((left, [0.2, -0.5, 0.052]), (right, [-0.2, -0.6, 0.004])):
        image = axis.images[0]
        assert image.get_clim() == pytest.approx((-0.6, 0.6)), "the largest of both"
        drawn = image.get_array()
        assert [drawn[0, 1], drawn[0, 2], drawn[1, 2]] == pytest.approx(values)
        assert np.ma.getmaskarray(drawn).diagonal().all(), "no scale for what is always 1"
        assert [label.get_text() for label in axis.get_xticklabels()] == list(TASKS)
    assert [text.get_text() for text in right.texts] == ["−0.20", "−0.60", "−0.20", "0.00", "−0.60", "0.00"]
    red, _, blue = (image.cmap(image.norm(x))[0] - image.cmap(image.norm(x))[2] for x in (-0.5, 0.0, 0.5))
    assert red > 0.3 and blue < -0.3


def test_a_pair_without_a_cosine_has_no_number(tmp_path):
    left, right = panels(conflicts_figure(read_cosines(write(tmp_path, LOOKS[:2])), "run"))
    assert len(left.texts) == 6 and len(right.texts) == 2
    assert np.ma.getmaskarray(right.images[0].get_array())[0, 2]


def test_small_cosines_are_not_drawn_in_full_colours():
    values = np.array([[[1, 0.01], [0.01, 1]]])
    figure = conflicts_figure(Cosines(("a", "b"), np.array([1]), values), "run")
    assert panels(figure)[0].images[0].get_clim() == (-0.1, 0.1)


@pytest.mark.parametrize("tasks", [2, 3, 12, 13, 40, 120])
def test_files(tasks, tmp_path):
    cosines = random_cosines(tasks)
    write(tmp_path, cosines.values.tolist(), cosines.tasks)
    path = plot_gradients(tmp_path, "run")
    assert path == tmp_path / "gradient_conflicts.png" and path.stat().st_size > 8000
    with Image.open(path) as image:
        assert 600 <= image.width <= 4000 and 400 <= image.height <= 2500
    left, right = panels(conflicts_figure(cosines, "run"))
    assert len(left.texts) == (tasks * (tasks - 1) if tasks <= 12 else 0)
    assert len(left.get_xticklabels()) == (tasks if tasks <= 68 else tasks // 2)
    assert [label.get_text() for label in right.get_yticklabels()] == [""] * len(left.get_xticklabels())


def test_plot_run_draws_it_where_there_were_looks(tmp_path):
    assert plot_run([], TASKS, tmp_path, "run") == []
    write(tmp_path, [])
    assert plot_run([], TASKS, tmp_path, "run") == []
    write(tmp_path, [[[1.0]]], ["only"])
    assert plot_run([], ("only",), tmp_path, "run") == []
    write(tmp_path)
    assert plot_run([], TASKS, tmp_path, "run") == [tmp_path / "gradient_conflicts.png"]

"""The plots show what the log says; they are looked at as data, and as files of a sane size."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from hf_bilb.reporting.comparison_plots import runs_figure
from hf_bilb.reporting.files import save_figure
from hf_bilb.reporting.plots import (
    Series,
    levels_figure,
    losses_figure,
    plot_run,
    series_from_history,
    series_from_vectors,
    spread,
    weights_figure,
)
from hf_bilb.reporting.results import MetricResult, RunResults
from hf_bilb.reporting.side_by_side import compare_runs

TASKS = ("homo", "lumo", "gap")


def history(tasks=TASKS, steps=(50, 100, 150), weights=True):
    entries = []
    for step in steps:
        entry = {"step": step, "loss": 1.0}
        for k, task in enumerate(tasks):
            entry[f"loss/{task}"] = (k + 1) * 100 / step
            entry[f"coefficient/{task}"] = 0.1 * (k + 1)
            if weights:
                entry[f"weight/{task}"] = 0.2 * (k + 1)
        entries += [entry, {"step": step, "eval_loss": 2.0, **{f"eval_loss_{task}": 3.0 for task in tasks}}]
    return [*entries, {"step": steps[-1], "train_runtime": 3.0}]


def visible(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


def check_png(path, smallest=8_000):
    assert path.stat().st_size > smallest
    with Image.open(path) as image:
        width, height = image.size
        assert 500 <= width <= 4000
        assert 300 <= height <= 4000
        assert len(image.convert("RGB").getcolors(maxcolors=1_000_000)) > 20


def test_series_come_from_the_log_with_gaps_where_a_task_was_absent():
    log = history()
    del log[2]["loss/lumo"]
    series = series_from_history(log, "loss/", TASKS)
    assert series.steps.tolist() == [50, 100, 150]
    np.testing.assert_allclose(series.values[:, 0], [2, 1, 100 / 150])
    assert np.isnan(series.values[1, 1])
    assert not series_from_history(log, "discrepancy/", TASKS)


def test_losses_have_a_labelled_logarithmic_panel_per_task():
    log = history()
    figure = losses_figure(
        series_from_history(log, "loss/", TASKS), series_from_history(log, "eval_loss_", TASKS), "run"
    )
    panels = visible(figure)
    assert [axis.get_title() for axis in panels] == list(TASKS)
    assert panels[0].get_ylabel() == "loss"
    assert all(axis.get_xlabel() == "step" for axis in panels)
    assert all(axis.get_yscale() == "log" for axis in panels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "validation"]
    training, validation = panels[1].lines
    np.testing.assert_allclose(training.get_ydata(), [4, 2, 200 / 150])
    np.testing.assert_allclose(validation.get_ydata(), [3, 3, 3])


@pytest.mark.filterwarnings("error")
def test_a_log_of_one_entry_is_drawn():
    log = history(steps=(10,))
    figure = weights_figure(
        series_from_history(log, "weight/", TASKS), series_from_history(log, "coefficient/", TASKS), "run"
    )
    assert all(axis.get_xlim() == (10, 11) for axis in visible(figure))


def test_losses_that_are_not_positive_are_not_drawn_on_a_logarithmic_scale():
    log = [{"step": s, **{f"loss/{t}": 1.0 - s for t in TASKS}} for s in (1, 2)]
    figure = losses_figure(series_from_history(log, "loss/", TASKS), series_from_history(log, "eval_", TASKS), "run")
    assert visible(figure)[0].get_yscale() == "linear"


def test_weights_and_coefficients_stand_side_by_side_with_a_named_line_per_task():
    log = history()
    figure = weights_figure(
        series_from_history(log, "weight/", TASKS), series_from_history(log, "coefficient/", TASKS), "run"
    )
    left, right = visible(figure)
    assert left.get_ylabel() == "weight"
    assert right.get_ylabel() == "coefficient (what a loss is multiplied with)"
    for axis in (left, right):
        assert axis.get_xlabel() == "step"
        assert [line.get_label() for line in axis.lines] == list(TASKS)
        assert [text.get_text() for text in axis.texts] == list(TASKS)
    np.testing.assert_allclose(left.lines[2].get_ydata(), 0.6)


def test_tasks_that_are_treated_alike_share_one_name():
    series = Series(TASKS, np.array([1.0, 2.0]), np.ones((2, 3)))
    figure = weights_figure(Series(TASKS, np.array([]), np.empty((0, 3))), series, "run")
    (axis,) = visible(figure)
    assert [text.get_text() for text in axis.texts] == ["all 3 tasks"]


def test_a_method_without_weights_has_the_coefficients_alone():
    log = history(weights=False)
    figure = weights_figure(
        series_from_history(log, "weight/", TASKS), series_from_history(log, "coefficient/", TASKS), "run"
    )
    assert [axis.get_ylabel() for axis in visible(figure)] == ["coefficient (what a loss is multiplied with)"]


def test_lines_of_neighbouring_tasks_differ_in_colour_or_dashes():
    tasks = tuple(f"t{k}" for k in range(28))
    series = Series(tasks, np.array([1.0, 2.0]), np.arange(56.0).reshape(2, 28) + 1)
    axis = visible(weights_figure(series, Series(tasks, np.array([]), np.empty((0, 28))), "run"))[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 28


def test_spread_keeps_the_order_and_the_distance():
    placed = spread({0: 0.5, 1: 0.5, 2: 0.51, 3: 0.9}, gap=0.1)
    assert placed[3] == 0.9
    heights = [placed[k] for k in (0, 1, 2)]
    np.testing.assert_allclose(np.diff(heights), 0.1)
    assert np.mean(heights) == pytest.approx((0.5 + 0.5 + 0.51) / 3)
    assert spread({}, gap=0.1) == {}


def test_plot_run_writes_both_files(tmp_path):
    written = plot_run(history(), TASKS, tmp_path, "run")
    assert [path.name for path in written] == ["losses.png", "weights.png"]
    for path in written:
        check_png(path)


def test_a_log_without_task_losses_gives_no_plot(tmp_path):
    assert plot_run([{"step": 1, "loss": 1.0}], ("only",), tmp_path, "run") == []
    assert list(tmp_path.iterdir()) == []


def test_above_32_tasks_the_vectors_file_is_drawn_as_a_distribution(tmp_path):
    tasks = [f"task_{k}" for k in range(40)]
    lines = [
        {"step": s, "epoch": 1, "loss": [*([k + s for k in range(39)]), None], "coefficient": [1.0] * 40}
        for s in (1, 2, 3)
    ]
    (tmp_path / "task_vectors.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    series = series_from_vectors(tmp_path / "task_vectors.jsonl", "loss", tasks)
    assert series.values.shape == (3, 40)
    assert np.isnan(series.values[0, 39])
    assert not series_from_vectors(tmp_path / "task_vectors.jsonl", "weight", tasks)
    figure = losses_figure(series, series_from_history([], "eval_loss_", tasks), "run")
    (axis,) = visible(figure)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[:3] == ["lowest to highest task", "10 % to 90 % of the tasks", "median task"]
    assert labels[3:] == ["task_38", "task_37", "task_36"]
    assert axis.get_xlabel() == "step"
    for path in plot_run([], tasks, tmp_path, "run"):
        check_png(path)


def results(*metrics, trivial="mean predictor"):
    return RunResults("recipe", "model", "data", "ls", "test", list(metrics), trivial_predictor=trivial)


def test_comparison_shows_errors_relative_to_the_trivial_predictor(tmp_path):
    runs = [
        results(
            MetricResult("mae_homo", "homo", "MAE", "meV", False, error, 200.0),
            MetricResult("auc_toxic", "toxic", "AUC", "", True, score, 0.4),
        )
        for error, score in ((100.0, 0.8), (50.0, None))
    ]
    figure = runs_figure(compare_runs(runs, ["ls", "bilb"]))
    (axis,) = visible(figure)
    assert axis.get_xlabel() == "test error relative to the mean predictor (left is better)"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["homo MAE", "toxic AUC"]
    assert axis.get_xscale() == "log"
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [0.5, 0.5])
    np.testing.assert_allclose(axis.lines[1].get_xdata(), [0.25, np.nan])
    check_png(save_figure(figure, tmp_path / "comparison.png"))


def test_scores_are_drawn_as_errors_and_a_score_of_zero_is_no_gap(tmp_path):
    runs = [
        results(
            MetricResult("cola_matthews", "cola", "Matthews", "", True, matthews, 0.0, ideal=1.0),
            MetricResult("glue_score", "", "mean score", "", True, mean, 0.6, ideal=1.0),
            MetricResult("perfect_accuracy", "perfect", "accuracy", "", True, mean, 1.0, ideal=1.0),
            trivial="constant predictor",
        )
        for matthews, mean in ((0.5, 0.9), (-0.2, 0.8))
    ]
    figure = runs_figure(compare_runs(runs, ["ls", "bilb"]))
    (axis,) = visible(figure)
    assert axis.get_xlabel() == "test error relative to the constant predictor (left is better)"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cola Matthews", "all tasks mean score"]
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [0.5, 0.25])
    np.testing.assert_allclose(axis.lines[1].get_xdata(), [1.2, 0.5])
    assert "constant predictor" in [text.get_text() for text in figure.legends[0].get_texts()]
    check_png(save_figure(figure, tmp_path / "comparison.png"))


def test_the_figure_of_both_levels_shows_what_was_logged() -> None:
    keys = ("lower_gradient_at_x", "lower_gradient_at_z", "upper_gradient", "gradient_ratio")
    history = [{"step": 1, "loss": 2.0}]  # steps without a look are left out
    for step in (10, 20, 30):
        looked = {f"bilevel/{key}": step / 100 * (i + 1) for i, key in enumerate(keys)}
        history.append({"step": step, **looked, "router/entropy": 0.9, "router/clamped": 0.25})
    figure = levels_figure(history, "a run")
    assert figure is not None
    gradients, others = figure.axes
    curves = {line.get_label(): list(line.get_ydata()) for axis in figure.axes for line in axis.get_lines()}
    assert len(curves) == 6 and all(list(line.get_xdata()) == [10, 20, 30] for line in gradients.get_lines())
    assert curves["lower level at x"] == [0.1, 0.2, 0.3] and curves["share of clamped weights"] == [0.25] * 3
    assert gradients.get_yscale() == "log" and others.get_ylim()[0] == 0
    history[1]["bilevel/upper_gradient"] = 0.0  # a logarithm would hide it
    assert levels_figure(history, "a run").axes[0].get_yscale() == "linear"
    assert levels_figure(history[:1], "a run") is None

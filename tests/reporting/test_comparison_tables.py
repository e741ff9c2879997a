"""What a comparison's tables, notes and plots say."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest

from hf_bilb.reporting.comparison import compare_methods
from hf_bilb.reporting.comparison_notes import comparison_notes
from hf_bilb.reporting.comparison_plots import progress_figure, tasks_figure
from hf_bilb.reporting.comparison_tables import (
    comparison_csv,
    comparison_json,
    comparison_latex,
    comparison_markdown,
    comparison_text,
    percent,
    with_deviation,
)
from hf_bilb.reporting.files import save_figure
from hf_bilb.reporting.grid import latex
from hf_bilb.reporting.results import MetricResult
from hf_bilb.reporting.statistics import Figure
from tests.reporting.made_up_comparison import TASKS, cell, runs


@pytest.fixture
def comparison():
    made = compare_methods(runs(), {}, "ls")
    return dataclasses.replace(made, notes=("a note with 50 % and a_b",))


def cells(markdown: str, name: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_numbers_with_their_deviation():
    assert with_deviation(Figure({0: 60.0, 1: 61.0})) == "60.50 ± 0.71"
    assert with_deviation(Figure({0: 177.66})) == "177.7"
    assert with_deviation(Figure({0: 1.0, 1: None})) == "-"
    assert with_deviation(None) == "-"
    assert with_deviation(Figure({0: 1e-9, 1: 2e-9})) == "1.500e-09 ± 7.1e-10"
    assert percent(Figure({0: -4.0, 1: -4.2})) == "-4.10 ± 0.14"


def test_markdown_has_methods_down_and_metrics_across_as_the_papers(comparison):
    text = comparison_markdown(comparison)
    assert cells(text, "method") == ["method", "homo (meV) ↓", "U0 (meV) ↓", "U (meV) ↓", "MR ↓", "Δm % ↓"]
    assert cells(text, "single task") == ["single task", "50.00", "20.00", "10.00", "", ""]
    assert cells(text, "ls")[1:4] == ["100.0 ± 10.0", "40.00 ± 2.00", "30.00 ± 2.00"]
    assert cells(text, "half")[1:5] == ["**50.00 ± 5.00**", "**20.00 ± 1.00**", "**15.00 ± 1.00**", "**1.00**"]
    assert text.endswith("* a note with 50 % and a_b\n")


def test_a_difference_within_the_spread_of_the_seeds_is_printed_as_such(comparison):
    second = comparison_markdown(comparison).partition("In relation to ls")[2]
    columns = cells(second, "method")
    against = columns.index("against ls")
    assert cells(second, "near")[against] == "within the seeds' spread"
    assert cells(second, "half")[against] == "better"
    assert cells(second, "ls")[against] == ""
    assert cells(second, "half")[columns.index("worst task / ls's")] == "0.5000 (homo)"
    assert cells(second, "near")[columns.index("step time")] == "1.50"
    assert cells(second, "near")[columns.index("memory")] == "1.50"
    # and beside the best value of a metric: without half, nothing tells ls from near
    pair = compare_methods({name: of for name, of in runs().items() if name != "half"}, {}, "ls")
    text = comparison_markdown(pair)
    assert cells(text, "ls")[1] == "**100.0 ± 10.0**" and cells(text, "near")[1] == "**100.0 ± 8.5**"  # a tie
    assert cells(text, "ls")[2] == "40.00 ± 2.00\\~" and cells(text, "near")[2] == "**39.67 ± 3.06**"


def test_with_one_seed_nothing_can_be_told():
    one = compare_methods({name: {0: of[0]} for name, of in runs().items()}, {}, "ls")
    second = comparison_markdown(one).partition("In relation to ls")[2]
    assert "one seed: cannot be told" in cells(second, "half") and "±" not in second
    notes = comparison_notes(one, {"ls": runs()["ls"]}, (0,), False)
    assert "one seed: whether a difference is more than the spread of seeds cannot be told" in notes


def test_many_metrics_go_down():
    tasks = [f"t{i}" for i in range(40)]
    many = {name: {0: cell(name, np.arange(1.0, 41) * f, {}, tasks)} for name, f in (("ls", 2.0), ("bilb", 1.0))}
    text = comparison_markdown(compare_methods(many, {}, "ls"))
    assert cells(text, "metric") == ["metric", "ls", "bilb"]
    assert cells(text, "t39 (meV) ↓") == ["t39 (meV) ↓", "80.00", "**40.00**"]
    assert cells(text, "MR ↓") == ["MR ↓", "2.00", "**1.00**"]


def test_text_is_aligned(comparison):
    lines = comparison_text(comparison).splitlines()
    ends = {len(line) for line in lines[2:8] if re.search(r"[0-9~*]$", line)}
    assert len(ends) <= 2, "numbers end in one column, with or without a mark"
    assert lines[2].split() == ["metric", "single", "task", "ls", "near", "half"]


def test_csv_reads_back_to_the_figures(comparison):
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    found = {(row["method"], row["task"], row["metric"]): row for row in rows}
    assert float(found["half", "U0", "MAE"]["mean"]) == comparison.lines[1].figures[2].mean
    assert float(found["half", "U0", "MAE"]["deviation"]) == comparison.lines[1].figures[2].deviation
    assert found["half", "U0", "MAE"]["mark"] == "best"
    assert float(found["single task", "U0", "MAE"]["mean"]) == 20.0
    assert float(found["near", "", "Delta_m"]["mean"]) == comparison.methods[1].delta_m.mean
    assert found["near", "", "worst error / ls"]["mark"] == "homo"
    assert [row["mark"] for key, row in found.items() if key[0] == "near" and " - ls's" in key[2]] == [
        "within the seeds' spread"
    ]


def test_json_holds_every_seed(comparison):
    values = json.loads(comparison_json(comparison))
    half = next(method for method in values["methods"] if method["name"] == "half")
    assert half["told_from_reference"] == "better"
    assert half["delta_m"]["values"].keys() == {"0", "1", "2"}
    assert half["worst"] == {"error_ratio": 0.5, "task": "homo"}
    assert values["metrics"][0]["methods"]["ls"]["values"] == {"0": 100.0, "1": 110.0, "2": 90.0}
    assert values["metrics"][0]["base"] == 50.0 and values["base_of_delta_m"] == "the paper"


def test_latex_is_well_formed(comparison):
    text = comparison_latex(comparison)
    assert latex("a_b & 5 % {x} ± ↓ Δm \\ ~") == (
        r"a\_b \& 5 \% \{x\} $\pm$ $\downarrow$ $\Delta_m$ \textbackslash{} $\sim$"
    )
    for table in text.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(l?r*)\}", table)[1])
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}
    for rule in ("toprule", "midrule", "bottomrule", "end{tabular}", "end{table}"):
        assert text.count(f"\\{rule}") == 2
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.isascii() and not re.search(r"(?<!\\)[%#~]", body)
    assert r"\textbf{50.00 $\pm$ 5.00}" in body
    assert text.count("% a note with 50 % and a_b") == 1


def test_notes_say_what_the_figures_rest_on():
    cells_of = runs()
    del cells_of["half"][2]
    comparison = compare_methods(cells_of, {}, "ls")
    notes = "\n".join(comparison_notes(comparison, cells_of, (0, 1, 2), False))
    assert "not finished, so not in here: half seed 2" in notes
    assert "each run trained 20 epochs (400 steps)" in notes
    assert "the best loss on the validation part; the test part was measured once" in notes
    assert "seeds 0, 1, 2 of initial weights" in notes and "the split stays the same (data.seed=3)" in notes
    assert "Δm relates to the paper" in notes and "(U0, U)" in notes
    assert "better or worse against ls is told by Δm" in notes
    assert "and of the split (data.seed)" in "\n".join(comparison_notes(comparison, cells_of, (0, 1, 2), True))


def test_notes_on_selection_and_on_a_missing_base():
    def with_settings(split: str, **trainer):
        run = dataclasses.replace(cell("ls", [1.0, 2.0, 3.0], {}), split=split, settings={"trainer": trainer})
        of = {"ls": {0: run}}
        return "\n".join(comparison_notes(compare_methods(of, {}, "ls"), of, (0,), False))

    assert "no checkpoint was selected: the model after the last update" in with_settings("test")
    assert "the figures are too good" in with_settings("validation", load_best_model_at_end=True)
    assert "no Delta_m: there are no single-task values" in with_settings("test")


# ---------------------------------------------------------------------------------------------------- plots


def drawn(figure, tmp_path) -> int:
    return save_figure(figure, tmp_path / "figure.png").stat().st_size


def test_tasks_figure_relates_to_the_reference(comparison, tmp_path):
    figure = tasks_figure(comparison)
    axis = figure.axes[0]
    lines = {container.get_label(): container.lines[0] for container in axis.containers}
    assert list(lines) == ["ls", "near", "half"]
    assert lines["half"].get_xdata() == pytest.approx([0.5, 0.5, 0.5])
    assert [label.get_text() for label in axis.get_yticklabels()] == list(TASKS)
    assert "ls's mean" in axis.get_xlabel() and "deviation over seeds" in axis.get_xlabel()
    assert drawn(figure, tmp_path) > 8_000


def test_tasks_figure_relates_to_the_studys_single_task_models(tmp_path):
    own = {task: {0: cell("ls", [25.0], tasks=[task])} for task in TASKS}
    figure = tasks_figure(compare_methods(runs(), own, "ls"))
    half = figure.axes[0].containers[2].lines[0]
    assert half.get_xdata() == pytest.approx([50 / 25, 20 / 25, 15 / 25])
    assert "models of one task each" in figure.axes[0].get_xlabel()


def test_tasks_figure_without_anything_to_relate_to():
    assert tasks_figure(compare_methods({"bilb": runs({})["half"]}, {}, "ls")) is None


def entry(seconds: float, loss: float, **errors: float) -> dict[str, float]:
    return {"eval_loss": loss, "training_seconds": seconds, **{f"eval_mae_{t}": v for t, v in errors.items()}}


def test_progress_is_delta_m_over_training_seconds(comparison, tmp_path):
    histories = {
        "ls": [
            [
                {"loss": 3.0},
                entry(10.0, 1.0, homo=100.0, U0=40.0, U=20.0),
                entry(20.0, 0.9, homo=50.0, U0=20.0, U=10.0),
            ],
            [entry(12.0, 1.0, homo=150.0, U0=60.0, U=30.0), entry(22.0, 0.9, homo=50.0, U0=20.0, U=10.0)],
        ],
        "near": [],
    }
    figure = progress_figure(comparison, histories)
    (line,) = figure.axes[0].lines
    assert line.get_xdata() == pytest.approx([11.0, 21.0])
    assert line.get_ydata() == pytest.approx([150.0, 0.0])
    assert "Delta_m" in figure.axes[0].get_ylabel()
    assert drawn(figure, tmp_path) > 8_000


def test_progress_without_a_base_is_the_validation_loss():
    comparison = compare_methods(runs(base={}), {}, "ls")
    figure = progress_figure(comparison, {"ls": [[entry(600.0, 1.0), entry(1200.0, 0.5)]]})
    (line,) = figure.axes[0].lines
    assert line.get_xdata() == pytest.approx([10.0, 20.0]) and "(min)" in figure.axes[0].get_xlabel()
    assert line.get_ydata() == pytest.approx([1.0, 0.5])
    assert "loss" in figure.axes[0].get_ylabel()
    assert progress_figure(comparison, {"ls": [[{"loss": 1.0}]]}) is None


def test_a_wide_range_gets_a_scale_that_shows_its_end(comparison):
    falling = [entry(float(i), 1.0, homo=50.0 * 10**e, U0=20.0, U=10.0) for i, e in enumerate((3, 2, 0.5), 1)]
    assert progress_figure(comparison, {"ls": [falling]}).axes[0].get_yscale() == "log"
    falling.append(entry(4.0, 1.0, homo=40.0, U0=20.0, U=10.0))
    assert progress_figure(comparison, {"ls": [falling]}).axes[0].get_yscale() == "symlog"


def test_a_score_of_the_whole_set_stands_in_the_table():
    cells_of = runs()
    for of_method in cells_of.values():
        for run in of_method.values():
            run.metrics.append(MetricResult("score", "", "mean score", "", True, 0.5, None))
    assert "all tasks mean score ↑" in comparison_markdown(compare_methods(cells_of, {}, "ls"))

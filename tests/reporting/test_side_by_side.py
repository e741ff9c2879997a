"""The table against figures worked out by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import math

import pytest

from hf_bilb.errors import OptionError
from hf_bilb.reporting.comparison_plots import runs_figure
from hf_bilb.reporting.grid import number
from hf_bilb.reporting.results import MetricResult, RunResults, is_better, labels
from hf_bilb.reporting.side_by_side import compare_runs, runs_csv, runs_markdown, runs_text
from hf_bilb.reporting.statistics import error_ratio, geometric_mean

METRICS = [("mae_homo", "homo", "MAE", "meV", False), ("auc_toxic", "toxic", "AUC", "", True)]


def run(
    balancer: str, values: list[float | None], trivial: tuple[float | None, ...] = (200.0, 0.5), **changes
) -> RunResults:
    metrics = [MetricResult(*m, value=v, trivial=t) for m, v, t in zip(METRICS, values, trivial, strict=True)]
    fields = {"recipe": f"mlp_{balancer}", "model": "mlp", "data": "made_up", "split": "test"}
    return RunResults(balancer=balancer, metrics=metrics, **{**fields, **changes})


LS = run("ls", [100.0, 0.8])
BILB = run("bilb", [50.0, 0.4])


def test_ratio_below_one_is_better_whichever_way_the_metric_points():
    assert error_ratio(50.0, 100.0, higher_is_better=False) == 0.5
    assert error_ratio(0.8, 0.4, higher_is_better=True) == 0.5


@pytest.mark.parametrize(("value", "base"), [(None, 1.0), (1.0, None), (0.0, 1.0), (1.0, 0.0), (-1.0, 2.0)])
def test_ratio_is_undefined_without_two_positive_numbers(value, base):
    assert error_ratio(value, base, higher_is_better=False) is None


def test_of_a_score_with_an_ideal_the_error_is_what_is_missing_to_it():
    # accuracy 0.95 instead of 0.9 halves the errors; a correlation of 0, and a negative one, are errors like any other
    assert error_ratio(0.95, 0.9, higher_is_better=True, ideal=1.0) == pytest.approx(0.5)
    assert error_ratio(0.0, 0.5, higher_is_better=True, ideal=1.0) == 2.0
    assert error_ratio(-0.5, 0.25, higher_is_better=True, ideal=1.0) == 2.0
    assert error_ratio(95.0, 90.0, higher_is_better=True, ideal=100.0) == pytest.approx(0.5)
    assert error_ratio(1.0, 0.5, higher_is_better=True, ideal=1.0) is None
    assert error_ratio(0.5, 1.0, higher_is_better=True, ideal=1.0) is None
    assert error_ratio(None, 0.5, higher_is_better=True, ideal=1.0) is None


def scores(balancer: str, values: list[float | None]) -> RunResults:
    """A run with scores: one task with one of them, one with two, and the mean over the tasks."""
    names = [("cola_matthews", "cola", "Matthews"), ("mrpc_accuracy", "mrpc", "accuracy"), ("mrpc_f1", "mrpc", "F1"),
             ("glue_score", "", "mean score")]  # fmt: skip
    trivial = [0.0, 0.7, 0.8, 0.375]
    metrics = [
        MetricResult(key, task, name, "", True, value=value, trivial=constant, ideal=1.0)
        for (key, task, name), value, constant in zip(names, values, trivial, strict=True)
    ]
    return RunResults(f"text_{balancer}", "text", "glue", balancer, "test", metrics,
                      trivial_predictor="constant predictor")  # fmt: skip


def test_scores_are_compared_by_their_errors_each_task_once():
    table = compare_runs([scores("ls", [0.0, 0.8, 0.9, 0.425]), scores("bilb", [0.5, 0.9, 0.9, 0.7])], ["ls", "bilb"])
    assert [row.ratios[1] for row in table.all_lines] == pytest.approx([0.5, 0.5, 1.0, 0.3 / 0.575])
    # cola 1/2; mrpc sqrt(1/2 * 1); the mean over the tasks is no task
    assert table.error_ratios()[1].mean == pytest.approx((0.5 * 0.5**0.5) ** 0.5)
    assert table.worst_ratios()[1] == pytest.approx((1.0, "mrpc"))
    assert [row.beats_trivial for row in table.all_lines] == [(False, True), (True, True), (True, True), (True, True)]
    assert [row.best for row in table.all_lines] == [(1,), (1,), (0, 1), (1,)]


def test_another_form_of_a_metric_is_a_row_and_no_part_of_the_summary():
    def with_form(run: RunResults, value: float) -> RunResults:
        form = MetricResult("cola_other", "cola", "other form", "", True, value, 0.0, ideal=1.0, counted=False)
        return dataclasses.replace(run, metrics=[*run.metrics, form])

    runs = [scores("ls", [0.0, 0.8, 0.9, 0.425]), scores("bilb", [0.5, 0.9, 0.9, 0.7])]
    plain = compare_runs(runs, ["ls", "bilb"])
    table = compare_runs([with_form(runs[0], 0.999), with_form(runs[1], 0.1)], ["ls", "bilb"])
    assert table.all_lines[-1].ratios[1] == pytest.approx(900)
    assert table.error_ratios() == plain.error_ratios()
    assert table.worst_ratios() == plain.worst_ratios()
    assert runs_figure(table).axes[0].get_yticks().size == runs_figure(plain).axes[0].get_yticks().size


def test_the_table_of_scores_names_its_predictor_and_says_what_a_ratio_is():
    text = runs_markdown(
        compare_runs([scores("ls", [0.0, 0.8, 0.9, 0.425]), scores("bilb", [0.5, 0.9, 0.9, 0.7])], ["ls", "bilb"])
    )
    assert text.startswith("| task | metric | unit | ls | bilb | constant predictor | bilb / ls | beats constant |\n")
    assert "| cola | Matthews |  | 0.000 | **0.5000** | 0.000 | 0.5000 | NO: ls |\n" in text
    assert "| all tasks | mean score |  | 0.4250 | **0.7000** | 0.3750 | 0.5217 | yes |\n" in text
    assert "Note: ratios are those of the errors, which for scores are what is missing to a perfect one." in text
    assert "Note" not in runs_markdown(compare_runs([scores("ls", [0.0, 0.8, 0.9, 0.425])], ["ls"]))


def test_geometric_mean():
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)
    assert geometric_mean([1.0, None]) is None
    assert geometric_mean([]) is None


def test_compare_relates_to_the_first_run():
    table = compare_runs([LS, BILB], ["ls", "bilb"])
    assert [row.ratios for row in table.all_lines] == [(1.0, 0.5), (1.0, 2.0)]
    assert [row.best for row in table.all_lines] == [(1,), (0,)]
    assert [row.beats_trivial for row in table.all_lines] == [(True, True), (True, False)]
    assert [ratio.mean for ratio in table.error_ratios()] == pytest.approx([1.0, 1.0])
    assert table.worst_ratios() == [(1.0, "toxic"), (2.0, "toxic")]
    assert table.notes == ()


def test_a_missing_value_makes_the_summary_unknown_and_not_better():
    table = compare_runs([LS, run("bilb", [None, 0.9])], ["ls", "bilb"])
    assert table.all_lines[0].ratios == (1.0, None)
    assert table.all_lines[0].best == (0,)
    assert table.all_lines[0].beats_trivial == (True, False)
    assert [ratio.mean for ratio in table.error_ratios()] == [1.0, None]
    assert table.worst_ratios()[1] is None


def test_ties_are_both_best():
    table = compare_runs([LS, run("bilb", [100.0, 0.9])], ["ls", "bilb"])
    assert table.all_lines[0].best == (0, 1)


def test_is_better_is_strict_and_false_where_unknown():
    assert is_better(1.0, 2.0, higher_is_better=False)
    assert not is_better(1.0, 1.0, higher_is_better=False)
    assert not is_better(1.0, 1.0, higher_is_better=True)
    assert not is_better(None, 1.0, higher_is_better=False)
    assert not is_better(1.0, None, higher_is_better=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (0.45674, "0.4567"),
        (12.3449, "12.34"),
        (0.99996, "1.000"),
        (9999.6, "10000"),
        (12344.4, "12340"),
        (0.00012344, "0.0001234"),
        (1.2344e-5, "1.234e-05"),
        (-3.14159, "-3.142"),
        (2.5e8, "2.500e+08"),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_markdown_of_two_runs():
    assert runs_markdown(compare_runs([LS, BILB], ["ls", "bilb"])) == (
        "| task | metric | unit | ls | bilb | mean predictor | bilb / ls | beats mean |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |\n"
        "| homo | MAE | meV | 100.0 | **50.00** | 200.0 | 0.5000 | yes |\n"
        "| toxic | AUC |  | **0.8000** | 0.4000 | 0.5000 | 2.000 | NO: bilb |\n"
        "| geometric mean |  |  |  |  |  | 1.000 |  |\n"
        "| worst |  |  |  |  |  | 2.000 (toxic) |  |\n"
    )


def test_markdown_of_one_run_has_neither_bold_nor_ratios():
    assert runs_markdown(compare_runs([LS], ["ls"])) == (
        "| task | metric | unit | ls | mean predictor | beats mean |\n"
        "| --- | --- | --- | ---: | ---: | --- |\n"
        "| homo | MAE | meV | 100.0 | 200.0 | yes |\n"
        "| toxic | AUC |  | 0.8000 | 0.5000 | yes |\n"
    )


def test_without_a_trivial_predictor_nothing_is_said_about_it():
    table = compare_runs([run("ls", [100.0, 0.8], trivial=(None, None))], ["ls"])
    assert "| 100.0 | - | - |" in runs_markdown(table)


def test_text_is_aligned_and_marks_the_best():
    lines = runs_text(compare_runs([LS, BILB], ["ls", "bilb"])).splitlines()
    assert lines[0].split() == "task metric unit ls bilb mean predictor bilb / ls beats mean".split()
    assert "50.00*" in lines[2]
    assert "0.8000*" in lines[3]
    assert lines[5].split() == ["geometric", "mean", "1.000"]
    assert lines[6].split() == ["worst", "2.000", "(toxic)"]
    ends = {lines[i].index(word) + len(word) for i, word in ((0, "bilb / ls"), (2, "0.5000"), (6, "2.000 (toxic)"))}
    assert len(ends) == 1


def test_csv_keeps_full_precision():
    table = compare_runs([run("ls", [1 / 3, 0.8]), run("bilb", [None, 0.4])], ["ls", "bilb"])
    rows = list(csv.DictReader(io.StringIO(runs_csv(table))))
    assert float(rows[0]["ls"]) == 1 / 3
    assert rows[0]["bilb"] == rows[0]["ratio:bilb"] == ""
    assert float(rows[1]["ratio:bilb"]) == 2.0
    assert rows[1]["higher_is_better"] == "true"


def test_other_rows_are_noted_in_every_rendering():
    table = compare_runs([LS, run("bilb", [50.0, 0.4], trivial=(201.0, 0.5))], ["ls", "bilb"])
    note = "bilb and ls did not see the same rows: the mean predictor's mae_homo is 201.0 and 200.0"
    assert table.notes == (note,)
    assert note in runs_markdown(table)
    assert note in runs_text(table)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(OptionError, match="bilb was measured on validation, ls on test"):
        compare_runs([LS, run("bilb", [1.0, 1.0], split="validation")], ["ls", "bilb"])
    odd = RunResults("x", "mlp", "made_up", "bilb", "test", metrics=LS.metrics[:1])
    with pytest.raises(OptionError, match=r"other metrics or units \(first: auc_toxic\)"):
        compare_runs([LS, odd], ["ls", "bilb"])


def test_labels_are_the_shortest_names_that_tell_runs_apart():
    assert labels([LS, BILB], ["a/x", "b/x"]) == ["ls", "bilb"]
    other = run("ls", [1.0, 1.0], recipe="wide")
    assert labels([LS, other], ["a/x", "b/y"]) == ["mlp_ls", "wide"]
    assert labels([LS, LS], ["a/x", "b/y"]) == ["x", "y"]
    assert labels([LS, LS], ["a/x", "b/x"]) == ["a/x", "b/x"]


def test_worst_ratio_is_the_largest():
    table = compare_runs([LS, run("bilb", [130.0, 0.79])], ["ls", "bilb"])
    ratio, task = table.worst_ratios()[1]
    assert task == "homo"
    assert math.isclose(ratio, 1.3)


def with_delta_m(balancer: str, value: float, epochs: float) -> RunResults:
    delta = MetricResult("delta_m", "", "Delta_m", "%", False, value, trivial=900.0)
    made = run(balancer, [50.0, 0.8], training={"epochs": epochs}, base_source="the papers' models, 300 epochs")
    made.metrics.append(delta)
    return made


def test_delta_m_says_what_it_relates_to_and_how_long_was_trained():
    one = runs_markdown(compare_runs([with_delta_m("ls", 177.6, 20.0)], ["ls"]))
    assert "| all tasks | Delta_m | % | 177.6 |" in one
    assert "Note: Delta_m relates to the papers' models, 300 epochs; this run trained 20 epochs.\n" in one
    two = compare_runs([with_delta_m("ls", 177.6, 20.0), with_delta_m("bilb", 88.8, 30.0)], ["ls", "bilb"])
    assert two.notes[0] == "Delta_m relates to the papers' models, 300 epochs; these runs trained 20, 30 epochs"
    assert not any("Delta_m" in note for note in compare_runs([LS, BILB], ["ls", "bilb"]).notes)


def test_delta_m_is_related_to_no_other_run():
    table = compare_runs([with_delta_m("ls", 177.6, 20.0), with_delta_m("bilb", 88.8, 20.0)], ["ls", "bilb"])
    row = table.all_lines[-1]
    assert (row.about.key, row.ratios, row.best) == ("delta_m", (None, None), (1,))
    assert row.beats_trivial == (True, True)
    assert runs_figure(table).axes[0].get_yticks().size == len(table.all_lines) - 1

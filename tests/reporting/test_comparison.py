"""A comparison's figures against figures worked out by hand and against scipy's paired t-test."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
from scipy.stats import ttest_rel

from hf_bilb.errors import OptionError
from hf_bilb.reporting.comparison import MetricLine, compare_methods
from hf_bilb.reporting.results import MetricResult
from hf_bilb.reporting.statistics import Figure, paired_difference
from tests.reporting.made_up_comparison import BASE, TASKS, cell, runs


def method(comparison, name):
    return next(method for method in comparison.methods if method.name == name)


def test_mean_and_sample_deviation():
    values = [0.3, 0.45, 0.1, 0.7]
    figure = Figure(dict(enumerate(values)))
    assert figure.mean == pytest.approx(statistics.mean(values), rel=1e-15)
    assert figure.deviation == pytest.approx(statistics.stdev(values), rel=1e-14)
    assert Figure({7: 0.3}).mean == 0.3
    assert Figure({7: 0.3}).deviation is None


def test_a_seed_that_diverged_is_not_left_out_of_the_mean():
    figure = Figure({0: 1.0, 1: None})
    assert figure.mean is None and figure.deviation is None
    assert paired_difference(figure, Figure({0: 1.0, 1: 2.0})) is None


@pytest.mark.parametrize("num_seeds", range(2, 12))
def test_within_the_spread_is_what_a_paired_t_test_does_not_reject(num_seeds):
    generator = np.random.default_rng(num_seeds)
    verdicts = set()
    for shift in np.linspace(0, 14 / num_seeds, 40):
        ours = generator.normal(shift, 1, num_seeds)
        theirs = generator.normal(0, 0.3, num_seeds)
        difference = paired_difference(Figure(dict(enumerate(ours))), Figure(dict(enumerate(theirs))))
        interval = ttest_rel(ours, theirs).confidence_interval(0.95)
        assert difference.mean - difference.half_width == pytest.approx(interval.low, rel=1e-3, abs=1e-3)
        assert difference.within_spread == (interval.low <= 0 <= interval.high)
        verdicts.add(difference.within_spread)
    assert verdicts == {True, False}


def test_seeds_are_paired_and_only_shared_ones_count():
    difference = paired_difference(Figure({0: 3.0, 1: 13.0, 5: 0.0}), Figure({1: 12.0, 0: 1.0, 9: 0.0}))
    assert (difference.mean, difference.num_seeds) == (1.5, 2)
    assert paired_difference(Figure({0: 1.0}), Figure({1: 1.0})) is None
    one = paired_difference(Figure({0: 1.0}), Figure({0: 3.0}))
    assert (one.mean, one.half_width, one.within_spread) == (-2.0, None, None)


def test_best_and_what_the_seeds_do_not_tell_from_it():
    about = MetricResult("auc", "toxic", "AUC", "", True, None, None)
    far, best, near = (Figure(dict(enumerate(v))) for v in ([0.5, 0.51, 0.49], [0.8, 0.82, 0.84], [0.79, 0.83, 0.83]))
    line = MetricLine(about, (far, best, near))
    assert line.best == (1,)
    assert line.near_best == (2,)
    one_seed = MetricLine(about, (Figure({0: 0.8}), Figure({0: 0.8 - 1e-9})))
    assert (one_seed.best, one_seed.near_best) == ((0,), ())


def test_delta_m_of_each_seed_against_the_published_base():
    comparison = compare_methods(runs(), {}, "ls")
    # ls, seed 0: changes of 100/50, 40/20 and 30/10, less 1, in percent
    assert method(comparison, "ls").delta_m.values[0] == pytest.approx((100 + 100 + 200) / 3)
    assert method(comparison, "half").delta_m.values == {
        0: pytest.approx((0 + 0 + 50) / 3),
        1: pytest.approx((10 + 5 + 40) / 3),
        2: pytest.approx((-10 - 5 + 60) / 3),
    }
    # grouped: U0 and U count once
    assert method(comparison, "half").grouped_delta_m.values[0] == pytest.approx((0 + (0 + 50) / 2) / 2)
    assert comparison.base_source == "the paper"


def test_delta_m_against_the_studys_own_single_task_models():
    own = {
        "homo": {0: cell("ls", [60.0], tasks=["homo"]), 1: cell("ls", [40.0], tasks=["homo"])},
        "U0": {0: cell("ls", [40.0], tasks=["U0"])},
        "U": {0: cell("ls", [15.0], tasks=["U"])},
    }
    comparison = compare_methods(runs(base={}), own, "ls")
    assert [line.base for line in comparison.lines] == [50.0, 40.0, 15.0]
    assert method(comparison, "ls").delta_m.values[0] == pytest.approx((100 + 0 + 100) / 3)
    assert comparison.base_source == "this comparison's models of one task each"
    # a published base says which metrics count, not what they relate to
    partly = compare_methods(runs(base={"homo": 1.0}), own, "ls")
    assert [line.base for line in partly.lines] == [50.0, None, None]
    assert method(partly, "ls").delta_m.values[0] == pytest.approx(100)


@pytest.mark.parametrize(
    ("single", "said"),
    [
        (
            {"homo": {0: cell("ls", [60.0], tasks=["homo"])}, "U0": {}, "U": {}},
            "no single-task model of U0 is finished",
        ),
        ({t: {0: cell("ls", [0.0], tasks=[t])} for t in TASKS}, "the single-task model's mae_homo is 0,"),
        ({t: {0: cell("ls", [None], tasks=[t])} for t in TASKS}, "the single-task model's mae_homo is no finite"),
    ],
)
def test_single_task_models_that_are_no_base_are_said_and_not_used(single, said):
    comparison = compare_methods(runs(), single, "ls")
    assert comparison.notes[0].startswith(said)
    assert [line.base for line in comparison.lines] == list(BASE.values())
    assert compare_methods(runs(base={}), single, "ls").methods[0].delta_m is None


def test_mean_rank_is_over_the_metrics_and_puts_a_diverged_method_last():
    comparison = compare_methods(runs(), {}, "ls")
    # homo: 100, 100, 50; U0: 40, 39.67, 20; U: 30, 29.83, 15
    assert [m.mean_rank for m in comparison.methods] == [pytest.approx((2 + 3 + 3) / 3), 2.0, 1.0]
    cells = runs()
    cells["half"][1] = cell("half", [None, 21.0, 14.0])
    comparison = compare_methods(cells, {}, "ls")
    assert method(comparison, "half").mean_rank == pytest.approx((3 + 1 + 1) / 3)
    assert method(comparison, "half").delta_m.mean is None
    assert comparison.notes == ("half: mae_homo is no finite number with seed 1 (1 such values)",)


def test_the_relation_to_the_reference():
    comparison = compare_methods(runs(), {}, "ls")
    ls, near, half = comparison.methods
    assert (ls.difference, ls.worst) == (None, None)
    assert ls.error_ratio.values == {0: 1.0, 1: 1.0, 2: 1.0}
    assert half.error_ratio.mean == pytest.approx(0.5)
    assert half.worst == (pytest.approx(0.5), "homo")
    seed_0 = math.prod([101 / 100, 39 / 40, 30.5 / 30]) ** (1 / 3)
    assert near.error_ratio.values[0] == pytest.approx(seed_0)
    assert near.worst == (pytest.approx(1.0), "homo")
    assert near.difference.within_spread is True
    assert half.difference.within_spread is False and half.difference.mean < 0
    assert comparison.ratio_to_reference(lambda m: m.step_seconds) == [1.0, pytest.approx(1.5), 1.0]
    assert comparison.ratio_to_reference(lambda m: m.peak_memory_bytes) == [1.0, 1.5, 1.0]


def test_without_a_base_the_reference_is_told_apart_by_the_geometric_mean():
    comparison = compare_methods(runs(base={}), {}, "ls")
    half = method(comparison, "half")
    assert half.delta_m is None and comparison.base_source == ""
    assert half.difference.mean == pytest.approx(math.log(0.5))
    assert half.difference.within_spread is False
    assert method(comparison, "near").difference.within_spread is True


def test_a_task_with_two_metrics_counts_once_in_the_geometric_mean():
    def scores(values):
        names = [("a_acc", "a", "accuracy"), ("b_r", "b", "Pearson"), ("b_rho", "b", "Spearman")]
        metrics = [
            MetricResult(key, task, name, "", True, value, 0.0, ideal=1.0)
            for (key, task, name), value in zip(names, values, strict=True)
        ]
        return {0: cell("x", [], tasks=[]).__class__("r", "m", "d", "x", "test", metrics)}

    comparison = compare_methods({"ls": scores([0.8, 0.9, 0.9]), "x": scores([0.6, 0.95, 0.975])}, {}, "ls")
    # errors of x over those of ls: 2; 0.5 and 0.25, which are one task
    assert method(comparison, "x").error_ratio.values[0] == pytest.approx(math.sqrt(2 * math.sqrt(0.5 * 0.25)))
    assert method(comparison, "x").worst == (pytest.approx(2.0), "a")


def test_a_method_without_a_finished_cell_is_left_out_and_the_reference_may_be_it():
    comparison = compare_methods({"ls": {}, **{k: v for k, v in runs().items() if k != "ls"}}, {}, "ls")
    assert [m.name for m in comparison.methods] == ["near", "half"]
    assert comparison.reference is None
    assert all(m.difference is None and m.error_ratio is None for m in comparison.methods)
    with pytest.raises(OptionError, match="no run is finished"):
        compare_methods({"ls": {}}, {}, "ls")


def test_cells_that_were_measured_on_other_metrics_are_refused():
    with pytest.raises(OptionError, match="near, seed 4 and ls, seed 0 have other metrics or units"):
        compare_methods({"ls": runs()["ls"], "near": {4: cell("near", [1.0], tasks=["homo"])}}, {}, "ls")


def test_delta_m_that_the_data_set_computed_is_not_a_second_one():
    cells = runs()
    for of_method in cells.values():
        for run in of_method.values():
            run.metrics.append(MetricResult("delta_m", "", "Delta_m", "%", False, 3.0, None))
            run.metrics.append(MetricResult("delta_m_by_task", "", "Delta_m by task", "%", False, 3.0, None))
            run.metrics.append(MetricResult("score", "", "score", "", True, 0.5, None))
    comparison = compare_methods(cells, {}, "ls")
    assert [line.about.key for line in comparison.overall] == ["score"]
    assert len(comparison.lines) == 3


def with_second_form(cells, base=None):
    """Beside each metric another form of it, which says the opposite: another order of the methods, wild sizes."""
    made = {}
    for name, of_method in cells.items():
        made[name] = {}
        for seed, run in of_method.items():
            others = [
                dataclasses.replace(
                    m, key=f"{m.key}_exact", name="MAE, exact", value=1e6 / m.value, base=base, counted=False
                )
                for m in run.metrics
            ]
            made[name][seed] = dataclasses.replace(run, metrics=[*run.metrics, *others])
    return made


@pytest.mark.parametrize("stl", [False, True])
def test_another_form_of_a_metric_is_shown_and_counts_nowhere(stl):
    own = {t: {0: cell("ls", [value], tasks=[t])} for t, value in zip(TASKS, (60.0, 40.0, 15.0), strict=True)}
    plain = compare_methods(runs(), own if stl else {}, "ls")
    both = compare_methods(with_second_form(runs(), base=1.0), with_second_form(own, base=1.0) if stl else {}, "ls")
    assert both.methods == plain.methods
    assert both.based_lines == plain.lines == both.counted_lines
    shown = both.lines[3:]
    assert [line.about.key for line in shown] == [f"mae_{task}_exact" for task in TASKS]
    assert [line.base for line in shown] == [None] * 3
    assert [line.single_task is not None for line in shown] == [stl] * 3


def test_another_form_is_no_base_that_could_be_missing():
    """A second form of zero, which no ratio can be taken of, does not stop Delta_m from relating to single tasks."""
    own = with_second_form({t: {0: cell("ls", [20.0], tasks=[t])} for t in TASKS})
    for of_task in own.values():
        of_task[0].metrics[1] = dataclasses.replace(of_task[0].metrics[1], value=0.0)
    comparison = compare_methods(with_second_form(runs(base={})), own, "ls")
    assert comparison.notes == () and comparison.base_source == "this comparison's models of one task each"

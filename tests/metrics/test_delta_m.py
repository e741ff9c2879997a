"""Delta_m and mean rank: against the official code's numbers, printed tables, a plain loop; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_bilb.errors import MetricError
from hf_bilb.metrics.delta_m import delta_m, grouped_delta_m, mean_rank

ROOT = Path(__file__).resolve().parents[2]
PARITY = ROOT / "tests" / "parity_data"
HIGHER = {"nyu": [True, True, False, False, False, False, True, True, True], "city": [True, True, False, False]}


def table(name: str) -> dict[str, Any]:
    return json.loads((PARITY / "marigold_tables_7_8.json").read_text(encoding="utf-8"))[name]


# --- against others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes", "qm9", "celeba"])
def test_delta_m_is_that_of_the_official_code(name: str) -> None:
    with np.load(PARITY / "metrics.npz") as recorded:
        base, metrics, expected = (recorded[f"{name}_{key}"] for key in ("base", "metrics", "delta_m"))
        higher = np.ones(len(base)) if name == "celeba" else recorded[f"{name}_sign_higher_better"]
    assert delta_m(metrics, base, higher) == pytest.approx(expected, rel=1e-13)
    one = delta_m(metrics[0], base, higher)
    assert type(one) is float and one == pytest.approx(expected[0], rel=1e-13)


@pytest.mark.parametrize(
    ("name", "others"), [("nyu", {"CAGrad"}), ("city", {"LS", "DWA", "CAGrad", "FAMO (rerun)"})], ids=["nyu", "city"]
)
def test_printed_mean_ranks(name: str, others: set[str]) -> None:
    # Of 17 printed values 16 (NYUv2) and 13 (Cityscapes) follow from the printed metrics; the others are of methods
    # that tie with another in a metric as printed.
    printed = table(name)
    ranks = dict(zip(printed["methods"], mean_rank(printed["metrics"], HIGHER[name]), strict=True))
    expected = dict(zip(printed["methods"], printed["mr"], strict=True))
    differ = {method for method in expected if round(ranks[method], 2) != expected[method]}
    assert len(expected) == 17 and differ == others
    assert all(abs(ranks[method] - expected[method]) <= 0.25 for method in others)


@pytest.mark.parametrize(
    ("name", "others"), [("nyu", {"IMTL-G": (-0.60, -0.76), "FAMO (rerun)": (-2.91, -3.27)}), ("city", {})]
)
def test_printed_delta_m(name: str, others: dict[str, tuple[float, float]]) -> None:
    # The two values that are not within rounding of the printed metrics are the table's own.
    printed = table(name)
    found = dict(zip(printed["methods"], delta_m(printed["metrics"], printed["base"], HIGHER[name]), strict=True))
    for method, expected in zip(printed["methods"], printed["delta_m"], strict=True):
        if method in others:
            assert (round(found[method], 2), expected) == others[method]
        else:
            assert found[method] == pytest.approx(expected, abs=0.11), method


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_mean_rank_equals_a_plain_loop_with_ties(direction: str) -> None:
    stats = pytest.importorskip("scipy.stats", reason="the reference is scipy's competition ranking")
    generator = np.random.default_rng(0)
    values = generator.integers(0, 4, (6, 9)).astype(float)
    higher = [direction == "higher"] * 9
    signed = -values if direction == "higher" else values
    expected = np.mean([stats.rankdata(column, method="min") for column in signed.T], axis=0)
    assert mean_rank(values, higher) == pytest.approx(expected, rel=1e-14)


def test_mean_rank_depends_on_who_is_compared() -> None:
    metrics = [[1.0, 5.0], [2.0, 4.0], [3.0, 3.0]]
    assert mean_rank(metrics, [True, True]).tolist() == [2.0, 2.0, 2.0]
    assert mean_rank(metrics[:1], [True, True]).tolist() == [1.0]
    assert mean_rank([[1.0], [1.0], [0.5], [np.inf]], [False]).tolist() == [2.0, 2.0, 1.0, 4.0]


# --- groups -------------------------------------------------------------------------------------------------------


def test_a_group_counts_once() -> None:
    values, base, higher = [2.0, 3.0, 3.0, 3.0, 0.5], [1.0, 2.0, 2.0, 2.0, 1.0], [False, False, False, False, True]
    # changes +100 %, three times +50 %, +50 %
    assert delta_m(values, base, higher) == pytest.approx((100 + 3 * 50 + 50) / 5)
    assert grouped_delta_m(values, base, higher, ["a", "e", "e", "e", "b"]) == pytest.approx((100 + 50 + 50) / 3)
    assert grouped_delta_m(values, base, higher, ["e", "a", "b", "a", "e"]) == pytest.approx((75 + 50 + 50) / 3)


def test_groups_of_one_and_one_group_are_the_flat_mean() -> None:
    with np.load(PARITY / "metrics.npz") as recorded:
        values, base, higher = (recorded[f"nyuv2_{key}"] for key in ("metrics", "base", "sign_higher_better"))
        expected = recorded["nyuv2_delta_m"]
    assert grouped_delta_m(values, base, higher, range(9)) == pytest.approx(expected, rel=1e-13)
    assert grouped_delta_m(values, base, higher, ["all"] * 9) == pytest.approx(expected, rel=1e-13)
    one = grouped_delta_m(values[1], base, higher, ["seg"] * 2 + ["depth"] * 2 + ["normal"] * 5)
    changes = [delta_m(values[1][part], base[part], higher[part]) for part in (slice(2), slice(2, 4), slice(4, 9))]
    assert type(one) is float and one == pytest.approx(np.mean(changes), rel=1e-13)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_a_base_without_a_share_is_named(wrong: float) -> None:
    for call in (
        lambda: delta_m([1.0, 2.0], [1.0, wrong], [True, True]),
        lambda: grouped_delta_m([1.0, 2.0], [1.0, wrong], [True, True], ["a", "b"]),
    ):
        with pytest.raises(
            MetricError, match=rf"^base\[1\]: {wrong:g} is not valid, expected a finite number above 0$"
        ):
            call()


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(MetricError, match=r"values \(3,\) and base \(2,\), expected \[\.\.\., M\] and \[M\]"):
        delta_m([1.0, 2.0, 3.0], [1.0, 2.0], [True, True])
    with pytest.raises(MetricError, match=r"values \(\) and base \(1,\)"):
        delta_m(1.0, [1.0], [True])
    with pytest.raises(MetricError, match=r"values \(0,\) and base \(0,\)"):
        delta_m([], [], [])
    # One for all would broadcast to a plausible, wrong number.
    with pytest.raises(MetricError, match=r"higher_is_better \(1,\), expected \[2\]"):
        delta_m([1.0, 2.0], [1.0, 2.0], [True])
    with pytest.raises(MetricError, match="groups: got 1 labels, expected one for each of 2 metrics"):
        grouped_delta_m([1.0, 2.0], [1.0, 2.0], [True, True], ["a"])
    with pytest.raises(MetricError, match=r"values \(2,\), expected \[R, M\]"):
        mean_rank([1.0, 2.0], [True, True])
    with pytest.raises(MetricError, match=r"higher_is_better \(2,\), expected \[1\]"):
        mean_rank([[1.0], [2.0]], [True, True])


def test_a_diverged_model() -> None:
    # Delta_m says so; in a ranking a NaN would be first, since nothing is better.
    assert np.isnan(delta_m([np.nan, 1.0], [1.0, 1.0], [True, True]))
    with pytest.raises(MetricError, match=r"values\[1, 0\]: nan has no rank"):
        mean_rank([[1.0, 2.0], [np.nan, 1.0]], [True, True])


# --- reports need it without the rest -----------------------------------------------------------------------------

# The package's own __init__ offers the balancers, and so torch; everything below it must do without.
WITHOUT_TORCH = """
import sys, types
package = types.ModuleType("hf_bilb")
package.__path__ = [sys.argv[1]]
sys.modules["hf_bilb"] = package
from hf_bilb.metrics.delta_m import delta_m
assert delta_m([1.5], [1.0], [False]) == 50.0
print(sorted({"torch", "transformers", "datasets", "evaluate", "scipy", "sklearn"} & sys.modules.keys()))
"""


def test_it_imports_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "hf_bilb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

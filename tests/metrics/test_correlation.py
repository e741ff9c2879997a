"""Pearson and Spearman against scipy, all at once and batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_bilb.errors import MetricError
from hf_bilb.metrics.correlation import Pearson, PearsonSpearman, Spearman, pearson, spearman

stats = pytest.importorskip("scipy.stats", reason="the reference is scipy")


def drawn(ties: bool, missing: float = 0.3, offset: float = 0.0, rows: int = 500) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(int(ties))
    labels = generator.normal(size=rows)
    predictions = 0.6 * labels + generator.normal(size=rows)
    if ties:  # few different values on both sides, as in STS-B's scores
        labels, predictions = np.round(labels), np.round(2 * predictions) / 2
    labels[generator.random(rows) < missing] = np.nan
    return predictions + offset, labels + offset


def expected(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    there = ~np.isnan(labels)
    pairs = predictions[there].astype(np.float64), labels[there].astype(np.float64)
    return {"pearson": stats.pearsonr(*pairs).statistic, "spearman": stats.spearmanr(*pairs).statistic}


def in_batches(accumulator: Any, predictions: np.ndarray, labels: np.ndarray, size: int) -> dict[str, float]:
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        accumulator.update(torch.from_numpy(predictions[rows]), torch.from_numpy(labels[rows]))
    return accumulator.compute()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, list], ids=["numpy", "torch", "list"])
def test_functions_equal_scipy(ties: bool, convert: Callable[[np.ndarray], Any]) -> None:
    predictions, labels = drawn(ties)
    reference = expected(predictions, labels)
    given = convert(predictions), convert(labels)
    assert pearson(*given) == pytest.approx(reference["pearson"], rel=1e-12)
    assert spearman(*given) == pytest.approx(reference["spearman"], rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [1, 3, 64, 500])
def test_batches_equal_scipy_on_the_whole_set(ties: bool, size: int) -> None:
    predictions, labels = drawn(ties)
    labels[100:200] = np.nan  # whole batches without a label
    assert in_batches(PearsonSpearman(), predictions, labels, size) == pytest.approx(
        expected(predictions, labels), rel=1e-12
    )
    narrow = predictions.astype(np.float32), labels.astype(np.float32)
    assert in_batches(PearsonSpearman(), *narrow, size) == pytest.approx(expected(*narrow), rel=1e-12)


@pytest.mark.parametrize("size", [1, 7, 500])
def test_a_large_mean_costs_no_digits(size: int) -> None:
    # Sums of squares would be 5e18 and their differences 5e2: float64 keeps no digit of them.
    predictions, labels = drawn(ties=False, offset=1e8)
    reference = expected(predictions, labels)["pearson"]
    assert in_batches(Pearson(), predictions, labels, size)["pearson"] == pytest.approx(reference, rel=1e-7)
    exact = expected(predictions - 1e8, labels - 1e8)["pearson"]
    assert in_batches(Pearson(), predictions, labels, size)["pearson"] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_the_function_neither_overflows_nor_vanishes(factor: float) -> None:
    predictions, labels = drawn(ties=False)
    reference = expected(predictions, labels)
    assert pearson(predictions * factor, labels) == pytest.approx(reference["pearson"], rel=1e-12)
    assert spearman(predictions * factor, labels) == pytest.approx(reference["spearman"], rel=1e-12)


def test_perfect_correlation_is_one_and_no_more() -> None:
    # Rounding would give 1.0000000000000002 for some of these, which is a correlation to nobody.
    for seed in range(20):
        labels = np.random.default_rng(seed).normal(size=50)
        for factor in (1.0, 3.3, -0.7):
            predictions = factor * labels + 1
            found = in_batches(PearsonSpearman(), predictions, labels, 50)
            assert found == pytest.approx({"pearson": np.sign(factor), "spearman": np.sign(factor)}, rel=1e-14)
            assert all(abs(value) <= 1 for value in (*found.values(), pearson(predictions, labels)))


CONSTANT = {
    "predictions": (np.full(7, 0.1), np.arange(7.0)),
    "labels": (np.arange(7.0), np.full(7, 0.1)),
    "one example": (np.array([2.0]), np.array([3.0])),
}


@pytest.mark.parametrize("side", CONSTANT)
def test_a_constant_has_no_correlation(side: str) -> None:
    # The mean of seven 0.1 is not 0.1: by the deviation alone it would be rounding errors that correlate.
    predictions, labels = CONSTANT[side]
    assert pearson(predictions, labels) == spearman(predictions, labels) == 0.0
    for size in (1, 3, 7):
        assert in_batches(PearsonSpearman(), predictions, labels, size) == {"pearson": 0.0, "spearman": 0.0}


def test_values_that_are_not_finite() -> None:
    predictions, labels = np.array([1.0, np.nan, 3.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0])
    assert math.isnan(pearson(predictions, labels)) and math.isnan(spearman(predictions, labels))
    assert all(math.isnan(value) for value in in_batches(PearsonSpearman(), predictions, labels, 2).values())
    # Where the label is missing, nothing counts: there may stand another task's output.
    labels[1] = np.nan
    assert in_batches(PearsonSpearman(), predictions, labels, 2) == pytest.approx(expected(predictions, labels))
    predictions[1] = np.inf
    assert in_batches(PearsonSpearman(), predictions, labels, 2) == pytest.approx(expected(predictions, labels))
    labels[1] = 2.0
    assert math.isnan(pearson(predictions, labels))
    assert spearman(predictions, labels) == pytest.approx(stats.spearmanr(predictions, labels).statistic)
    found = in_batches(PearsonSpearman(), predictions, labels, 2)
    assert math.isnan(found["pearson"]) and found["spearman"] == spearman(predictions, labels)


def test_without_any_label() -> None:
    nothing = np.full(3, np.nan)
    assert math.isnan(pearson(np.ones(3), nothing)) and math.isnan(spearman([], []))
    accumulator = PearsonSpearman()
    assert accumulator.compute() == {}
    assert in_batches(accumulator, np.ones(3), nothing, 2) == {}


def test_reset_and_merge() -> None:
    predictions, labels = drawn(ties=True)
    first, second = PearsonSpearman(), PearsonSpearman()
    in_batches(first, predictions + 5, labels, 10)
    first.reset()
    assert first.compute() == {}
    in_batches(first, predictions[:123], labels[:123], 10)
    in_batches(second, predictions[123:], labels[123:], 10)
    first.merge(second)
    assert first.compute() == pytest.approx(expected(predictions, labels), rel=1e-12)
    with pytest.raises(MetricError, match="merge: got Spearman, expected Pearson"):
        Pearson().merge(Spearman())  # type: ignore[arg-type]


def test_the_first_column_counts_and_its_batch_is_not_kept() -> None:
    predictions, labels = (torch.from_numpy(array) for array in drawn(ties=False))
    wide = torch.cat([predictions.unsqueeze(1), torch.full((500, 200), -torch.inf)], dim=1)
    accumulator = Spearman()
    accumulator.update(wide, labels)
    assert accumulator.compute()["spearman"] == pytest.approx(
        expected(predictions.numpy(), labels.numpy())["spearman"], rel=1e-12
    )
    assert sum(pair.untyped_storage().nbytes() for pair in accumulator._pairs) == 2 * 500 * 8


def test_half_precision_predictions_leave_the_labels_their_digits() -> None:
    labels = torch.arange(300, dtype=torch.float32)  # beyond 256, bfloat16 has no odd numbers
    predictions = (labels / 300).to(torch.bfloat16)
    reference = stats.spearmanr(predictions.float(), labels).statistic
    accumulator = Spearman()
    accumulator.update(predictions, labels)
    assert accumulator.compute()["spearman"] == pytest.approx(reference, rel=1e-12)


@pytest.mark.parametrize("shapes", [((4,), (3,)), ((4, 2), (4, 1)), ((4, 0), (4,)), ((4, 1, 1), (4,))])
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    predictions, labels = (torch.zeros(shape) for shape in shapes)
    for accumulator in (Pearson(), Spearman()):
        with pytest.raises(MetricError, match=r"expected \[B\] or \[B, C\] \(the first column counts\) and \[B\]"):
            accumulator.update(predictions, labels)
    with pytest.raises(MetricError, match=r"expected both \[N\]"):
        pearson(np.zeros((4, 2)), np.zeros((4, 2)))


def test_update_never_looks_at_a_value() -> None:
    accumulator = PearsonSpearman()
    for _ in range(2):
        accumulator.update(torch.zeros(8, 3, device="meta"), torch.zeros(8, device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        accumulator.compute()

"""Numbers over seeds, differences of two of them, and ratios of errors.

A number over seeds is their mean with the sample standard deviation. Two methods are told apart by their paired
differences, seed by seed: a difference is within the seeds' spread when the 95 % interval of its mean (Student's t)
holds zero. With two or three seeds that interval is wide, as it has to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Student's t for the two-sided 95 % interval, by degrees of freedom 1 to 10; more seeds get the last one.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Figure:
    """A number over seeds. `values`: seed -> value, None where it was no finite number."""

    values: Mapping[int, float | None]

    @property
    def known(self) -> dict[int, float]:
        """The seeds with a finite value."""
        return {seed: value for seed, value in self.values.items() if value is not None}

    @property
    def mean(self) -> float | None:
        """None when a seed has no finite value: one that diverged is not left out of a mean."""
        known = self.known
        return math.fsum(known.values()) / len(known) if known and len(known) == len(self.values) else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for fewer than two seeds."""
        mean = self.mean
        if mean is None or len(self.values) < 2:
            return None
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.known.values()) / (len(self.values) - 1))


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences of two figures over the `num_seeds` seeds that both have, and half the width of
    its 95 % interval: None with one seed, which tells nothing."""

    mean: float
    half_width: float | None
    num_seeds: int

    @property
    def within_spread(self) -> bool | None:
        """Whether the interval holds zero; None when it cannot be told."""
        return None if self.half_width is None else abs(self.mean) <= self.half_width


def paired_difference(ours: Figure, theirs: Figure) -> Difference | None:
    """`ours - theirs`, seed by seed; None without a seed that both have, or with one that diverged."""
    seeds = [seed for seed in ours.values if seed in theirs.values]
    pairs = [(ours.values[seed], theirs.values[seed]) for seed in seeds]
    differences = {s: a - b for s, (a, b) in zip(seeds, pairs, strict=True) if a is not None and b is not None}
    if not differences or len(differences) < len(seeds):
        return None
    figure = Figure(dict(differences))
    mean, deviation, count = math.fsum(differences.values()) / len(differences), figure.deviation, len(differences)
    if deviation is None:
        return Difference(mean, None, count)
    factor = _STUDENT_T[min(count - 1, len(_STUDENT_T)) - 1]
    return Difference(mean, factor * deviation / math.sqrt(count), count)


def error_ratio(
    value: float | None, base: float | None, higher_is_better: bool, ideal: float | None = None
) -> float | None:
    """The error of `value` relative to that of `base`, so that below 1 is better; None unless both errors are > 0.

    The error is the value itself where lower is better; `ideal - value` where higher is better and the ideal is known
    (an accuracy of 0.9 has twice the error of one of 0.95; a correlation of 0 has the error 1); else `1 / value`.
    """
    if value is not None and base is not None and higher_is_better and ideal is not None:
        value, base, higher_is_better = ideal - value, ideal - base, False
    if value is None or base is None or value <= 0 or base <= 0:
        return None
    return base / value if higher_is_better else value / base


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """The geometric mean of positive numbers; None when there is none or one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return math.exp(math.fsum(math.log(value) for value in known) / len(known))

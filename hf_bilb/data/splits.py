"""How rows become the three parts of a data set.

Rows are drawn with a seed in every data set in the same way (`draw_rows`): shuffled, then cut into pieces. What is held
out is cut first, so that it stays the same rows whatever the number of training rows is, and a smaller training part is
the beginning of a larger one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_bilb.errors import OptionError

#: The parts, as `TaskData` names them.
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts, each `[N]`."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """The parts in the order of `PARTS`."""
        yield from (self.train, self.validation, self.test)


def draw_rows(num_rows: int, seed: int | Sequence[int], *sizes: int | None) -> list[NDArray[np.int64]]:
    """Shuffle rows `0 .. num_rows - 1` and cut them into pieces, one after the other.

    Args:
        num_rows: how many there are.
        seed: of the shuffling; with several numbers, another order for each choice of them.
        sizes: of the pieces; None: all that is left. A piece gets what is left where that is less than its size.
    """
    order = np.random.default_rng(seed).permutation(num_rows)
    pieces, start = [], 0
    for size in sizes:
        stop = num_rows if size is None else min(start + size, num_rows)
        pieces.append(order[start:stop])
        start = stop
    return pieces


def split_rows(num_rows: int, seed: int, num_train: int | None, num_validation: int, num_test: int) -> Split:
    """The parts of rows that have none of their own; `num_train=None` takes all that is not held out.

    Raises:
        OptionError: when a part does not fit (see `check_split`).
    """
    check_split(num_rows, num_train, num_validation, num_test)
    test, validation, train = draw_rows(num_rows, seed, num_test, num_validation, num_train)
    return Split(train, validation, test)


def held_out_count(num_rows: int, fraction: float, maximum: int | None = None) -> int:
    """How many of the rows a share of them is: one at least, `maximum` at most."""
    count = max(1, round(num_rows * fraction))
    return count if maximum is None else min(count, maximum)


def hold_out(
    num_rows: int,
    seed: int | Sequence[int],
    fraction: float,
    maximum: int | None = None,
    num_train: int | None = None,
    num_parts: int = 1,
    owner: str = "",
) -> list[NDArray[np.int64]]:
    """Training rows and, after them, the parts that are held out of them.

    Args:
        num_rows: rows that there are for training.
        seed: see `draw_rows`.
        fraction: the share of the rows that each part gets, one row at least.
        maximum: rows of a part at most; None: no limit.
        num_train: training rows at most; None: no limit.
        num_parts: how many are held out.
        owner: whose rows they are, for the message: ` of cola`.

    Raises:
        OptionError: no row is left for training.
    """
    count = held_out_count(num_rows, fraction, maximum)
    if num_parts * count >= num_rows:
        raise OptionError(f"data.validation_fraction: {num_rows} training rows{owner} are too few to split")
    *held_out, train = draw_rows(num_rows, seed, *[count] * num_parts, num_train)
    return [train, *held_out]


def check_split(num_rows: int, num_train: int | None, num_validation: int, num_test: int) -> None:
    """Raise `OptionError` naming the first of the three numbers that is below 1 or too large, and what it may be."""
    _check_count("num_test", num_test, num_rows - 2)
    _check_count("num_validation", num_validation, num_rows - num_test - 1)
    if num_train is not None:
        _check_count("num_train", num_train, num_rows - num_test - num_validation, " or null (all the rest)")


def _check_count(key: str, value: int, maximum: int, otherwise: str = "") -> None:
    if not 1 <= value <= maximum:
        raise OptionError(f"{key}: {value} is not valid, expected 1 to {maximum}{otherwise}")

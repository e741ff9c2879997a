"""Products of parameters, thinned: what a test is asked for every value and every setting of, it need not be asked for
all combinations of.

With `HF_BILB_ALL_CASES=1` (`make campaign`) both functions give the whole product. `campaigns/mutations.py` shows that
the thinned ones notice what the whole ones do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

ALL_CASES = os.environ.get("HF_BILB_ALL_CASES") == "1"


def in_turn(cases: Sequence[Any], *settings: Iterable[Any], each: int = 1) -> list[tuple[Any, ...]]:
    """Every case with `each` of the combinations of `settings`, which take turns: all of them come equally often, and
    neighbouring cases (variants of one method) get different ones."""
    combinations = list(itertools.product(*settings))
    if ALL_CASES or each >= len(combinations):
        return [(case, *combination) for case in cases for combination in combinations]
    turns = itertools.cycle(combinations)
    return [(case, *next(turns)) for case in cases for _ in range(each)]


def in_pairs(*lists: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each list, such that any two values of different lists come together in one."""
    values = [list(one) for one in lists]
    product = list(itertools.product(*(range(len(one)) for one in values)))
    if not ALL_CASES:
        product = _covering(product)
    return [tuple(one[i] for one, i in zip(values, places, strict=True)) for places in product]


def _covering(product: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    def pairs_of(places: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(a, places[a], b, places[b]) for a, b in itertools.combinations(range(len(places)), 2)}

    wanted = set().union(*map(pairs_of, product))
    chosen = []
    while wanted:
        best = max(product, key=lambda places: len(pairs_of(places) & wanted))  # the first of several: always the same
        chosen.append(best)
        wanted -= pairs_of(best)
    return chosen

"""Thinned products leave out no value and no pair."""

from __future__ import annotations

import itertools

import pytest

from tests import products
from tests.products import in_pairs, in_turn

LISTS = ("abcd", (1, 2, 3), (True, False), "xy")


def test_in_pairs_covers_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ALL_CASES", False)
    found = in_pairs(*LISTS)
    assert len(found) == len(set(found)) < 4 * 3 * 2 * 2 / 3
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in found} == set(itertools.product(LISTS[a], LISTS[b]))


def test_in_turn_takes_every_case_and_every_setting_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ALL_CASES", False)
    found = in_turn(range(12), "ab", (1, 2, 3), each=2)
    assert len(found) == len(set(found)) == 24
    assert [case for case, *_ in found] == [case for case in range(12) for _ in range(2)]
    settings = [tuple(rest) for _, *rest in found]
    assert {settings.count(setting) for setting in set(settings)} == {4} and len(set(settings)) == 6


def test_all_cases_are_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ALL_CASES", True)
    assert in_pairs(*LISTS) == list(itertools.product(*LISTS))
    assert in_turn("ab", (1, 2), each=1) == list(itertools.product("ab", (1, 2)))

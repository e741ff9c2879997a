"""How rows become parts: what is held out does not depend on the number of training rows."""

from __future__ import annotations

import numpy as np
import pytest

from hf_bilb.data.splits import PARTS, Split, draw_rows, held_out_count, hold_out, split_rows
from hf_bilb.errors import OptionError


def test_pieces_are_cut_from_one_shuffled_order() -> None:
    order = np.random.default_rng([3, 1]).permutation(10)
    first, second, rest = draw_rows(10, [3, 1], 2, 3, None)
    np.testing.assert_array_equal(np.concatenate([first, second, rest]), order)
    assert [len(piece) for piece in (first, second, rest)] == [2, 3, 5]
    assert [len(piece) for piece in draw_rows(4, 0, 3, 9, None)] == [3, 1, 0]  # what is left, and no more


@pytest.mark.parametrize("num_train", [None, 1, 4])
def test_what_is_held_out_stays_and_fewer_training_rows_are_the_first_of_them(num_train: int | None) -> None:
    whole, some = split_rows(12, 5, None, 3, 2), split_rows(12, 5, num_train, 3, 2)
    np.testing.assert_array_equal(whole.test, some.test)
    np.testing.assert_array_equal(whole.validation, some.validation)
    np.testing.assert_array_equal(whole.train[:num_train], some.train)
    assert sorted(np.concatenate(list(whole)).tolist()) == list(range(12))


def test_a_split_has_its_parts_in_the_order_of_their_names() -> None:
    split = split_rows(12, 5, None, 3, 2)
    assert [getattr(split, part) is rows for part, rows in zip(PARTS, split, strict=True)] == [True] * 3
    assert isinstance(split, Split)


def test_parts_of_a_share_each() -> None:
    train, test, validation = hold_out(20, 1, 0.1, num_train=5, num_parts=2)
    assert (len(train), len(test), len(validation)) == (5, 2, 2)
    assert len({*train.tolist(), *test.tolist(), *validation.tolist()}) == 9
    (everything,) = hold_out(20, 1, 0.1, num_parts=0)
    assert sorted(everything.tolist()) == list(range(20))
    assert [held_out_count(100, share, 7) for share in (0.001, 0.05, 0.5)] == [1, 5, 7]


@pytest.mark.parametrize(("num_rows", "num_parts"), [(1, 1), (2, 2)])
def test_too_few_rows_are_one_line(num_rows: int, num_parts: int) -> None:
    with pytest.raises(OptionError) as error:
        hold_out(num_rows, 0, 0.1, num_parts=num_parts, owner=" of cola")
    assert str(error.value) == f"data.validation_fraction: {num_rows} training rows of cola are too few to split"

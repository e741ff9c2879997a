"""Standardisation of columns by their training rows."""

from __future__ import annotations

import numpy as np
import pytest

from hf_bilb.data.task_data import Standardizer


@pytest.mark.parametrize("value", [0.0, 0.1, 7e19, -1e300])
def test_a_column_that_never_varies_becomes_zero_whatever_its_size(value: float) -> None:
    # The computed mean of 320 numbers of 7e19 is off by 81,920.
    column = np.full((320, 1), value)
    assert (Standardizer.fit(column).standardize(column) == 0).all()


def test_missing_values_have_no_part_in_mean_and_deviation() -> None:
    fitted = Standardizer.fit(np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]]))
    assert fitted.means.tolist() == [2.0, 0.0] and fitted.stds.tolist() == [1.0, 1.0]

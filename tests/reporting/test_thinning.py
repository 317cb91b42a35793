"""Long curves become short ones and keep their ends and peaks."""

import numpy as np
import pytest

from fopd_jax.reporting.reading import Series
from fopd_jax.reporting.thinning import MOST, thin


@pytest.mark.parametrize("count", [MOST + 1, 1234, 100_000])
def test_least_and_largest_values_and_both_ends_stay(count: int):
    values = np.random.default_rng(count).normal(size=count)
    values[count // 3], values[count // 2] = 40.0, -50.0
    found = thin(Series(np.arange(count, dtype=np.float64), values))
    assert len(found.steps) <= MOST
    assert (found.steps[0], found.steps[-1]) == (0, count - 1)
    assert (found.values.max(), found.values.min()) == (40.0, -50.0)
    assert (np.diff(found.steps) > 0).all()
    np.testing.assert_array_equal(found.values, values[found.steps.astype(int)])


def test_short_ones_stay_as_they_are():
    series = Series(np.arange(MOST, dtype=np.float64), np.ones(MOST))
    assert thin(series) is series


def test_values_that_are_no_numbers_hide_no_peak():
    values = np.full(3000, np.nan)
    values[1700] = 3.0
    found = thin(Series(np.arange(3000, dtype=np.float64), values))
    assert np.nanmax(found.values) == 3.0
    assert np.isnan(found.values).sum() > 100

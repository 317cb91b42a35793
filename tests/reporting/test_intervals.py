"""Intervals of means against the normal approximation, and by prompts rather than by images."""

import math

import numpy as np
import pytest

from fopd_jax.reporting.intervals import RESAMPLES, mean_interval


def test_independent_prompts_have_the_interval_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(3.0, 2.0, (400, 1))
    found = mean_interval(values)
    assert found is not None
    assert found.mean == pytest.approx(values.mean())
    assert found.images == 400
    error = values.std() / 20
    of_bounds = 3 * math.sqrt(0.025 * 0.975 / RESAMPLES) / 0.0584 * error  # three standard errors of that quantile
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=of_bounds)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=of_bounds)


def test_more_images_of_a_prompt_are_not_more_prompts():
    one = np.random.default_rng(1).normal(size=(100, 1))
    single, repeated = mean_interval(one), mean_interval(one.repeat(4, axis=1))
    assert single is not None
    assert repeated is not None
    assert repeated.images == 400
    assert repeated[:3] == pytest.approx(single[:3])


def test_missing_scores_are_left_out():
    values = np.asarray([[1.0, np.nan], [np.nan, np.nan], [2.0, 3.0]])
    found = mean_interval(values)
    assert found is not None
    assert (found.mean, found.images) == (2.0, 3)
    assert mean_interval(np.full((3, 2), np.nan)) is None
    one = mean_interval(np.asarray([[1.0, 2.0]]))
    assert one == (1.5, None, None, 2)


def test_equal_scores_have_equal_intervals():
    values = np.random.default_rng(2).normal(size=(50, 2))
    assert mean_interval(values) == mean_interval(values.copy())

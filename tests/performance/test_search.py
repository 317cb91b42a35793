"""The search for the largest batch: right answers in few trials, whatever the line looks like."""

from collections.abc import Callable

import pytest

from fopd_jax.performance.search import Trial, largest_fitting

CAPACITY = 1000


def _search(needed: Callable[[int], int], start: int) -> tuple[int, dict[int, Trial]]:
    return largest_fitting(lambda batch: (needed(batch) <= CAPACITY, needed(batch)), start, CAPACITY)


@pytest.mark.parametrize(("fixed", "each", "largest"), [(200, 100, 8), (200, 40, 20), (0, 334, 2), (900, 3, 33)])
@pytest.mark.parametrize("start", [1, 2])
def test_two_trials_predict_and_a_third_proves(fixed: int, each: int, largest: int, start: int):
    found, trials = _search(lambda batch: fixed + each * batch, start)
    assert found == largest
    assert len(trials) <= 3


@pytest.mark.parametrize("start", [8, 12, 64])
def test_a_start_that_does_not_fit_still_draws_the_line(start: int):
    found, trials = _search(lambda batch: 200 + 100 * batch, start)
    assert found == 8
    assert len(trials) <= 3


def test_a_bent_line_is_predicted_again():
    """Steeper than it began: the first prediction does not fit."""
    found, trials = _search(lambda batch: 100 + 50 * batch + 3 * batch**2, 1)
    assert found == 10
    assert not all(fits for fits, _ in trials.values())
    assert len(trials) <= 5


def test_a_flattening_line_goes_on():
    found, trials = _search(lambda batch: round(200 + 100 * batch**0.9), 1)
    assert found == 10
    assert len(trials) <= 5


def test_nothing_fits():
    found, trials = _search(lambda batch: 2000 + batch, 4)
    assert found == 0
    assert all(not fits for fits, _ in trials.values())


def test_a_single_image_too_many_ends_at_once():
    assert _search(lambda batch: 2000, 1) == (0, {1: (False, 2000)})


def test_a_need_that_does_not_grow_at_first_goes_on():
    """Padding may make two batches cost the same: no line, so the batch is doubled, until there is one."""
    found, trials = _search(lambda batch: 600 if batch < 5 else 200 + 100 * batch, 1)
    assert found == 8
    assert len(trials) <= 6

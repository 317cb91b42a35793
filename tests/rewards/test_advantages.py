"""Advantages within a program against `combine` on the same scores, of groups with failures, lonely and equal samples.

Of values up to a hundred times their spread, 1e-5: float32 keeps seven digits of them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.rewards.advantages import TracedAdvantages, advantages
from fopd_jax.rewards.combine import combine
from fopd_jax.rewards.reward import Scores

MODES = ["global", "group", "each"]
COUNT, GROUPS = 48, 20
TOLERANCE = 1e-5


@functools.cache
def program(normalise: Any, clip: float) -> Any:
    return jax.jit(functools.partial(advantages, count=GROUPS, normalise=normalise, clip=clip))


def scores(values: np.ndarray) -> Scores:
    failed = np.isnan(values)
    return Scores(values.astype(float), failed, tuple({"error": "x"} if bad else {} for bad in failed))


def random_problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and weights of three rewards in float32, and groups: of different sizes, some without a sample."""
    rng = np.random.default_rng(seed)
    values = rng.normal(3, 10.0 ** rng.integers(-1, 3, (3, 1)), (3, COUNT))
    values = np.where(rng.random((3, 1)) < 0.4, rng.integers(0, 2, (3, COUNT)), values)
    values[rng.random((3, COUNT)) < rng.choice([0, 0.1, 0.5])] = np.nan
    groups = rng.integers(0, rng.integers(1, GROUPS), COUNT)
    weights = np.broadcast_to(rng.choice([1.0, 0.3, -2.0], (3, 1)), (3, COUNT))
    if seed % 2:  # a task of each half of the groups, with rewards of its own
        weights = np.where(groups % 2 == 0, weights, rng.choice([0.0, 1.0, 0.5], (3, 1)))
    return values.astype(np.float32), weights.astype(np.float32), groups


def both(values: np.ndarray, weights: np.ndarray, groups: np.ndarray, normalise: Any, clip: float = 5.0) -> Any:
    names = [str(row) for row in range(len(values))]
    expected = combine(
        dict(zip(names, map(scores, values), strict=True)),
        dict(zip(names, weights.astype(float), strict=True)),
        groups, normalise, clip,
    )  # fmt: skip
    found = program(normalise, clip)(*map(jnp.asarray, (values, weights, groups)))
    return TracedAdvantages(*map(np.asarray, found)), expected


@pytest.mark.parametrize("normalise", MODES)
def test_advantages_are_those_of_the_host(normalise: Any):
    dropped = flat = 0
    for seed in range(80):
        values, weights, groups = random_problem(seed)
        if not weights.any():
            continue
        found, expected = both(values, weights, groups, normalise, (5.0, 1.0)[seed % 3 == 0])
        np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=TOLERANCE, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(found.valid, expected.valid)
        np.testing.assert_array_equal(found.flat, expected.flat)
        assert (found.dropped, found.flat_share) == (expected.dropped, pytest.approx(expected.flat_share))
        assert not found.values[~found.valid | found.flat].any()
        dropped, flat = dropped + expected.dropped, flat + expected.flat.sum()
    assert min(dropped, flat) > 20


@pytest.mark.parametrize("normalise", MODES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9, -7.7e-12])
def test_groups_of_equal_values_are_marked_and_exactly_zero(normalise: Any, value: float):
    """Rounding of the mean must not become an advantage."""
    values = np.array([[value] * 37 + [1.0, 2.0, 4.0] * 3 + [np.nan] * 2], np.float32)
    groups = np.repeat([4, 2, 0], [37, 9, 2])
    found, expected = both(
        np.concatenate([values, 3 * values]), np.full((2, COUNT), 0.7, np.float32), groups, normalise
    )
    assert not found.values[:37].any()
    assert found.values[37:46].all()
    np.testing.assert_array_equal(found.flat, expected.flat)
    assert found.flat_share == 0.5
    assert found.valid.tolist() == [True] * 46 + [False] * 2


def test_of_nothing_valid_nothing_is_left():
    found = program("global", 5.0)(jnp.full((1, COUNT), jnp.nan), jnp.ones(1), jnp.zeros(COUNT, jnp.int32))
    assert not any(np.asarray(each).any() for each in (found.values, found.valid, found.flat))
    assert (int(found.dropped), float(found.flat_share)) == (1, 0.0)


def test_a_sample_in_no_group_counts_nowhere():
    values, weights, groups = random_problem(4)
    weights = weights[:, 0]
    kept = groups % 3 != 0
    alone = program("global", 5.0)(*map(jnp.asarray, (values, weights, np.where(kept, groups, -1))))
    failed = program("global", 5.0)(*map(jnp.asarray, (np.where(kept, values, np.nan), weights, groups)))
    np.testing.assert_array_equal(alone.values, failed.values)
    np.testing.assert_array_equal(alone.valid, failed.valid)
    assert int(alone.dropped) < int(failed.dropped)  # those groups are not there at all

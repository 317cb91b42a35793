"""What a survey says of teachers, on velocities whose answers are known in closed form."""

import numpy as np
import pytest

from fopd_jax.config.teaching import STATISTICS, Health
from fopd_jax.evaluation.fixed_states import Survey
from fopd_jax.evaluation.teacher_health import disagreement, matrix, outside, statistics

DIM = 4000


def survey_of(v: np.ndarray, base: np.ndarray, moved: np.ndarray, base_moved: np.ndarray) -> Survey:
    """Of velocities `[L, B, V, D]`; the base's `[L, B, D]`."""
    updates = v - base[:, :, None]
    square = lambda x: np.square(x).mean(-1)  # noqa: E731
    voices = np.ones(v.shape[2])
    return Survey(
        between=square(v[:, :, :, None] - v[:, :, None]),
        updates=np.einsum("l b i d, l b j d -> l b i j", updates, updates) / v.shape[-1],
        base=square(base)[..., None] * voices,
        moved=square(moved),
        base_moved=square(base_moved)[..., None] * voices,
    )


@pytest.fixture
def seen() -> Survey:
    """Voice 0 and 1 go one way, 2 goes another, twice as far and twice as rough; the base is of length 10."""
    a, b, base = np.eye(3, DIM) * np.sqrt(DIM)
    velocities = 10 * base + np.stack([a, 3 * a, 6 * b])
    v = np.broadcast_to(velocities, (2, 3, 3, DIM))
    moved = np.broadcast_to(np.stack([a, a, 2 * a]), v.shape)
    return survey_of(v, np.broadcast_to(10 * base, (2, 3, DIM)), moved, np.broadcast_to(a, (2, 3, DIM)))


EVERY = np.ones((2, 3), bool)


def test_statistics_are_ratios_of_norms(seen: Survey) -> None:
    found = statistics(seen, EVERY, anchor=1)
    assert found.keys() == set(STATISTICS)
    np.testing.assert_allclose(found["size"], [0.1, 0.3, 0.6], rtol=1e-12)
    np.testing.assert_allclose(found["spread"], [1, 1, 2], rtol=1e-12)
    np.testing.assert_allclose(found["apart"], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(found["anchor"], [0.2, np.nan, np.sqrt(0.45)], rtol=1e-12)


def test_only_states_that_are_there_count(seen: Survey) -> None:
    one = np.zeros((2, 3), bool)
    one[1, 2] = True
    seen.base[0] *= 100
    np.testing.assert_allclose(statistics(seen, one, None)["size"], [0.1, 0.3, 0.6], rtol=1e-12)
    np.testing.assert_allclose(matrix(seen, one)[0], [0, 4, 37, 1], rtol=1e-12)


def test_a_teacher_alone_or_one_that_is_the_base_has_no_direction() -> None:
    base = np.ones((1, 1, DIM))
    alone = survey_of(2 * base[:, :, None], base, base[:, :, None], base)
    assert "apart" not in statistics(alone, np.ones((1, 1), bool), None)
    two = np.stack([base, 2 * base], axis=2)
    found = statistics(survey_of(two, base, two, base), np.ones((1, 1), bool), None)
    assert np.isnan(found["apart"]).all()
    np.testing.assert_allclose(found["size"], [0, 1])


def test_every_two_disagree_once_and_each_with_the_base(seen: Survey) -> None:
    found = disagreement(seen, EVERY, ("x", "y", "z"))
    expected = {"x/y": 4, "x/z": 37, "x/base": 1, "y/z": 45, "y/base": 9, "z/base": 36}
    assert found == pytest.approx({f"disagreement/{name}": value for name, value in expected.items()})
    np.testing.assert_allclose(matrix(seen, EVERY), matrix(seen, EVERY).T)


def test_leaving_a_band_is_told_and_what_is_not_known_leaves_none() -> None:
    bands = Health().bands
    assert outside({"size": 0.4, "anchor": 0.3, "apart": 0.2, "spread": 1.0}, bands) == {}
    assert outside({"size": float("nan")}, bands) == {}
    assert outside({"size": 0.7, "apart": 0.35}, bands) == {"size": "size 0.70, expected 0 to 0.6"}
    assert outside({"spread": 0.4}, bands) == {"spread": "spread 0.40, expected 0.5 to 2"}
    assert outside({"size": 9.0}, {}) == {}

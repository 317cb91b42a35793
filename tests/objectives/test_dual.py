"""A weight that learns: the sequence of it in closed form, its limits, and a bound that a convex problem keeps to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.objectives.dual import dual_ascent

LIMITS = (1e-3, 20.0)


def path(gaps: list[float], bound: float, rate: float, beta: float) -> np.ndarray:
    def move(beta: jax.Array, gap: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = dual_ascent(beta, gap, bound, rate, LIMITS)
        return moved, moved

    return np.asarray(jax.lax.scan(move, jnp.float32(beta), jnp.asarray(gaps, jnp.float32))[1])


def test_the_weight_is_the_exponential_of_the_summed_excess() -> None:
    gaps = [0.4, 0.1, 0.2, 0.3, 0.0, 0.25]
    excess = np.cumsum(np.array(gaps) / 0.2 - 1)
    np.testing.assert_allclose(path(gaps, 0.2, 0.3, 0.5), 0.5 * np.exp(0.3 * excess), rtol=1e-5)


def test_it_stays_within_its_limits_and_comes_back_from_them() -> None:
    found = path([1e30, 1e30, 0.0, 0.0], 1e-3, 2.0, 0.5)  # e^(2e33) is not finite
    np.testing.assert_allclose(found, [20, 20, 20 * np.exp(-2), 20 * np.exp(-4)], rtol=1e-5)
    low = path([0.0] * 20 + [2e-3] * 3, 1e-3, 2.0, 0.5)
    np.testing.assert_allclose(low[-4:], [1e-3, *(1e-3 * np.exp([2, 4, 6]))], rtol=1e-5)
    assert path([0.2], 0.2, 0.3, 0.5)[0] == np.float32(0.5)


@pytest.mark.parametrize("start", [0.01, 4.0, 20.0])
def test_a_convex_problem_keeps_to_its_bound(start: float) -> None:
    """min ‖x - a‖² under ‖x - b‖² <= bound: at the optimum x lies on the sphere, and β = ‖a - b‖/√bound - 1."""
    a, b, bound = jnp.array([1.0, -2.0, 2.0]), jnp.zeros(3), 0.5

    def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        x, beta = carry
        gap = jnp.square(x - b).sum()
        x = x - 0.02 * (2 * (x - a) + beta * 2 * (x - b))
        return (x, dual_ascent(beta, gap, bound, 0.05, LIMITS)), gap

    (x, beta), gaps = jax.lax.scan(step, (a, jnp.float32(start)), None, 600)
    assert np.abs(gaps[-100:] / bound - 1).max() < 0.1
    assert float(beta) == pytest.approx(3 / bound**0.5 - 1, rel=0.05)
    np.testing.assert_allclose(x, a * bound**0.5 / 3, rtol=0.05)

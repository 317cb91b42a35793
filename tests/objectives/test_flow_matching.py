"""Flow matching: closed forms at 1e-6 in float32, gradients in float64, the noise levels' distribution at 1e-6."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import special, stats

from fopd_jax.config.schema import LogitNormal
from fopd_jax.objectives.flow_matching import flow_matching, interpolate, sample_levels, velocity_matching

SHAPE = (3, 4, 5, 2)
DRAWS, SIGNIFICANCE = 200_000, 1e-6


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_interpolate_is_straight_with_one_time_per_sample() -> None:
    x0, noise, sigma = normal(0), normal(1), np.float32([0.0, 0.3, 1.0])
    found = interpolate(jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(sigma))
    expected = [(1 - t) * a + t * b for a, b, t in zip(np.float64(x0), np.float64(noise), sigma, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[0], x0[0])
    np.testing.assert_array_equal(found[2], noise[2])


def test_the_loss_is_the_mean_square_error_of_each_sample() -> None:
    v, x0, noise = (jnp.asarray(normal(seed)) for seed in range(3))
    found = flow_matching(v, x0, noise)
    expected = np.mean((np.float64(v) - (np.float64(noise) - np.float64(x0))) ** 2, axis=(1, 2, 3))
    assert found.shape == (3,)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_target_is_the_slope_of_the_path() -> None:
    """v = d x_t / dt has no loss: conventions of sign and direction agree between path and target."""
    x0, noise = jnp.asarray(normal(0)), jnp.asarray(normal(1))
    _, slope = jax.jvp(lambda t: interpolate(x0, noise, t), (jnp.full(3, 0.4),), (jnp.ones(3),))
    np.testing.assert_allclose(flow_matching(slope, x0, noise), 0, atol=1e-12)
    assert (np.asarray(flow_matching(-slope, x0, noise)) > 1).all()


def test_gradient_by_finite_differences() -> None:
    """In float64: central differences of step 1e-5 against automatic ones and the closed form, at 1e-8 relative."""
    with jax.enable_x64(True):
        v, x0, noise, direction = (jnp.asarray(np.float64(normal(seed))) for seed in range(4))

        def loss(v: jax.Array) -> jax.Array:
            return flow_matching(v, x0, noise).mean()

        gradient = np.asarray(jax.grad(loss)(v))
        numeric = float(loss(v + 1e-5 * direction) - loss(v - 1e-5 * direction)) / 2e-5
        assert float((gradient * np.asarray(direction)).sum()) == pytest.approx(numeric, rel=1e-8)
        np.testing.assert_allclose(gradient, 2 * (v - (noise - x0)) / v.size, rtol=1e-12, atol=1e-15)


def test_one_samples_loss_moves_with_that_sample_alone() -> None:
    v, x0, noise = (jnp.asarray(normal(seed)) for seed in range(3))
    jacobian = np.asarray(jax.jacrev(flow_matching)(v, x0, noise))  # [B, B, h, w, c]
    crosses = ~np.eye(3, dtype=bool)
    assert not jacobian[crosses].any()
    assert jacobian[~crosses].any(axis=(1, 2, 3)).all()


def draws(levels: LogitNormal) -> np.ndarray:
    return np.float64(sample_levels(levels, jax.random.key(3), DRAWS))


def ks_p_value(sigma: np.ndarray, mean: float, std: float, shift: float) -> float:
    """Kolmogorov-Smirnov: a shift adds its logarithm to the logit of the level."""
    return float(stats.kstest(special.logit(sigma), stats.norm(mean + np.log(shift), std).cdf).pvalue)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 3.0), (0.0, 1.0, 1.0), (-0.5, 0.8, 2.0)])
def test_levels_are_logit_normal_and_shifted(mean: float, std: float, shift: float) -> None:
    sigma = draws(LogitNormal(mean, std, shift))
    assert sigma.min() > 0
    assert sigma.max() < 1
    p = ks_p_value(sigma, mean, std, shift)
    others = [ks_p_value(sigma, *law) for law in ((mean + 0.05, std, shift), (mean, 1.05 * std, shift))]
    print(f"p {p:.3f}; of a mean off by .05, of a std off by 5 %: {others}")
    assert p > SIGNIFICANCE
    assert max(others) < SIGNIFICANCE
    assert ks_p_value(sigma, mean, std, 1 / shift if shift != 1 else 3.0) < SIGNIFICANCE  # the other direction


@pytest.mark.parametrize("quantile", [0.05, 0.25, 0.5, 0.75, 0.95])
def test_quantiles(quantile: float) -> None:
    """By the formula as the docstring has it; the share of draws below is binomial."""
    s = special.expit(stats.norm.ppf(quantile))
    level = 3 * s / (1 + 2 * s)
    below = int((draws(LogitNormal()) < level).sum())
    assert stats.binomtest(below, DRAWS, quantile).pvalue > SIGNIFICANCE


def test_levels_depend_on_the_key_alone() -> None:
    levels = LogitNormal()
    a, b = sample_levels(levels, jax.random.key(0), 8), sample_levels(levels, jax.random.key(0), 8)
    np.testing.assert_array_equal(a, b)
    assert a.shape == (8,)
    assert a.dtype == jnp.float32
    assert (np.asarray(a) != np.asarray(sample_levels(levels, jax.random.key(1), 8))).all()


def test_velocity_matching_and_its_gradient_are_those_of_pytorch() -> None:
    x, expected, weight = (
        normal(0).astype(np.float64),
        normal(1).astype(np.float64),
        np.float64([[1.5, -0.5], [0.25, 2]]),
    )

    def mean(weight: jax.Array) -> jax.Array:
        return velocity_matching(jnp.asarray(x) @ weight, jnp.asarray(expected)).mean()

    theirs = torch.tensor(weight, requires_grad=True)
    loss = torch.nn.functional.mse_loss(torch.tensor(x) @ theirs, torch.tensor(expected))
    loss.backward()
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(mean)(jnp.asarray(weight))
        each = velocity_matching(jnp.asarray(x), jnp.asarray(expected))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-12)
    np.testing.assert_allclose(each, np.square(x - expected).mean((1, 2, 3)), rtol=1e-12)

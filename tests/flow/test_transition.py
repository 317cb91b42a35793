"""Transitions against formulas derived again in numpy, and the SDE sampler by its orders of convergence.

float32 results are compared with float64 ones at 2e-6 absolute (states of size 1 to 4, a few roundings); float64 ones
at 1e-12. Convergence runs in float64 on Gaussian data, where the velocity is linear and every marginal is known.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import CPS, ODE, SDE, Transition, make_transition, standard_normal, transition_step

SIGMAS = flow_match_sigmas(10)
STEPS = list(itertools.pairwise(SIGMAS))
FLOAT32_ATOL = 2e-6


def random_state(seed, shape=(3, 4, 4, 2)):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def moments(transition, x, v, sigma, sigma_next):
    mean, std = transition.moments(jnp.asarray(x), jnp.asarray(v), jnp.asarray(sigma), jnp.asarray(sigma_next))
    return np.asarray(mean), np.asarray(std)


def in_float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


# Closed forms


def sde_by_its_score(x, v, sigma, sigma_next, a):
    """Euler-Maruyama on `dx = [-v + s²/2·score]·dτ + s·dW`, τ = -sigma, with the score of the flow's marginal.

    score = -(x - (1 - sigma)·x0)/sigma² where x0 = x - sigma·v is the predicted data.
    """
    x, v, sigma, sigma_next = in_float64(x, v, sigma, sigma_next)
    tau = sigma - sigma_next
    diffusion = a * np.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
    score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    return x + tau * (-v + diffusion**2 / 2 * score), diffusion * np.sqrt(tau)


def cps_by_its_parts(x, v, sigma, sigma_next, a):
    x, v, sigma, sigma_next = in_float64(x, v, sigma, sigma_next)
    std = sigma_next * np.sin(a * np.pi / 2)
    data, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * data + np.sqrt(sigma_next**2 - std**2) * noise, std


@pytest.mark.parametrize("a", [0.1, 0.7, 1.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
@pytest.mark.parametrize(("transition", "expected"), [(SDE, sde_by_its_score), (CPS, cps_by_its_parts)])
def test_moments_match_the_formula(transition, expected, sigma, sigma_next, a):
    x, v = random_state(0)
    mean, std = moments(transition(a), x, v, sigma, sigma_next)
    expected_mean, expected_std = expected(x, v, sigma, sigma_next, a)
    assert mean.dtype == std.dtype == np.float32
    assert std.shape == ()
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=FLOAT32_ATOL)
    np.testing.assert_allclose(std, expected_std, rtol=1e-6)


@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_the_ode_step_is_euler_without_noise(sigma, sigma_next):
    x, v = random_state(1)
    mean, std = moments(ODE(), x, v, sigma, sigma_next)
    x64, v64, sigma64, next64 = in_float64(x, v, sigma, sigma_next)
    np.testing.assert_allclose(mean, x64 + v64 * (next64 - sigma64), rtol=0, atol=FLOAT32_ATOL)
    assert std == 0


@pytest.mark.parametrize("num_steps", [1, 4, 10, 40])
def test_the_first_sde_step_from_pure_noise_has_the_noise_level_as_its_std(num_steps):
    sigma, sigma_next = flow_match_sigmas(num_steps)[:2]
    _, std = moments(SDE(0.7), *random_state(2), sigma, sigma_next)
    np.testing.assert_allclose(std, 0.7, rtol=1e-6)


def test_cps_std_before_the_last_step_is_tiny():
    _, std = moments(CPS(0.7), *random_state(3), *STEPS[8])
    np.testing.assert_allclose(std, 0.00796, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_cps_keeps_the_marginal_when_the_velocity_is_exact(sigma, sigma_next):
    """Given the data x0, the next state is N((1 - sigma')·x0, sigma'²): what the noise loses, fresh noise replaces."""
    data, noise = random_state(4)
    mean, std = moments(CPS(0.7), (1 - sigma) * data + sigma * noise, noise - data, sigma, sigma_next)
    kept = np.sqrt(np.float64(sigma_next) ** 2 - np.float64(std) ** 2)
    np.testing.assert_allclose(mean, (1 - sigma_next) * data + kept * noise, rtol=0, atol=FLOAT32_ATOL)


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7), ODE()])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_the_velocity_coefficient_is_the_slope_of_the_mean(transition, sigma, sigma_next):
    sigma, sigma_next = jnp.asarray(sigma), jnp.asarray(sigma_next)
    x = jnp.ones((1, 1))
    slope = jax.grad(lambda v: transition.moments(x, v, sigma, sigma_next)[0].sum())(jnp.zeros((1, 1)))
    coefficient = transition.velocity_coefficient(sigma, sigma_next)
    assert coefficient.shape == ()
    np.testing.assert_allclose(coefficient, slope[0, 0], rtol=1e-6)


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7), ODE()])
def test_half_precision_input_is_computed_in_float32(transition):
    x, v = (jnp.asarray(array, jnp.bfloat16) for array in random_state(5))
    sigma, sigma_next = map(jnp.asarray, STEPS[3])
    mean, std = transition.moments(x, v, sigma, sigma_next)
    expected, _ = transition.moments(x.astype(jnp.float32), v.astype(jnp.float32), sigma, sigma_next)
    assert mean.dtype == std.dtype == jnp.float32
    np.testing.assert_array_equal(mean, expected)


def test_float64_input_is_computed_in_float64():
    with jax.enable_x64(True):
        x, v = in_float64(*random_state(6))
        sigma, sigma_next = in_float64(*STEPS[3])
        mean, std = moments(SDE(0.7), x, v, sigma, sigma_next)
        expected_mean, expected_std = sde_by_its_score(x, v, sigma, sigma_next, 0.7)
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(std, expected_std, rtol=1e-12)


# Densities


def test_the_sde_log_prob_is_the_mean_gaussian_log_density():
    x_next, mean = random_state(7)
    found = SDE().log_prob(jnp.asarray(x_next), jnp.asarray(mean), jnp.float32(0.3))
    expected = stats.norm(mean.astype(np.float64), 0.3).logpdf(x_next).mean(axis=(1, 2, 3))
    assert found.shape == (3,)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_cps_log_prob_is_the_mean_negative_square():
    x_next, mean = random_state(8)
    found = CPS().log_prob(jnp.asarray(x_next), jnp.asarray(mean), jnp.float32(0.3))
    expected = -np.mean((x_next.astype(np.float64) - mean) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_ode_has_no_density():
    assert not ODE().has_density
    assert SDE().has_density
    assert CPS().has_density
    with pytest.raises(TypeError, match="ODE step has no density"):
        ODE().log_prob(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.float32(0))


@pytest.mark.parametrize("transition", [SDE(), CPS()])
def test_log_prob_and_its_gradients_are_zero_where_there_is_no_noise(transition):
    x_next, mean = map(jnp.asarray, random_state(9))

    def total(x_next, mean, std):
        return transition.log_prob(x_next, mean, std).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(x_next, mean, jnp.float32(0))
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("transition", [SDE, CPS])
def test_gradients_are_finite_in_a_noise_level_of_zero(transition):
    x, v = map(jnp.asarray, random_state(10))
    sigma, sigma_next = map(jnp.asarray, STEPS[4])

    def total(noise_level, v):
        mean, std = transition(noise_level).moments(x, v, sigma, sigma_next)
        return transition(noise_level).log_prob(x, mean, std).sum() + mean.sum()

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.float32(0), v):
        assert np.all(np.isfinite(gradient))


# One step


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7)])
def test_a_step_draws_its_state_from_the_moments(transition):
    x, v = map(jnp.asarray, random_state(11))
    sigma, sigma_next = map(jnp.asarray, STEPS[4])
    keys = jax.random.split(jax.random.key(3), 3)
    x_next, log_prob = transition_step(transition, x, v, sigma, sigma_next, keys)
    mean, std = transition.moments(x, v, sigma, sigma_next)
    noise = np.stack([jax.random.normal(key, x.shape[1:]) for key in keys])
    np.testing.assert_allclose(x_next, mean + std * noise, rtol=0, atol=FLOAT32_ATOL)
    np.testing.assert_allclose(log_prob, transition.log_prob(x_next, mean, std), rtol=1e-6)


def test_the_drawn_state_is_a_constant_and_the_score_flows_through_the_mean():
    x, v = map(jnp.asarray, random_state(12))
    sigma, sigma_next = map(jnp.asarray, STEPS[4])
    keys = jax.random.split(jax.random.key(4), 3)

    def draw(v):
        return transition_step(SDE(0.7), x, v, sigma, sigma_next, keys)

    through_state = jax.grad(lambda v: draw(v)[0].sum())(v)
    score = jax.grad(lambda v: draw(v)[1].sum())(v)
    mean, std = SDE(0.7).moments(x, v, sigma, sigma_next)
    coefficient = SDE(0.7).velocity_coefficient(sigma, sigma_next)
    expected = coefficient * (draw(v)[0] - mean) / std**2 / x[0].size
    np.testing.assert_array_equal(through_state, np.zeros_like(v))
    np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-7)


def test_noise_of_a_sample_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(5), 4)
    together = standard_normal(keys, (4, 2))
    np.testing.assert_array_equal(together[2:3], standard_normal(keys[2:3], (4, 2)))
    assert together.dtype == jnp.float32
    many = standard_normal(jax.random.split(jax.random.key(6), 100), (1000,))
    np.testing.assert_allclose([many.mean(), many.std()], [0, 1], atol=0.015)  # 1e5 draws: 5 standard errors


# Windows and names


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7), SDE(0.0), CPS(0.0)])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_without_noise_every_transition_is_exactly_the_ode_step(transition, sigma, sigma_next):
    x, v = random_state(13)
    mean, std = moments(transition.windowed(False), x, v, sigma, sigma_next)
    expected, _ = moments(ODE(), x, v, sigma, sigma_next)
    assert std == 0
    np.testing.assert_array_equal(mean, expected)


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7), ODE()])
def test_inside_the_window_a_transition_is_unchanged(transition):
    x, v = random_state(14)
    windowed = jax.jit(lambda noisy: transition.windowed(noisy))(jnp.bool_(True))
    for found, expected in zip(moments(windowed, x, v, *STEPS[4]), moments(transition, x, v, *STEPS[4]), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("name", "kind"), [("sde", SDE), ("cps", CPS), ("ode", ODE)])
def test_transitions_are_made_by_name(name, kind):
    transition = make_transition(name, 0.5)
    assert isinstance(transition, kind)
    assert isinstance(transition, Transition)
    assert jax.tree.leaves(transition) == ([] if name == "ode" else [0.5])


def test_an_unknown_transition_is_refused_with_the_names():
    with pytest.raises(ValueError, match=r"transition: found 'ddim', expected one of sde, cps, ode"):
        make_transition("ddim")


@pytest.mark.parametrize(("name", "noise_level"), [("sde", -0.1), ("sde", np.inf), ("cps", -0.1), ("cps", 1.1)])
def test_a_noise_level_out_of_range_is_refused(name, noise_level):
    with pytest.raises(ValueError, match=r"noise_level: found .*, expected a .*number"):
        make_transition(name, noise_level)


# Convergence on data N(MEAN, SPREAD²), from HIGH down to LOW, both inside (0, 1)

A, MEAN, SPREAD, HIGH, LOW = 0.7, 1.5, 0.6, 0.9, 0.1


def marginal_variance(sigma):
    return (1 - sigma) ** 2 * SPREAD**2 + sigma**2


def slope_of_velocity(sigma):
    """d/dx E[noise - data | x_sigma = x]."""
    return (sigma - (1 - sigma) * SPREAD**2) / marginal_variance(sigma)


def velocity(x, sigma):
    return slope_of_velocity(sigma) * (x - (1 - sigma) * MEAN) - MEAN


def run(transition, sigmas, x, increments):
    """The sampler driven by given Brownian increments `[T, B]` (variance |dt|); the final state `[B]`."""

    def step(x, inputs):
        sigma, sigma_next, increment = inputs
        mean, std = transition.moments(x, velocity(x, sigma), sigma, sigma_next)
        return transition.sample(mean, std, increment / jnp.sqrt(sigma - sigma_next)), None

    return jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:], increments))[0]


def propagate(transition, sigmas, mean, variance):
    """Mean and variance after the sampler, without sampling error: a step is affine in x, so two states tell it all."""

    def step(carry, levels):
        mean, variance = carry
        probe = jnp.array([0.0, 1.0])
        image, std = transition.moments(probe, velocity(probe, levels[0]), levels[0], levels[1])
        gain = image[1] - image[0]
        return (gain * mean + image[0], gain**2 * variance + std**2), None

    start = (jnp.asarray(mean, float), jnp.asarray(variance, float))
    (mean, variance), _ = jax.lax.scan(step, start, (sigmas[:-1], sigmas[1:]))
    return float(mean), float(variance)


def grid(num_steps, high=HIGH, low=LOW):
    return jnp.linspace(high, low, num_steps + 1)


def order(counts, errors):
    """Least-squares slope of log error over log step size."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("float64")
def test_the_sde_sampler_converges_strongly_with_order_one():
    """Order 1 and not 1/2, since the noise is additive; by RMS distance to fine paths of the same Brownian motion."""
    finest, paths = 8192, 400
    rng = np.random.default_rng(0)
    fine = jnp.asarray(rng.standard_normal((finest, paths)) * np.sqrt((HIGH - LOW) / finest))
    start = (1 - HIGH) * MEAN + np.sqrt(marginal_variance(HIGH)) * jnp.asarray(rng.standard_normal(paths))
    reference = run(SDE(A), grid(finest), start, fine)
    counts, errors = [16, 32, 64, 128, 256], []
    for count in counts:
        final = run(SDE(A), grid(count), start, fine.reshape(count, -1, paths).sum(axis=1))
        errors.append(float(jnp.sqrt(jnp.mean((final - reference) ** 2))))
    assert 0.9 < order(counts, errors) < 1.1


def exact_mean_from(point):
    """E[x_LOW] of the SDE started at `point`: its linear drift, integrated; the marginal's own mean is a solution."""

    def rate(sigma):
        slope = slope_of_velocity(sigma)
        return slope + A**2 / (2 * (1 - sigma)) * (1 + (1 - sigma) * slope)

    exponent, _ = integrate.quad(rate, HIGH, LOW)
    return (1 - LOW) * MEAN + np.exp(exponent) * (point - (1 - HIGH) * MEAN)


@pytest.mark.usefixtures("float64")
def test_the_sde_sampler_converges_weakly_with_order_one():
    """Errors of mean (from a point off the marginal) and variance (from the marginal), free of sampling error."""
    counts = [32, 64, 128, 256, 512]
    means = [propagate(SDE(A), grid(count), 3.0, 0.0)[0] for count in counts]
    start = (1 - HIGH) * MEAN, marginal_variance(HIGH)
    variances = [propagate(SDE(A), grid(count), *start)[1] for count in counts]
    mean_order = order(counts, np.abs(np.array(means) - exact_mean_from(3.0)))
    variance_order = order(counts, np.abs(np.array(variances) - marginal_variance(LOW)))
    assert 0.9 < mean_order < 1.1
    assert 0.9 < variance_order < 1.1


@pytest.mark.usefixtures("float64")
def test_sde_and_ode_share_their_marginals_in_the_limit():
    """Extrapolated to step size 0 (2·f(2N) - f(N), with an error of order N^-2), at 1e-5 absolute."""
    start = (1 - HIGH) * MEAN, marginal_variance(HIGH)
    for transition in (SDE(A), SDE(1.0), ODE()):
        coarse, fine = (np.array(propagate(transition, grid(count), *start)) for count in (2048, 4096))
        np.testing.assert_allclose(2 * fine - coarse, [(1 - LOW) * MEAN, marginal_variance(LOW)], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_the_ode_sampler_converges_with_order_one():
    start = (1 - HIGH) * MEAN + np.sqrt(marginal_variance(HIGH)) * jnp.linspace(-3, 3, 61)
    stretch = np.sqrt(marginal_variance(LOW) / marginal_variance(HIGH))
    exact = (1 - LOW) * MEAN + stretch * (start - (1 - HIGH) * MEAN)
    counts = [16, 32, 64, 128, 256]
    finals = [run(ODE(), grid(count), start, jnp.zeros((count, 61))) for count in counts]
    errors = [float(jnp.sqrt(jnp.mean((final - exact) ** 2))) for final in finals]
    assert 0.9 < order(counts, errors) < 1.1


@pytest.mark.usefixtures("float64")
def test_from_pure_noise_the_sde_carries_extra_variance_that_refinement_removes_slowly():
    """The clamped first step leaves 1 + a⁴/4 times the variance however small it is, and its like follow.

    Near sigma = 1 a step's size relative to 1 - sigma does not shrink with the number of steps. At a fixed level below,
    what they leave decays as N^(-a²).
    """
    counts = [2048, 4096, 8192, 16384]
    _, first = propagate(SDE(A), grid(counts[-1], 1.0, 0.0)[:2], 0.0, 1.0)
    excess = [propagate(SDE(A), grid(count, 1.0, 0.5), 0.0, 1.0)[1] / marginal_variance(0.5) - 1 for count in counts]
    np.testing.assert_allclose(first, 1 + A**4 / 4, rtol=1e-3)
    assert A**2 - 0.02 < order(counts, excess) < A**2 + 0.02


def test_tree_structures_tell_transitions_apart():
    """Else a function jitted over a transition may run another one's program (see `_name`)."""
    structures = [jax.tree.structure(transition) for transition in (SDE(0.7), CPS(0.7), ODE())]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7), ODE()])
def test_noise_levels_may_be_pythons_numbers(transition):
    x, v = jnp.asarray([[0.5], [2.0]]), jnp.asarray([[1.0], [-1.0]])
    levels = jnp.float32(0.5), jnp.float32(0.25)
    for found, expected in zip(transition.moments(x, v, 0.5, 0.25), transition.moments(x, v, *levels), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    assert float(transition.velocity_coefficient(0.5, 0.25)) == float(transition.velocity_coefficient(*levels))

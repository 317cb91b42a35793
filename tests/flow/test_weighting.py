"""Weightings against numerically integrated divergences and the published shares. float32 at 1e-5 relative."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from fopd_jax.config.teaching import WEIGHTINGS
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import CPS, ODE, SDE
from fopd_jax.flow.weighting import LEAST_NOISE, check_weighting, weight

SIGMAS = flow_match_sigmas(10)
STEPS = list(itertools.pairwise(SIGMAS))
TRAINED = STEPS[:-1]  # the last step is sampled, not trained

SHARES = {
    "kl": [0.001, 0.002, 0.005, 0.010, 0.020, 0.040, 0.083, 0.197, 0.641],
    "kl_no_dt": [0.000, 0.000, 0.001, 0.003, 0.007, 0.018, 0.050, 0.162, 0.757],
    "ode": [0.010, 0.014, 0.020, 0.029, 0.044, 0.071, 0.121, 0.224, 0.466],
    "uniform": [1 / 9] * 9,
    "x0": [0.190, 0.175, 0.158, 0.140, 0.118, 0.095, 0.069, 0.041, 0.015],
    "x_next": [0.007, 0.014, 0.020, 0.029, 0.045, 0.071, 0.122, 0.225, 0.467],
}


def weights(name, transition, steps):
    found = [weight(name, transition, jnp.asarray(sigma), jnp.asarray(sigma_next)) for sigma, sigma_next in steps]
    assert all(value.shape == () and value.dtype == jnp.float32 for value in found)
    return np.array(found)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_each_trained_step_has_its_published_share(name):
    found = weights(name, SDE(0.7), TRAINED)
    np.testing.assert_allclose(found / found.sum(), SHARES[name], rtol=0, atol=5.1e-4)  # given to three places


def divergence(mean, other_mean, std):
    """KL(N(mean, std²) ‖ N(other_mean, std²)), integrated."""
    policy, target = stats.norm(mean, std), stats.norm(other_mean, std)
    integral, _ = integrate.quad(
        lambda x: policy.pdf(x) * (policy.logpdf(x) - target.logpdf(x)),
        mean - 12 * std,
        mean + 12 * std,
        epsabs=1e-13,
        epsrel=1e-11,
        limit=200,
    )
    return integral


@pytest.mark.parametrize("a", [0.3, 0.7, 1.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_the_kl_weight_is_the_divergence_per_squared_velocity_difference(sigma, sigma_next, a):
    """In float64, integral against closed form at 1e-8 relative."""
    with jax.enable_x64(True):
        sigma, sigma_next = jnp.asarray(sigma, jnp.float64), jnp.asarray(sigma_next, jnp.float64)
        x, v = jnp.full((2, 1), 0.4), jnp.array([[0.3], [-0.5]])
        mean, std = SDE(a).moments(x, v, sigma, sigma_next)
        found = weight("kl", SDE(a), sigma, sigma_next) * 0.8**2
        np.testing.assert_allclose(found, divergence(float(mean[0, 0]), float(mean[1, 0]), float(std)), rtol=1e-8)


@pytest.mark.parametrize("a", [0.3, 0.7, 1.0])
def test_the_kl_weight_has_its_closed_forms(a):
    found = weights("kl", SDE(a), STEPS)
    sigma, sigma_next = SIGMAS[:-1].astype(np.float64), SIGMAS[1:].astype(np.float64)
    step = sigma - sigma_next
    s = a * np.sqrt(sigma / (1 - np.where(sigma == 1, sigma_next, sigma)))
    np.testing.assert_allclose(found, step / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2, rtol=1e-5)
    unclamped = step / 2 * (1 / a + a / 2) ** 2 * (1 - sigma) / sigma
    np.testing.assert_allclose(found[1:], unclamped[1:], rtol=1e-5)
    assert unclamped[0] == 0 < found[0]  # at pure noise only the clamped diffusion leaves a weight


def test_the_other_weightings_have_their_closed_forms():
    step = SIGMAS[:-1].astype(np.float64) - SIGMAS[1:]
    kl = weights("kl", SDE(0.7), STEPS)
    np.testing.assert_allclose(weights("kl_no_dt", SDE(0.7), STEPS), step * kl, rtol=1e-5)
    for transition in (SDE(0.7), CPS(0.7), ODE()):
        np.testing.assert_allclose(weights("ode", transition, STEPS), step**2 / 2, rtol=1e-5)
        np.testing.assert_array_equal(weights("uniform", transition, STEPS), np.ones(10))


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7), ODE()], ids=["sde", "cps", "ode"])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_distances_of_clean_latents_and_of_next_states_are_those_of_velocities_by_their_weights(
    transition, sigma, sigma_next
):
    """In float64, of two velocities at one state: x0 and the next state's mean computed for each, at 1e-10."""
    with jax.enable_x64(True):
        sigma, sigma_next = jnp.asarray(sigma, jnp.float64), jnp.asarray(sigma_next, jnp.float64)
        x, v, other = np.random.default_rng(0).standard_normal((3, 2, 5))
        found = {name: float(weight(name, transition, sigma, sigma_next)) for name in ("x0", "x_next")}
        means = [transition.moments(jnp.asarray(x), jnp.asarray(each), sigma, sigma_next)[0] for each in (v, other)]
        clean = [x - float(sigma) * each for each in (v, other)]
    for name, (ours, theirs) in {"x0": clean, "x_next": means}.items():
        square = np.mean((np.asarray(ours) - np.asarray(theirs)) ** 2)
        np.testing.assert_allclose(found[name] * np.mean((v - other) ** 2), square, rtol=1e-10)


def test_shares_of_next_states_under_other_transitions():
    """CPS at noise level .7 spreads them; without noise they are those of `ode`."""
    found = {kind: weights("x_next", kind(), TRAINED) for kind in (CPS, ODE)}
    published = [0.005, 0.015, 0.031, 0.055, 0.089, 0.134, 0.188, 0.238, 0.246]
    np.testing.assert_allclose(found[CPS] / found[CPS].sum(), published, rtol=0, atol=5.1e-4)
    np.testing.assert_allclose(found[ODE], 2 * weights("ode", ODE(), TRAINED), rtol=1e-6)


def test_under_cps_one_step_would_be_almost_the_whole_divergence():
    coefficients = [CPS(0.7).coefficients(jnp.asarray(sigma), jnp.asarray(nxt)) for sigma, nxt in TRAINED]
    found = np.array([float(c.velocity) ** 2 / (2 * float(c.std) ** 2) for c in coefficients])
    np.testing.assert_allclose(found[-1] / found.sum(), 0.998, atol=5e-4)


@pytest.mark.parametrize("name", ["kl", "kl_no_dt"])
@pytest.mark.parametrize(
    ("transition", "reason"),
    [(CPS(), r"99\.8% of the loss"), (ODE(), "no noise"), (SDE(0.0), "no noise"), (SDE(1e-30), "no noise")],
)
def test_a_divergence_is_refused_where_there_is_none_to_speak_of(name, transition, reason):
    with pytest.raises(
        ValueError, match=rf"weighting: found '{name}', expected one of ode, uniform, x0, x_next: .*{reason}"
    ):
        check_weighting(name, transition)
    with pytest.raises(ValueError, match=reason):
        weight(name, transition, jnp.float32(0.5), jnp.float32(0.4))


def test_an_unknown_weighting_is_refused_with_the_names():
    with pytest.raises(
        ValueError, match=r"weighting: found 'snr', expected one of kl, kl_no_dt, ode, uniform, x0, x_next"
    ):
        check_weighting("snr", SDE())


def test_a_weight_can_be_taken_inside_a_scan():
    sigmas = jnp.asarray(SIGMAS)
    _, found = jax.lax.scan(lambda _, s: (None, weight("kl", SDE(0.7), *s)), None, (sigmas[:-1], sigmas[1:]))
    np.testing.assert_allclose(found, weights("kl", SDE(0.7), STEPS), rtol=1e-5)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_noise_levels_may_be_pythons_numbers(name):
    expected = weight(name, SDE(0.7), jnp.float32(0.5), jnp.float32(0.25))
    found = weight(name, SDE(0.7), 0.5, 0.25)
    assert (found.dtype, found.shape, float(found)) == (jnp.float32, (), float(expected))


def test_the_least_noise_has_a_finite_divergence():
    assert np.isfinite(weights("kl", SDE(LEAST_NOISE), STEPS)).all()

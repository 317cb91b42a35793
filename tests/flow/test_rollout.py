"""Rollouts. Two programs computing the same numbers are compared at 1e-5 absolute (states of size 1 to 4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.flow.rollout import (
    Trajectory,
    draw,
    log_density,
    noise_window,
    rollout,
    sample,
    sample_final,
    sample_keys,
)
from fopd_jax.flow.schedule import flow_match_sigmas, make_levels
from fopd_jax.flow.transition import CPS, ODE, SDE

STEPS, BATCH, SHAPE = 5, 3, (3, 3, 2)
SIGMAS = flow_match_sigmas(STEPS)
ATOL = 1e-5


def policy(x, sigma):
    return jnp.tanh(x) * (1 + sigma) - jnp.roll(x, 1, axis=-1)


@jax.jit
def run(transition, noise, keys, noisy):
    """Compiled once per kind of transition for all tests here."""
    return rollout(policy, transition, make_levels(SIGMAS, noisy), noise, keys)


@jax.jit
def final(transition, noise, keys):
    return sample_final(policy, transition, make_levels(SIGMAS), noise, keys)


ALWAYS, NEVER = np.ones(STEPS, bool), np.zeros(STEPS, bool)


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(1), (BATCH, *SHAPE))


@pytest.fixture(scope="module")
def keys():
    return sample_keys(jax.random.key(2), STEPS, BATCH)


@jax.jit
def one_step(transition, x, sigma, sigma_next, key):
    """A single sample's step, `x [...]`."""
    mean, std = transition.moments(x[None], policy(x[None], sigma), sigma, sigma_next)
    x_next = mean + std * jax.random.normal(key, x.shape)[None]
    log_prob = transition.log_prob(x_next, mean, std)[0] if transition.has_density else jnp.float32(0)
    return x_next[0], log_prob


def by_hand(transition, noise, keys, noisy):
    """The same trajectory by a Python loop that treats every sample on its own."""
    latents, log_probs = np.zeros((STEPS + 1, *noise.shape)), np.zeros((STEPS, len(noise)))
    latents[0] = noise
    for t, i in np.ndindex(STEPS, len(noise)):
        step = transition if noisy[t] else ODE()
        x = latents[t, i].astype(np.float32)
        latents[t + 1, i], log_probs[t, i] = one_step(step, x, SIGMAS[t], SIGMAS[t + 1], keys[t, i])
    return latents, log_probs


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7), ODE()])
@pytest.mark.parametrize("noisy", [ALWAYS, noise_window(STEPS, 1, 3)])
def test_a_rollout_equals_a_python_loop(transition, noisy, noise, keys):
    found = run(transition, noise, keys, noisy)
    latents, log_probs = by_hand(transition, noise, keys, noisy)
    assert found.latents.shape == (STEPS + 1, BATCH, *SHAPE)
    assert found.log_probs.shape == (STEPS, BATCH)
    np.testing.assert_allclose(found.latents, latents, rtol=0, atol=ATOL)
    np.testing.assert_allclose(found.log_probs, log_probs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7)])
def test_a_closed_window_samples_the_ode(transition, noise, keys):
    found = run(transition, noise, keys, NEVER)
    np.testing.assert_array_equal(found.log_probs, np.zeros((STEPS, BATCH)))
    np.testing.assert_allclose(found.latents[-1], final(ODE(), noise, keys), rtol=0, atol=ATOL)


def test_outside_its_window_a_rollout_does_not_depend_on_the_keys(noise, keys):
    noisy = noise_window(STEPS, 2, 4)
    one = run(SDE(0.7), noise, keys, noisy)
    other = run(SDE(0.7), noise, keys[np.array([1, 2, 3, 4, 0])], noisy)
    same = np.all(np.asarray(one.latents) == np.asarray(other.latents), axis=(2, 3, 4))
    np.testing.assert_array_equal(same, np.repeat([[True], [False]], 3, axis=0).repeat(BATCH, axis=1))
    np.testing.assert_array_equal(np.all(np.asarray(one.log_probs) != 0, axis=1), noisy)


def test_a_sample_does_not_depend_on_its_batch(noise, keys):
    together = run(SDE(0.7), noise, keys, ALWAYS)
    for samples in ([2, 0], [2, 1, 0]):
        order = np.array(samples)
        found = run(SDE(0.7), noise[order], keys[:, order], ALWAYS)
        np.testing.assert_allclose(found.latents, np.asarray(together.latents)[:, samples], rtol=0, atol=ATOL)
        np.testing.assert_allclose(found.log_probs, np.asarray(together.log_probs)[:, samples], rtol=0, atol=ATOL)


def test_keys_depend_on_sample_and_step_alone_and_never_repeat():
    few = jax.random.key_data(sample_keys(jax.random.key(4), 3, 2))
    many = np.asarray(jax.random.key_data(sample_keys(jax.random.key(4), 10, 16)))
    np.testing.assert_array_equal(few, many[:3, :2])
    assert len(np.unique(many.reshape(160, -1), axis=0)) == 160


def test_a_rollout_is_traced_once(noise, keys):
    traces = []

    def counting(x, sigma):
        traces.append(x.shape)
        return policy(x, sigma)

    def counted_rollout(transition, noise, keys, noisy):
        return rollout(counting, transition, make_levels(SIGMAS, noisy), noise, keys)

    counted = jax.jit(counted_rollout)
    counted(SDE(0.7), noise, keys, noise_window(STEPS, 0, 2))
    counted(SDE(0.3), noise + 1, keys, noise_window(STEPS, 1, 4))
    assert len(traces) == 1


def test_without_a_window_every_step_is_noisy(noise, keys):
    found, expected = rollout(policy, CPS(0.7), make_levels(SIGMAS), noise, keys), run(CPS(0.7), noise, keys, ALWAYS)
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0, atol=ATOL)


def test_the_ode_rollout_ends_where_sample_final_does(noise, keys):
    found = run(ODE(), noise, keys, ALWAYS)
    np.testing.assert_array_equal(found.log_probs, np.zeros((STEPS, BATCH)))
    np.testing.assert_allclose(final(ODE(), noise, keys), found.latents[-1], rtol=0, atol=ATOL)
    np.testing.assert_array_equal(final(ODE(), noise, keys[:, ::-1]), final(ODE(), noise, keys))  # no keys are used


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7)])
def test_a_noisy_rollout_ends_where_sample_final_does(transition, noise, keys):
    expected = run(transition, noise, keys, ALWAYS).latents[-1]
    np.testing.assert_allclose(final(transition, noise, keys), expected, rtol=0, atol=ATOL)
    assert np.abs(final(transition, noise, keys[:, ::-1]) - expected).max() > 0.1  # each sample its own keys


def test_a_constant_velocity_is_followed_exactly(noise):
    """Straight paths need no steps: with v = noise - data the ODE reaches the data from anywhere."""
    data = jnp.ones_like(noise)
    for num_steps in (1, 7):
        steps, levels = sample_keys(jax.random.key(0), num_steps, BATCH), make_levels(flow_match_sigmas(num_steps))
        found = sample_final(lambda x, sigma: noise - data, ODE(), levels, noise, steps)
        np.testing.assert_allclose(found, data, rtol=0, atol=ATOL)


def test_states_are_float32_under_a_half_precision_policy(noise, keys):
    def half(x, sigma):
        return policy(x.astype(jnp.bfloat16), sigma.astype(jnp.bfloat16))

    found = rollout(half, SDE(0.7), make_levels(SIGMAS), noise.astype(jnp.bfloat16), keys)
    assert found.latents.dtype == found.log_probs.dtype == jnp.float32


def test_a_trajectory_is_a_tree_of_two_leaves():
    shapes = jax.tree.map(jnp.shape, Trajectory(latents=jnp.zeros((2, 1, 3)), log_probs=jnp.zeros((1, 1))))
    assert (shapes.latents, shapes.log_probs) == ((2, 1, 3), (1, 1))


def test_a_window_marks_its_steps():
    np.testing.assert_array_equal(noise_window(5, 1, 3), [False, True, True, False, False])
    np.testing.assert_array_equal(noise_window(2, 0, 2), [True, True])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 1), (0, 6)])
def test_a_window_outside_the_schedule_is_refused(start, stop):
    with pytest.raises(ValueError, match=r"window: found \(.*\), expected \(start, stop\) with 0 <= start < stop <= 5"):
        noise_window(5, start, stop)


def test_disagreeing_numbers_of_steps_are_refused(noise, keys):
    with pytest.raises(ValueError, match=r"keys: found 5 steps, expected 6"):
        rollout(policy, SDE(), make_levels(flow_match_sigmas(6)), noise, keys)
    with pytest.raises(ValueError, match=r"keys: found 5 steps, expected 6"):
        sample_final(policy, SDE(), make_levels(flow_match_sigmas(6)), noise, keys)
    with pytest.raises((ValueError, TypeError), match="noisy"):  # whichever of shape annotation and check comes first
        make_levels(SIGMAS, np.ones(4, bool))


def test_a_rollout_in_two_parts_is_the_whole(noise, keys):
    noisy = noise_window(STEPS, 1, 3)
    whole = run(SDE(0.7), noise, keys, noisy)
    first, rest = make_levels(SIGMAS, noisy, (0, 2)), make_levels(SIGMAS, noisy, (2, STEPS))
    x, _, _ = sample(policy, SDE(0.7), first, noise, keys[:2])
    np.testing.assert_allclose(x, whole.latents[2], rtol=0, atol=ATOL)
    np.testing.assert_allclose(sample_final(policy, SDE(0.7), rest, x, keys[2:]), whole.latents[-1], rtol=0, atol=ATOL)


def test_who_watches_sees_every_step_with_its_inputs(noise, keys):
    """Memory goes along, what is kept is stacked: here the state at one step a sample, and each step's distance."""
    chosen = jnp.array([3, 0, 4])

    def watch(held, seen):
        here = (chosen == seen.inputs)[:, None, None, None]
        return jnp.where(here, seen.x, held), (seen.level.sigma - seen.level.sigma_next, seen.x_next, seen.log_prob)

    x, held, (steps, latents, log_probs) = sample(
        policy, SDE(0.7), make_levels(SIGMAS), noise, keys, watch, jnp.zeros_like(noise), jnp.arange(STEPS)
    )
    whole = run(SDE(0.7), noise, keys, ALWAYS)
    np.testing.assert_allclose(held, [whole.latents[t, i] for i, t in enumerate(chosen)], rtol=0, atol=ATOL)
    np.testing.assert_array_equal(steps, SIGMAS[:-1] - SIGMAS[1:])
    np.testing.assert_allclose(latents, whole.latents[1:], rtol=0, atol=ATOL)
    np.testing.assert_allclose(log_probs, whole.log_probs, rtol=0, atol=ATOL)
    np.testing.assert_array_equal(x, latents[-1])


@pytest.mark.parametrize("transition", [SDE(0.7), CPS(0.7), ODE()])
@pytest.mark.parametrize("noisy", [True, False])
def test_a_drawn_step_has_the_density_it_was_drawn_with(transition, noisy, noise, keys):
    level = jax.tree.map(lambda leaf: leaf[1], make_levels(SIGMAS, np.full(STEPS, noisy)))
    v = policy(noise, level.sigma)
    x_next, log_prob = draw(transition, level, noise, v, keys[1])
    np.testing.assert_allclose(log_density(transition, level, noise, v, x_next), log_prob, rtol=0, atol=ATOL)
    assert bool(np.any(log_prob)) == (noisy and transition.has_density)

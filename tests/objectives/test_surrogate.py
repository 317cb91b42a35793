"""Surrogates under a ratio: closed forms of the mask, whom it leaves out, and what of a step's loss is left then."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.schema import Objective
from fopd_jax.flow.rollout import log_density
from fopd_jax.flow.transition import CPS, SDE
from fopd_jax.objectives.opd import Compared, Targets, check_objective, distillation_loss, timestep_terms
from fopd_jax.objectives.surrogate import beyond, clipped, masked, means_apart
from tests.steps.opd.network import BATCH, CLIPPED, SHAPE, level, normal

TAU = 1e-5
MASKED = dataclasses.replace(CLIPPED, surrogate="dppo", divergence=TAU)
CASES = {  # ratio, reward, divergence by τ → whether it is left out
    "near, away": (1.1, 2.0, 0.9, False),
    "far, away with a reward": (1.1, 2.0, 1.1, True),
    "far, away with a penalty": (0.9, -2.0, 1.1, True),
    "far, back with a reward": (0.9, 2.0, 1.1, False),
    "far, back with a penalty": (1.1, -2.0, 1.1, False),
    "at the threshold": (1.1, 2.0, 1.0, True),
    "far at ratio 1": (1.0, 2.0, 1.1, False),
    "far, worth nothing": (1.1, 0.0, 1.1, False),
}


def samples(*values: float) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("case", CASES)
def test_far_steps_that_move_away_are_left_out(case: str) -> None:
    ratio, reward, far, out = CASES[case]
    arguments = samples(ratio), samples(reward), samples(far * TAU)
    loss, left_out = masked(*arguments, TAU)
    assert (float(left_out[0]), left_out.dtype) == (float(out), jnp.float32)
    np.testing.assert_allclose(loss, [0.0 if out else -ratio * reward], rtol=1e-6)
    slopes = jax.grad(lambda rho, r, d: masked(rho, r, d, TAU)[0].sum(), argnums=(0, 1, 2))(*arguments)
    np.testing.assert_allclose(np.concatenate(slopes), [0, 0, 0] if out else [-reward, -ratio, 0], rtol=1e-6)


def test_the_mask_is_not_the_clip() -> None:
    """A ratio is one draw's: far beyond the clip while the policies are close, and within it while they are far."""
    ratio, reward, divergence = samples(1.5, 1.05), samples(1.0, 1.0), samples(0.5 * TAU, 2 * TAU)
    np.testing.assert_array_equal(beyond(ratio, 0.1), [1, 0])
    np.testing.assert_array_equal(masked(ratio, reward, divergence, TAU)[1], [0, 1])
    np.testing.assert_allclose(clipped(ratio, reward, 0.1), [-1.1, -1.05], rtol=1e-6)


def test_means_apart_have_the_divergence_of_the_transitions() -> None:
    """KL of two Gaussians of one std is ‖μ - μ_old‖²/(2·std²), by their means at the same state."""
    v, old, x = (jnp.asarray(normal(seed, BATCH, *SHAPE)) for seed in range(3))
    sigma, after = jnp.float32(0.7), jnp.float32(0.55)
    _, c, std = SDE(0.7).coefficients(sigma, after)
    means = [np.float64(SDE(0.7).moments(x, each, sigma, after)[0]) for each in (v, old)]
    expected = np.square(means[0] - means[1]).mean((1, 2, 3)) / (2 * float(std) ** 2)
    np.testing.assert_allclose(means_apart(c, v, old) / (2 * std**2), expected, rtol=1e-5)
    assert not np.any(jax.grad(lambda old: means_apart(c, v, old).sum())(old))


def terms_of(objective: Objective, shift: Any, apart: Any, advantage: Any = None, **changes: Any) -> Any:
    """Terms of a step and their loss's gradient; `shift`: of new log-densities from old, `apart`: of all velocities."""
    v, teacher, anchor, x, x_next = (jnp.asarray(normal(seed, BATCH, *SHAPE)) for seed in range(5))
    old = log_density(SDE(0.7), level(True), x, v, x_next) - jnp.asarray(shift, jnp.float32)
    v_old = v + jnp.asarray(apart, jnp.float32)[:, None, None, None]

    def terms(v: jax.Array) -> Any:
        log_prob = log_density(SDE(0.7), level(True), x, v, x_next)
        own, targets = Compared(v, acting=v), Targets(teacher, anchor)
        arguments = own, targets, x, x_next, log_prob, old
        return timestep_terms(
            dataclasses.replace(objective, **changes), SDE(0.7), level(True), *arguments, advantage, v_old=v_old
        )

    return terms(v), jax.grad(lambda v: terms(v)["loss"].sum())(v)


def test_a_step_that_is_left_out_keeps_its_anchor_alone() -> None:
    """An attached reward is left out with it. Rewards are penalties: away is below ratio 1."""
    found, gradient = terms_of(MASKED, [-0.3, 0.3, -0.3], [0.1, 0.1, 1e-4])
    np.testing.assert_array_equal(found["clipped"], [1, 0, 0])
    ratio = np.exp([-0.3, 0.3, -0.3]) * [0, 1, 1]
    np.testing.assert_allclose(found["loss"], ratio * found["teacher_gap"] + 0.3 * found["anchor_gap"], rtol=1e-5)
    clip = terms_of(CLIPPED, [-0.3, 0.3, -0.3], [0.1, 0.1, 1e-4])[1]
    anchor = jax.grad(lambda v: _anchor_loss(v))(jnp.asarray(normal(0, BATCH, *SHAPE)))
    np.testing.assert_allclose(gradient[0], anchor[0], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(gradient[1], clip[1], rtol=1e-5, atol=1e-8)  # above 1 with a penalty neither holds back
    assert np.abs(np.asarray(clip[0] - anchor[0])).max() > 1e-3  # the clip would have left the reward's gradient


def _anchor_loss(v: jax.Array) -> jax.Array:
    direct = dataclasses.replace(CLIPPED, name="direct", mar_beta=0.3)
    teacher = v  # at no distance, so that the anchor's term is all there is
    x, x_next = (jnp.asarray(normal(seed, BATCH, *SHAPE)) for seed in (3, 4))
    targets, zero = Targets(jax.lax.stop_gradient(teacher), jnp.asarray(normal(2, BATCH, *SHAPE))), jnp.zeros(BATCH)
    return timestep_terms(direct, SDE(0.7), level(True), v, targets, x, x_next, zero, zero)["loss"].sum()


def test_of_mixed_the_sum_of_both_rewards_decides() -> None:
    """Penalty and advantage: a large advantage turns the sign, and with it which side is away."""
    advantage = jnp.asarray([50.0, -50.0, 50.0])
    found, _ = terms_of(MASKED, [0.3, 0.3, -0.3], [0.1] * 3, advantage, name="mixed")
    np.testing.assert_array_equal(found["clipped"], [1, 0, 0])


def test_on_policy_nothing_is_left_out() -> None:
    gap, same = samples(0.5, 0.0), samples(-1.0, -1.0)
    loss, left_out = distillation_loss(dataclasses.replace(MASKED, divergence=0.0), gap, same, same, same)
    np.testing.assert_array_equal(loss, gap)
    np.testing.assert_array_equal(left_out, [0, 0])


def test_a_mask_needs_transitions_whose_divergence_is_known() -> None:
    message = "objective.surrogate: found 'dppo', expected 'clip' where rollouts are not of an SDE"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_objective(dataclasses.replace(MASKED, weighting="uniform"), CPS(0.7))
    check_objective(MASKED, SDE(0.7))

"""One timestep's terms of the distillation loss, sample by sample."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.schema import Objective
from fopd_jax.flow.rollout import log_density
from fopd_jax.flow.transition import SDE
from fopd_jax.objectives.opd import TERMS, Targets, timestep_terms
from tests.steps.opd.network import BATCH, CLIPPED, DIRECT, SHAPE, level, normal


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED, dataclasses.replace(CLIPPED, reward="log_ratio")])
def test_anchor_term_has_its_own_beta_and_no_ratio(objective: Objective) -> None:
    v, teacher, anchor, x, x_next = (jnp.asarray(normal(seed, BATCH, *SHAPE)) for seed in range(5))
    log_prob = log_density(SDE(0.7), level(True), x, v, x_next)
    arguments = x, x_next, log_prob, log_prob - jnp.log(jnp.float32(1.5))
    terms = partial(timestep_terms, objective, SDE(0.7), level(True), v)
    without, found = terms(Targets(teacher, None), *arguments), terms(Targets(teacher, anchor), *arguments)
    w = float(0.15 / 2 * (1 / 0.7 + 0.7 / 2) ** 2 * 0.3 / 0.7)  # METHOD's closed form of the weight
    drift = w * np.mean((np.float64(v) - np.float64(anchor)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(found["loss"] - without["loss"], 0.3 * drift, rtol=1e-5)
    np.testing.assert_allclose(found["anchor_gap"], drift, rtol=1e-5)
    np.testing.assert_array_equal(without["anchor_gap"], np.zeros(BATCH))


def test_terms_are_per_sample_and_count_only_trained_steps() -> None:
    v, teacher, anchor, x, x_next = (jnp.asarray(normal(seed, BATCH, *SHAPE)) for seed in range(5))
    log_prob = log_density(SDE(0.7), level(True), x, v, x_next)
    old = log_prob - jnp.asarray([0.3, 0.0, -0.3], jnp.float32)
    arguments = v, Targets(teacher, anchor), x, x_next, log_prob, old
    terms = timestep_terms(CLIPPED, SDE(0.7), level(True), *arguments)
    assert set(terms) == set(TERMS)
    assert all(value.shape == (BATCH,) and value.dtype == jnp.float32 for value in terms.values())
    mse = np.mean((np.float64(v) - np.float64(teacher)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(terms["velocity_mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(terms["ratio"], np.exp([0.3, 0, -0.3]), rtol=1e-5)
    np.testing.assert_array_equal(terms["clipped"], [1, 0, 1])
    np.testing.assert_array_equal(terms["weight"], [1, 1, 1])
    # The reward is a penalty: above the range it pulls back with the true ratio, below it stops at the range's end.
    ratio = np.array([np.exp(0.3), 1, 1 - CLIPPED.clip])
    np.testing.assert_allclose(terms["loss"] - 0.3 * terms["anchor_gap"], ratio * terms["teacher_gap"], rtol=1e-5)
    quiet = timestep_terms(CLIPPED, SDE(0.7), level(False), *arguments)
    assert not any(value.any() for value in quiet.values())


def test_an_anchor_counts_as_often_as_it_is_said_to() -> None:
    v, teacher, anchor, x, x_next = (jnp.asarray(normal(seed, BATCH, *SHAPE)) for seed in range(5))
    log_prob = log_density(SDE(0.7), level(True), x, v, x_next)
    terms = partial(timestep_terms, DIRECT, SDE(0.7), level(True), v)
    once = terms(Targets(teacher, anchor), x, x_next, log_prob, log_prob)
    found = terms(Targets(teacher, anchor, jnp.asarray([0.0, 3.0, 0.0])), x, x_next, log_prob, log_prob)
    np.testing.assert_allclose(found["anchor_gap"], np.asarray(once["anchor_gap"]) * [0, 3, 0], rtol=1e-6)
    np.testing.assert_array_equal(found["teacher_gap"], once["teacher_gap"])

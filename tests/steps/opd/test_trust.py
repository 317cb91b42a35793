"""What a teacher's part of the loss counts: gradients are linear in it, and it leaves metrics and rollouts alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.schema import Objective
from fopd_jax.objectives.opd import distillation_loss
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.replay import collect, loss_and_gradient
from fopd_jax.worlds.prompt_stream import Mix
from tests.steps.opd.network import (
    BANK,
    CLIPPED,
    DIRECT,
    check,
    frozen_of,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    quick,
    scaled_sum,
)

COUNTS = (0.25, 1.0)


def gradients(objective: Objective, trust: tuple[float, ...] | None, mix: Any = None) -> Any:
    counted = None if trust is None else jnp.asarray(trust, jnp.float32)
    frozen = dataclasses.replace(frozen_of(BANK), trust=counted)
    batch = dataclasses.replace(jax.tree.map(jnp.asarray, make_batch(4)), mix=mix)
    return quick(fused_gradients, make_pieces(make_spec(objective)))(frozen, make_state(), batch)


@pytest.mark.parametrize("objective", [DIRECT, CLIPPED], ids=["direct", "clipped"])
def test_gradients_are_linear_in_what_teachers_count(objective: Objective) -> None:
    """And the anchor's part is whole: it is what is left where nobody counts."""
    plain, totals = gradients(objective, None)
    ones, _ = gradients(objective, (1.0, 1.0))
    none, first, mixed = (gradients(objective, each)[0] for each in ((0.0, 0.0), (1.0, 0.0), COUNTS))
    check(ones, plain)
    second = scaled_sum([plain, first, none], (1.0, -1.0, 1.0))
    check(mixed, scaled_sum([none, first, second], (1 - sum(COUNTS), *COUNTS)))
    _, weighed = gradients(objective, COUNTS)
    for name in ("teacher_gap", "anchor_gap", "velocity_mse", "ratio", "weight"):
        np.testing.assert_allclose(weighed[name], totals[name], rtol=1e-6, err_msg=name)


def test_of_several_teachers_it_is_their_mean_by_weight() -> None:
    """Every sample by both teachers, 3:1 at all levels: trust is .25·.75 + 1·.25."""
    bank = jnp.broadcast_to(jnp.arange(2), (4, 2))
    mix = Mix(bank, jnp.broadcast_to(jnp.asarray([0.75, 0.25]), (4, 2, 2)))
    check(gradients(DIRECT, COUNTS, mix)[0], gradients(DIRECT, (0.4375, 0.4375), mix)[0])


def test_what_is_stored_of_a_rollout_knows_it() -> None:
    pieces, batch = make_pieces(make_spec(CLIPPED, updates_per_rollout=2)), jax.tree.map(jnp.asarray, make_batch(4))
    frozen = dataclasses.replace(frozen_of(BANK), trust=jnp.asarray(COUNTS, jnp.float32))
    stored = quick(collect, pieces)(frozen, make_state(), batch)
    np.testing.assert_array_equal(stored.targets.trust[0], np.asarray(COUNTS, np.float32)[np.asarray(batch.route)])
    _, found, _ = quick(loss_and_gradient, pieces)(frozen, make_state().trained, batch, stored)
    check(found, gradients(CLIPPED, COUNTS)[0])


def test_it_scales_the_teachers_reward_and_not_the_advantage() -> None:
    gap, zero, advantage = jnp.asarray([2.0]), jnp.zeros(1), jnp.asarray([5.0])
    mixed = Objective("mixed", teacher_weight=0.5, task_weight=2.0)
    found = distillation_loss(mixed, gap, zero, zero, zero, advantage, jnp.asarray([0.1]))[0]
    np.testing.assert_allclose(found, [0.5 * 0.1 * 2 - 2 * 5.0], rtol=1e-6)

"""One timestep of each rollout."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.one_timestep import picked_gradients
from tests.steps.opd.network import (
    BANK,
    BATCH,
    DIRECT,
    check,
    frozen_of,
    make_batch,
    make_pieces,
    make_spec,
    make_state,
    quick,
    relative_error,
    scaled_sum,
)


@pytest.mark.parametrize("weighting", ["kl", "ode", "uniform"])
def test_one_timestep_a_rollout_is_unbiased(weighting: str) -> None:
    """The mean over timesteps, by the probability with which each is drawn, is the gradient of all."""
    objective, batch = dataclasses.replace(DIRECT, weighting=weighting), make_batch()
    spec, state, frozen = make_spec(objective, one_timestep=True), make_state(), frozen_of(BANK)
    run = quick(picked_gradients, make_pieces(spec))
    parts = [run(frozen, state, batch, jnp.full(BATCH, t)) for t in range(4)]
    shares, _ = spec.shares()
    assert shares.sum() == pytest.approx(1)
    whole = quick(fused_gradients, make_pieces(make_spec(objective)))(frozen, state, batch)[0]
    check(scaled_sum([gradient for gradient, _ in parts], shares), whole)
    mixed, totals = run(frozen, state, batch, jnp.asarray([3, 0, 2]))
    rows = [parts[t][1]["loss"][i] for i, t in enumerate((3, 0, 2))]
    np.testing.assert_allclose(totals["loss"], rows, rtol=1e-5)
    assert relative_error(mixed, parts[0][0]) > 1e-3

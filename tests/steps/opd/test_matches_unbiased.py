"""Parts of the work are in the mean all of it, whatever is compared: one timestep a rollout, an anchor of few samples.

At each step's own rollout the estimate's gradient is projected on the whole one. Given the rollout, that has the mean 1
over what is drawn, so that over many steps the mean is 1, too, within its standard error. A mean of 0.9 is told apart.
(A window of trained timesteps is another loss.)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import Adapter
from fopd_jax.config.schema import Objective
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.one_timestep import picked_gradients
from tests.steps.opd.matching import bank_of, batch_of, spec_of
from tests.steps.opd.network import make_pieces, make_state

STEPS, LIMIT = 512, 5.0
"""In standard errors; a test that should pass fails by chance once in 1.7 million times."""
PARTS = {
    "one timestep, guided": (
        Objective("direct", weighting="x0", normalise=True, mar_beta=0.3), {"one_timestep": True},
    ),
    "one timestep, conditional": (
        Objective("direct", weighting="x_next", match="conditional", mar_beta=0.3), {"one_timestep": True},
    ),
    "one timestep, branches": (
        Objective("direct", match="branches", normalise=True, mar_beta=0.3), {"one_timestep": True},
    ),
    "anchor, conditional": (
        Objective("direct", weighting="x0", match="conditional", normalise=True, mar_beta=3.0), {"anchor_every": 3},
    ),
    "anchor, branches": (
        Objective("clipped", weighting="x_next", match="branches", normalise=True, mar_beta=3.0), {"anchor_every": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_a_part_of_the_work_is_unbiased(case: str) -> None:
    objective, fields = PARTS[case]
    batch, frozen, spec = batch_of(soft=False), bank_of(soft=False), spec_of(objective)
    part, whole = make_pieces(dataclasses.replace(spec, **fields)), make_pieces(spec)
    estimate_of = picked_gradients if "one_timestep" in fields else fused_gradients

    def projected(step: jax.Array) -> jax.Array:
        state = dataclasses.replace(make_state(), step=step)
        expected = fused_gradients(whole, frozen, state, batch)[0]
        return inner(estimate_of(part, frozen, state, batch)[0], expected) / inner(expected, expected)

    found = np.float64(jax.jit(jax.vmap(projected))(jnp.arange(STEPS, dtype=jnp.int32)))
    error = found.std(ddof=1) / np.sqrt(STEPS)
    print(f"{case}: {found.mean():.4f} ± {error:.4f}")
    assert found.std() > 0.05  # it is an estimate
    assert abs(found.mean() - 1) < LIMIT * error
    assert abs(found.mean() - 0.9) > LIMIT * error


def inner(left: Adapter, right: Adapter) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), left, right)), jnp.zeros(()))

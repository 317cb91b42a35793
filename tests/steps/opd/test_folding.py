"""Guidance folding: a student whose conditional velocity is its teachers' guided one is where it is to be.

Velocities are linear in the prompt, v = p·a·b, and the empty prompt is zero; then a teacher's guided velocity at scale
g is that of the adapter g·b without guidance, for every state.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.lora import Adapter, stack_bank
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import Objective
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import Frozen
from tests.steps.opd.network import BATCH, POOLED, SHAPE, check, make_batch, make_spec, make_state, normal, quick

SCALES = (4.5, 3.0, 2.0)  # the teachers' and the anchor's
DIMS = int(np.prod(SHAPE))


def velocity(variables: Any, adapter: Any, x: Any, sigma: Any, text: Any, route: Any = None) -> jax.Array:
    """The contract of a velocity, without a base."""
    by = "pr,rd" if route is None else "bpr,brd"
    a, b = (adapter["layer"][name] if route is None else adapter["layer"][name][route] for name in "ab")
    return jnp.einsum(f"bp,{by}->bd", text.pooled, a, b).reshape(x.shape)


def adapter(seed: int, scale: float = 1.0) -> Adapter:
    a, b = normal(seed, POOLED, 2), scale * normal(seed + 1, 2, DIMS)
    return Adapter({"layer": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}, 0.5)


def gradients(student: Adapter, objective: Objective, guidance: float) -> Any:
    """All prompts have the first teacher, and so is the anchor; its scale is then the anchor's, too."""
    scales = (SCALES[0], SCALES[1], SCALES[0])
    pieces = Pieces(make_spec(objective, guidance=(guidance, scales)), velocity)
    empty = Conditioning(jnp.zeros((1, 4, 6)), jnp.zeros((1, POOLED)))
    frozen = Frozen({}, stack_bank({"ocr": adapter(0), "counting": adapter(10), "anchor": adapter(0)}), empty)
    batch = dataclasses.replace(make_batch(), route=np.zeros(BATCH, np.int64))
    return quick(fused_gradients, pieces)(frozen, make_state(student), batch)


@pytest.mark.parametrize("normalise", [False, True], ids=["squared", "normalised"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_fixed_point_is_the_teachers_guided_velocity(guidance: float, normalise: bool) -> None:
    """At whatever scale the student itself samples; a float32's rounding away from loss and gradient 0."""
    objective = Objective("direct", weighting="uniform", match="conditional", normalise=normalise, mar_beta=0.5)
    gradient, there = gradients(adapter(0, SCALES[0]), objective, guidance)
    slope, beside = gradients(adapter(0, 1.1 * SCALES[0]), objective, guidance)
    limit = 1e-4 if normalise else 1e-9  # of the root of rounding, or its square
    assert float(there["loss"].sum()) < limit * float(beside["loss"].sum())
    assert float(there["velocity_mse"].sum()) < 1e-9 * float(beside["velocity_mse"].sum())
    if not normalise:  # which lets the last rounding pull
        largest = [max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)) for tree in (gradient, slope)]
        assert largest[0] < 1e-4 * largest[1]


def test_without_scales_above_one_folding_is_matching_guided_velocities() -> None:
    plain = make_spec(Objective("direct", match="conditional"), guidance=(1.0, (1.0, 1.0, 1.0)))
    found = []
    for match in ("guided", "conditional"):
        spec = dataclasses.replace(plain, objective=dataclasses.replace(plain.objective, match=match))
        empty = Conditioning(jnp.zeros((1, 4, 6)), jnp.zeros((1, POOLED)))
        frozen = Frozen({}, stack_bank({"ocr": adapter(0), "counting": adapter(10), "anchor": adapter(20)}), empty)
        found.append(quick(fused_gradients, Pieces(spec, velocity))(frozen, make_state(adapter(5)), make_batch())[0])
    check(found[0], found[1], 0.0)

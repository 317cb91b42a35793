"""What the tests of `objective.match` share: the small network with folded, mixed and extrapolated targets."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.adapters.lora import zeros_like
from fopd_jax.config.schema import Objective
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.worlds.prompt_stream import Batch, Mix
from tests.steps.opd.network import BANK, BATCH, GUIDED, frozen_of, make_batch, make_spec

LAMBDAS = (0.7, 1.6)
FOLDED = (1.5, GUIDED[1])  # a student of a scale below its teachers'


def spec_of(objective: Objective, *, soft: bool = False, **fields: Any) -> OPDSpec:
    """Soft: with teachers that are extrapolated."""
    guidance = FOLDED if objective.match == "conditional" else GUIDED
    spec = make_spec(objective, guidance=guidance, **fields)
    return dataclasses.replace(spec, extrapolation=LAMBDAS) if soft else spec


def batch_of(*, soft: bool, size: int = BATCH) -> Batch:
    """Soft: every sample with random shares of both teachers at either end."""
    batch = jax.tree.map(jnp.asarray, make_batch(size))
    if not soft:
        return batch
    weights = np.random.default_rng(3).dirichlet(np.ones(2), (size, 2)).astype(np.float32)
    return dataclasses.replace(batch, mix=Mix(jnp.broadcast_to(jnp.arange(2), (size, 2)), jnp.asarray(weights)))


def bank_of(*, soft: bool) -> Frozen:
    """Soft: with the base as the last entry."""
    return frozen_of({**BANK, "base": zeros_like(BANK["anchor"])} if soft else BANK)

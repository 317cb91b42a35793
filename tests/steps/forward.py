"""What the tests of the forward process share: a small network's policy, rollouts of eight images, and their credit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fopd_jax.config.learning import ForwardObjective, OldDecay, TrainedLevels
from fopd_jax.config.schema import EMA
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import ODE
from fopd_jax.parallel.gradients import GradientGroups, on_one_device
from fopd_jax.steps.forward_rl import ForwardSpec, Pieces, learn, roll_out
from fopd_jax.steps.grpo.spec import Base, Credit
from fopd_jax.steps.state import TrainState, init_state
from tests.steps.opd.network import SHAPE, STUDENT, adapter, make_velocity, normal, prompts, variables

BATCH, GROUP, STEPS, LIMIT = 8, 2, 4, 5.0
RATE = optax.sgd(1.0)  # what trains moves by the gradient itself
NFT, AWM, CRD = (
    ForwardObjective("nft", beta=0.5, kl_beta=0.1),
    ForwardObjective("awm", kl_beta=0.02, old_beta=1.0),
    ForwardObjective("crd", beta=0.7, kl_beta=0.1, reference_guidance=4.5),
)
SPEC = ForwardSpec(
    NFT, TrainedLevels(times=2), OldDecay(), keeps_old=True, solver=ODE(), sigmas=flow_match_sigmas(STEPS), shift=3.0,
    latent_shape=SHAPE, guidance=1.0, group=GROUP, limit=LIMIT, rewards=("text", "quality"),
)  # fmt: skip
OLD = adapter(80)


def make_pieces(groups: GradientGroups | None = None, rows: list[int] | None = None, **fields: Any) -> Pieces:
    """With another spec; `rows`: of every traced forward, see `make_velocity`."""
    spec = dataclasses.replace(SPEC, **fields)
    groups = groups or on_one_device()
    spec.check(BATCH, groups)
    return Pieces(spec, make_velocity(rows=rows), groups=groups)


def make_base() -> Base:
    return Base(variables(), jax.tree.map(jnp.asarray, prompts(7, 1)))


def make_state(*, keeps_old: bool = True, seed: int = 5) -> TrainState:
    """The old policy is another than the one that trains."""
    state = init_state(STUDENT, RATE, seed, keeps_old=keeps_old)
    return dataclasses.replace(state, old=jax.tree.map(jnp.copy, OLD)) if keeps_old else state


def make_credit() -> Credit:
    """Of four pairs one has a failure, one is flat; advantages beyond the limit among them."""
    advantage = np.array([2.0, -2.0, 0.0, 0.0, 0.0, 0.0, 7.0, -1.0], np.float32)
    values = np.stack([advantage, np.full(BATCH, np.nan, np.float32)])
    valid, flat = np.ones(BATCH, bool), np.zeros(BATCH, bool)
    valid[2:4], flat[4:6] = False, True
    values[0, 2] = np.nan
    asked = np.stack([np.ones(BATCH, bool), np.zeros(BATCH, bool)])
    return jax.tree.map(jnp.asarray, Credit(advantage, values, asked, valid, flat))


def make_inputs() -> tuple[Any, Any, Credit]:
    """Latents, conditioning, credit."""
    return jnp.asarray(normal(3, BATCH, *SHAPE)), jax.tree.map(jnp.asarray, prompts(1, BATCH)), make_credit()


def learned(pieces: Pieces, state: TrainState | None = None) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on `make_inputs()`."""
    state = make_state(keeps_old=pieces.spec.keeps_old) if state is None else state
    step = jax.jit(lambda base, state, *rest: learn(pieces, RATE, EMA(0.5, every=1), base, state, *rest))
    return step(make_base(), state, *make_inputs())


def moved(state: TrainState) -> Any:
    """By how much what trains has moved from the start: minus the sum of all gradients."""
    return jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.trained.weights, STUDENT.weights)


def rolled(pieces: Pieces, state: TrainState) -> Any:
    return jax.jit(lambda base, state, rows: roll_out(pieces, base, state, rows))(make_base(), state, make_inputs()[1])

"""One jitted OPD update: rollout, teachers, anchor, objective, optimizer.

Gradients are taken inside the scan over timesteps and summed in its carry. With one update per rollout the fused form
computes each velocity once; with several, the trajectory and its targets are stored and replayed. The last sampler step
is not trained, hence not sampled.

What regularises stands beside it (`steps.opd.anchor`, `steps.opd.offline`): an anchor that follows the student, its
weight that learns, and flow matching of captioned latents.

A step whose loss or gradient is not finite does not land: only the count of steps moves on.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fopd_jax.config.schema import EMA
from fopd_jax.parallel.sharding import activation_rules
from fopd_jax.steps.opd.anchor import close, following
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.offline import apart, offline_gradient
from fopd_jax.steps.opd.one_timestep import picked_gradients
from fopd_jax.steps.opd.pieces import Metrics, Pieces, add, mean_metrics
from fopd_jax.steps.opd.replay import replay
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.opd.targets import unanswered
from fopd_jax.steps.state import TrainState, apply_if_finite
from fopd_jax.worlds.prompt_stream import Batch

OPDStep = Callable[[Frozen, TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(pieces: Pieces, optimizer: optax.GradientTransformation, ema: EMA, placed: Any = None) -> OPDStep:
    """The jitted step, its state donated: fused for one update on the whole batch, replayed otherwise.

    `placed`: shardings of the new state and of the metrics; as the state before them, or each step compiles anew.
    """
    update = replay if pieces.spec.replays else fused

    def step(frozen: Frozen, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with activation_rules(pieces.groups.mesh):
            return update(pieces, optimizer, ema, frozen, state, batch)

    return jax.jit(step, donate_argnums=1, out_shardings=placed)


def fused(
    pieces: Pieces,
    optimizer: optax.GradientTransformation,
    ema: EMA,
    frozen: Frozen,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One pass over timesteps and one update."""
    gradients_of = picked_gradients if pieces.spec.one_timestep else fused_gradients
    frozen, (batch, offline), beside = following(pieces, frozen, state), apart(batch), {}
    gradients, totals = gradients_of(pieces, frozen, state, batch)
    loss = totals["loss"].sum()
    if pieces.spec.offline is not None:
        matched, beside["offline_loss"] = offline_gradient(pieces, frozen, state, offline)
        gradients, loss = add(gradients, matched), loss + beside["offline_loss"]
    state, norm, skipped = apply_if_finite(state, gradients, loss, optimizer)
    state, learnt = close(pieces.spec, ema, state, totals, skipped)
    return state, mean_metrics(totals, batch.route, pieces.spec.teachers) | beside | learnt | {
        "grad_norm": norm,
        "skipped": skipped.astype(jnp.float32),
        "samples/loss": totals["loss"] / totals["weight"],
        **unanswered(pieces, batch),
    }

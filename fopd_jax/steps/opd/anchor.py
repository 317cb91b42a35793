"""An anchor that follows the student, and a weight of the anchor's that learns.

The moving anchor is the student as it was: its average, or a slower copy. It is asked by the student's own forward, of
the very rows that the student is trained on, so that where both are the same the gap is 0 and not what two ways to
round leave; whatever trains, adapter or network, that is the same code, and the empty prompt is asked only where the
student's compared velocity needs it. As an entry of the bank it would share the teachers' forward, at the bank's
precision and rank.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.learning import OldDecay
from fopd_jax.config.schema import EMA
from fopd_jax.objectives.dual import dual_ascent
from fopd_jax.objectives.opd import Compared, Totals
from fopd_jax.policy.panel import Answer, Questions, asked_rows, spread
from fopd_jax.policy.velocity import guided_velocity
from fopd_jax.steps.opd.pieces import Metrics, Pieces, student_says
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.state import TrainState, advance, move_old


def following(pieces: Pieces, frozen: Frozen, state: TrainState) -> Frozen:
    """With the anchor as it is in this step, where it follows the student; it moves at a step's end."""
    spec = pieces.spec
    if not spec.follows:
        return frozen
    average = state.old if spec.anchor_moves == "slow" else state.ema
    return dataclasses.replace(frozen, anchor=pieces.student.compute(average))


def anchor_says(
    pieces: Pieces,
    frozen: Frozen,
    conditioning: Conditioning,
    x: Float[Array, "b h w c"],
    sigma: Array,
    pick: Int[Array, " n"] | None = None,
) -> Answer:
    """The moving anchor's answer, without gradient: of every sample, or of one in `anchor_every` (see `anchor_picks`).

    Raises:
      ValueError: `frozen` holds no such anchor.
    """
    if frozen.anchor is None:
        raise ValueError("anchor.moves: found no parameters of the moving anchor, expected those of `following`")
    every, count = (1, x.shape[0]) if pick is None else (pieces.spec.anchor_every, pick.shape[0])
    questions = Questions(jnp.zeros((count, 1), jnp.int32), pick=pick, every=every)
    if every > 1:
        sigma = jnp.broadcast_to(sigma, x.shape[:1])
        conditioning, x, sigma = asked_rows((conditioning, x, sigma), questions)
    with jax.named_scope("anchor"):
        said = jax.lax.stop_gradient(_compared(pieces, frozen, conditioning, x, sigma))
    answer = spread(said.velocity, questions)
    if said.difference is None:
        return answer
    return dataclasses.replace(answer, difference=spread(said.difference, questions).velocity)


def _compared(
    pieces: Pieces, frozen: Frozen, conditioning: Conditioning, x: Float[Array, "b h w c"], sigma: Array
) -> Compared:
    """What of a student is held to its targets, and no more than that."""
    spec = pieces.spec
    if spec.apart:
        return student_says(pieces, frozen, frozen.anchor, conditioning, x, sigma)[1]
    scale = spec.guidance if spec.objective.match == "guided" else 1.0
    null = frozen.null if scale != 1 else None
    weights = pieces.student.read(frozen.variables, frozen.anchor)
    return Compared(guided_velocity(pieces.velocity, *weights, x, sigma, conditioning, null, scale))


def close(spec: OPDSpec, ema: EMA, state: TrainState, totals: Totals, skipped: jax.Array) -> tuple[TrainState, Metrics]:
    """The end of a step: count it, move the average, the slow anchor, and β by the gap that the step has seen.

    Also the β that the step had, where it learns. A step that was skipped moves none of them.
    """
    slow = OldDecay(start=spec.anchor_decay, slope=0.0, limit=spec.anchor_decay)
    state = move_old(slow, advance(state, ema, skipped), skipped)
    if spec.bound is None or state.beta is None:
        return state, {}
    gap = totals["anchor_gap"].sum() / totals["weight"].sum()
    bound, beta = spec.bound, state.beta
    moved = dual_ascent(beta, gap, bound.gap, bound.rate, bound.limits)
    moved = jnp.where(skipped | ~jnp.isfinite(gap), beta, moved)
    return dataclasses.replace(state, beta=moved), {"mar_beta": beta}

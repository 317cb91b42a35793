"""What the student is to match at a state: its panel's answers there, or their means along the teachers' own way.

A student of few steps learns where many would have led (`sampler.teacher_steps` = m): from its state x at sigma the
teachers take m Euler steps of the ODE, at levels sigma = s_0 > … > s_m = sigma', and the target is the chord

    v̄ = (x_m - x)/(sigma' - sigma) = Σ_j (s_{j+1} - s_j)/(sigma' - sigma)·v_k(x_j, s_j),

their mean velocity over the student's step; of the exact flow's it is short by O(1/m). An ODE step under v̄ ends in x_m.
The mean of an SDE's or CPS' step is affine in the velocity, p·x + c·v, so to match v̄ is to match the mean of the step
that the teachers' mean velocity would drive, and the divergence is c²/(2·std²)·‖v_θ - v̄‖² as ever, with c, std and any
weighting of the student's own step.

The anchor's velocities are averaged at the same states: the two targets then differ by nothing but what the networks
disagree about. At x alone the anchor would pull back to the tangent, even where it is the teacher: to the error that
few steps are to be rid of. It is a row of the same forward; `anchor.every` = m asks it no oftener than at x alone.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fopd_jax.flow.rollout import Step, scan_steps
from fopd_jax.flow.schedule import Level
from fopd_jax.objectives.opd import Targets
from fopd_jax.policy.panel import make_panel
from fopd_jax.steps.opd.anchor import anchor_says
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.state import TrainState
from fopd_jax.worlds.prompt_stream import Batch

PICKS = 2**32 - 2  # what the step's key is folded with for draws that are no noise


def ask(
    pieces: Pieces,
    frozen: Frozen,
    batch: Batch,
    x: Float[Array, "b h w c"],
    level: Level,
    pick: Int[Array, " n"] | None = None,
) -> Targets:
    """What teachers and anchor say at x, or on the way from there by the level's `between`, without gradient.

    `pick`: which of `anchor_every` neighbours the anchor is asked about (see `anchor_picks`); None: about all.
    """
    say = partial(_said, pieces, frozen, batch, pick)
    said = say(x, level.sigma) if level.between is None else _along(say, x, level, pieces.spec.anchored)
    return said if frozen.trust is None else dataclasses.replace(said, trust=_trust(frozen.trust, batch, level))


def _said(
    pieces: Pieces,
    frozen: Frozen,
    batch: Batch,
    pick: Int[Array, " n"] | None,
    x: Float[Array, "b h w c"],
    sigma: Float[Array, "*b"],
) -> Targets:
    """At one state and level."""
    spec = pieces.spec
    table, every = spec.table, 1 if pick is None else spec.anchor_every
    panel = make_panel(
        pieces.velocity, table, spec.whole_teachers, frozen.variables, frozen.bank, frozen.null, branches=spec.apart
    )
    with jax.named_scope("teachers"):
        questions = table.questions(batch.route, every, pick, batch.mix, sigma, branches=spec.apart)
        teacher, *anchor = jax.lax.stop_gradient(panel.ask(x, sigma, batch.conditioning, questions))
    if spec.follows:
        anchor = [anchor_says(pieces, frozen, batch.student, x, sigma, pick)]
    if not anchor:
        return Targets(teacher.velocity, teacher_difference=teacher.difference)
    (anchor,) = anchor
    return Targets(teacher.velocity, anchor.velocity, anchor.counts, teacher.difference, anchor.difference)


def _trust(trust: Float[Array, " k"], batch: Batch, level: Level) -> Float[Array, " b"]:
    """What each sample's teachers count: of several their mean, by their weights there."""
    if batch.mix is None:
        return trust[batch.route]
    return (batch.mix.at(jnp.asarray(level.sigma)) * trust[batch.mix.bank]).sum(1)


def _along(say: Callable[[Array, Array], Targets], x: Float[Array, "b h w c"], level: Level, anchored: bool) -> Targets:
    """Means of what is said along the teachers' Euler steps through the levels within a step."""
    ends = [jnp.asarray(each)[..., None] for each in (level.sigma, level.sigma_next)]
    levels = jnp.moveaxis(jnp.concatenate([ends[0], level.between, ends[1]], axis=-1), -1, 0)  # [m + 1] or [m + 1, B]
    whole = levels[-1] - levels[0]

    def go(means: Targets, finer: Step) -> tuple[Targets, Array | None]:
        share = _each((finer.level.sigma_next - finer.level.sigma) / whole)
        said = say(x + _each(whole) * means.teacher, finer.level.sigma)
        teacher = means.teacher + share * said.teacher
        anchor = None if means.anchor is None else means.anchor + share * said.anchor
        return Targets(teacher, anchor), said.anchored

    nothing = jnp.zeros_like(x)
    means, counts = scan_steps(go, Targets(nothing, nothing if anchored else None), Level(levels[:-1], levels[1:]))
    return Targets(means.teacher, means.anchor, jax.tree.map(lambda each: each[0], counts))


def _each(numbers: Float[Array, "*b"]) -> Float[Array, "n 1 1 1"]:
    """One number, or one a sample, beside samples."""
    return numbers.reshape(-1, 1, 1, 1)


def anchor_picks(spec: OPDSpec, state: TrainState, size: int) -> Int[Array, "t n"] | None:
    """Of the trained timesteps, whom of every `anchor_every` neighbours the anchor is asked about; None: everyone."""
    if spec.anchor_every == 1:
        return None
    shape = (len(spec.sigmas) - 2, size // spec.anchor_every)
    picks = jax.random.randint(jax.random.fold_in(state.rng(), PICKS), shape, 0, spec.anchor_every)
    return picks[slice(*spec.window)]

"""What the student is to match at a state: its panel's answers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fopd_jax.flow.schedule import Level
from fopd_jax.objectives.opd import Targets
from fopd_jax.policy.panel import make_panel
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
    """What teachers and anchor say at x, without gradient.

    `pick`: which of `anchor_every` neighbours the anchor is asked about (see `anchor_picks`); None: about all.
    """
    spec = pieces.spec
    table, every = spec.table, 1 if pick is None else spec.anchor_every
    panel = make_panel(
        pieces.velocity, table, spec.whole_teachers, frozen.variables, frozen.bank, frozen.null, branches=spec.apart
    )
    with jax.named_scope("teachers"):
        questions = table.questions(batch.route, every, pick, batch.mix, level.sigma, branches=spec.apart)
        teacher, *anchor = jax.lax.stop_gradient(panel.ask(x, level.sigma, batch.conditioning, questions))
    trust = _trust(frozen, batch, level)
    if not anchor:
        return Targets(teacher.velocity, teacher_difference=teacher.difference, trust=trust)
    (anchor,) = anchor
    return Targets(teacher.velocity, anchor.velocity, anchor.counts, teacher.difference, anchor.difference, trust)


def _trust(frozen: Frozen, batch: Batch, level: Level) -> Float[Array, " b"] | None:
    """What each sample's teachers count: of several their mean, by their weights there."""
    if frozen.trust is None:
        return None
    if batch.mix is None:
        return frozen.trust[batch.route]
    return (batch.mix.at(jnp.asarray(level.sigma)) * frozen.trust[batch.mix.bank]).sum(1)


def anchor_picks(spec: OPDSpec, state: TrainState, size: int) -> Int[Array, "t n"] | None:
    """Of the trained timesteps, whom of every `anchor_every` neighbours the anchor is asked about; None: everyone."""
    if spec.anchor_every == 1:
        return None
    shape = (len(spec.sigmas) - 2, size // spec.anchor_every)
    picks = jax.random.randint(jax.random.fold_in(state.rng(), PICKS), shape, 0, spec.anchor_every)
    return picks[slice(*spec.window)]

"""What the student is to match at a state: its panel's answers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fopd_jax.flow.schedule import Level
from fopd_jax.objectives.opd import Targets
from fopd_jax.parallel.sharding import batch_ways
from fopd_jax.policy.groups import GroupedPanel, Member
from fopd_jax.policy.panel import Panel, make_panel
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import STACK, Frozen, OPDSpec
from fopd_jax.steps.state import TrainState
from fopd_jax.steps.visits import part_of
from fopd_jax.worlds.prompt_stream import Batch

UNANSWERED = "unanswered"
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
    panel = panel_of(pieces, frozen)
    with jax.named_scope("teachers"):
        questions = table.questions(batch.route, every, pick, batch.mix, level.sigma, branches=spec.apart)
        teacher, *anchor = jax.lax.stop_gradient(panel.ask(x, level.sigma, batch.conditioning, questions))
    if not anchor:
        return Targets(teacher.velocity, teacher_difference=teacher.difference)
    (anchor,) = anchor
    return Targets(teacher.velocity, anchor.velocity, anchor.counts, teacher.difference, anchor.difference)


def panel_of(pieces: Pieces, frozen: Frozen) -> Panel:
    """Who answers: one network under its bank, or several."""
    spec = pieces.spec
    if not spec.grouped:
        return make_panel(pieces.velocity, spec.table, frozen.variables, frozen.bank, frozen.null, branches=spec.apart)
    return grouped_panel(pieces, frozen)


def grouped_panel(pieces: Pieces, frozen: Frozen) -> GroupedPanel:
    """The panel of several networks: the student's base and the others by name, or whole networks like it."""
    spec, members = pieces.spec, []
    for name, entries in spec.members.items():
        if name == STACK:
            members.append(Member(pieces.velocity, entries, frozen.variables, frozen.bank, stacked=True))
        elif not name:
            bank = {} if spec.whole_teachers else frozen.bank
            members.append(Member(pieces.velocity, entries, frozen.variables, bank))
        else:
            members.append(Member(pieces.voices[name], entries, *frozen.networks[name]))
    ways = batch_ways(pieces.groups.mesh)
    return GroupedPanel(tuple(members), spec.table, frozen.null, ways, spec.slots)


def members_of(spec: OPDSpec) -> tuple[Member, ...]:
    """Who is who among several networks, without their weights."""
    return tuple(Member(_silent, entries, {}, {}, name == STACK) for name, entries in spec.members.items())


def _silent(*_: Any) -> Array:
    raise NotImplementedError("a panel without weights answers nothing")


def unanswered(pieces: Pieces, batch: Batch) -> dict[str, Array]:
    """As a metric: how many questions about a batch find no slot, whatever part of it they are asked in."""
    spec, groups = pieces.spec, pieces.groups
    if spec.slots is None:
        return {}
    panel = GroupedPanel(members_of(spec), spec.table, None, batch_ways(groups.mesh), spec.slots)
    size, counts = batch.route.shape[0] // spec.parts, []
    for part in range(spec.parts):
        route, mix = part_of((jnp.asarray(batch.route), batch.mix), jnp.int32(part), spec.parts)
        questions = spec.table.questions(route, mix=mix, sigma=0.5)
        counts.append(panel.unanswered(questions, size))
    return {UNANSWERED: jnp.stack(counts).sum().astype(jnp.float32)}


def anchor_picks(spec: OPDSpec, state: TrainState, size: int) -> Int[Array, "t n"] | None:
    """Of the trained timesteps, whom of every `anchor_every` neighbours the anchor is asked about; None: everyone."""
    if spec.anchor_every == 1:
        return None
    shape = (len(spec.sigmas) - 2, size // spec.anchor_every)
    picks = jax.random.randint(jax.random.fold_in(state.rng(), PICKS), shape, 0, spec.anchor_every)
    return picks[slice(*spec.window)]

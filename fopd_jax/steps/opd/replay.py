"""Several updates per rollout: the trajectory and its targets are stored once, and gone through again for each.

One body does both (`steps.visits`), so that on policy the ratio is exactly 1. `loss_and_gradient` is the loss at any
given trajectory, for whoever has an optimizer of their own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from fopd_jax.config.schema import EMA
from fopd_jax.flow.schedule import Level
from fopd_jax.objectives.opd import Compared, Targets, Totals, needs_old_velocity, timestep_terms
from fopd_jax.parallel.sharding import activation_rules
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.opd.anchor import close, following
from fopd_jax.steps.opd.gaps import parted, term_names
from fopd_jax.steps.opd.offline import apart, offline_if
from fopd_jax.steps.opd.pieces import Metrics, Pieces, mean_gradient, mean_metrics, start, student_says
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.opd.targets import anchor_picks, ask, unanswered
from fopd_jax.steps.state import TrainState
from fopd_jax.steps.visits import Course, Pass, Stored, Sums, blank, land_if, make_passes, part_of, put_part, visit
from fopd_jax.worlds.prompt_stream import Batch


def replay(
    pieces: Pieces,
    optimizer: optax.GradientTransformation,
    ema: EMA,
    frozen: Frozen,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """Roll out once and store; then `updates_per_rollout` updates, each on one minibatch of whole trajectories."""
    spec, groups, size = pieces.spec, pieces.groups, batch.route.shape[0]
    frozen, (batch, captioned), beta = following(pieces, frozen, state), apart(batch), state.beta
    parts, levels = spec.parts, spec.levels(0, spec.window[1])
    passes = make_passes(spec.updates_per_rollout, spec.minibatches, spec.micro_batches)
    (noise, keys), picks = start(spec, state, size), anchor_picks(spec, state, size)

    def go(carry: tuple[TrainState, Stored, Sums], each: Pass) -> tuple[Any, Any]:
        state, stored, sums = carry
        rows, x = part_of((batch, noise), each.part, parts)
        own, own_keys, pick = part_of((stored, keys, picks), each.part, parts, axis=1)
        parameters = pieces.student.compute(state.trained)
        _, own, gradients, totals = visit(
            opd_course(pieces, frozen, pick, beta), groups, parameters, rows, own_keys, levels, x, own,
            _ends(pieces, each.draws), spec.window, each.draws, each.draws, each.trains,
        )  # fmt: skip
        sums, matched = sums.plus(gradients, totals), offline_if(each.lands, pieces, frozen, state, captioned)
        state, sums, norm, skipped = land_if(each.lands, groups, optimizer, state, sums, matched)
        seen = totals, norm, skipped, matched and matched[1]
        return (state, put_part(stored, own, each.part, parts, axis=1), sums), seen

    stored = room(pieces, opd_course(pieces, frozen, picks, beta), batch, levels, noise)
    sums = Sums.zeros(groups, pieces.student.compute(state.trained))
    with jax.named_scope("opd_replay"):
        (state, _, _), seen = jax.lax.scan(go, (state, stored, sums), passes)
    totals, norms, skips, matched = jax.tree.map(lambda leaf: leaf[np.flatnonzero(passes.trains)], seen)
    rows = visited(passes, size // parts, parts)
    flat = {name: value.reshape(-1) for name, value in totals.items()}
    losses = jnp.zeros(size).at[rows].add(flat["loss"] / flat["weight"])
    state, learnt = close(spec, ema, state, flat, skips.any())
    beside = {} if matched is None else {"offline_loss": matched.sum() / spec.updates_per_rollout}
    return state, mean_metrics(flat, batch.route[rows], spec.teachers) | beside | learnt | {
        "grad_norm": norms.sum() / spec.updates_per_rollout,
        "skipped": skips.any().astype(jnp.float32),
        "samples/loss": losses,
        **unanswered(pieces, batch),
    }


def visited(passes: Pass, rows: int, parts: int) -> np.ndarray:
    """The batch's rows that the training passes go through, in their order."""
    return np.concatenate([part + parts * np.arange(rows) for part in passes.part[passes.trains]])


def opd_course(pieces: Pieces, frozen: Frozen, picks: Array | None, beta: Array | None = None) -> Course:
    """What passes of distillation have in common; `picks`: see `anchor_picks`; `beta`: the anchor's weight, where it
    learns; rows are a `Batch`'s.
    """
    spec = pieces.spec

    def velocity(parameters: Tree, rows: Batch, x: Array, sigma: Array) -> tuple[Array, Compared]:
        return student_says(pieces, frozen, parameters, rows.student, x, sigma)

    def targets(rows: Batch, x: Array, level: Level, t: Array) -> Targets:
        return ask(pieces, frozen, rows, x, level, None if picks is None else picks[t])

    def terms(level: Level, t: Array, own: Compared, at: Stored, log_prob: Array, rows: Batch) -> Totals:
        found = timestep_terms(
            spec.objective, spec.transition, level, own, at.targets, at.x, at.x_next, log_prob, at.log_prob,
            beta=beta, v_old=at.velocity,
        )  # fmt: skip
        return parted(spec, found, t)

    return Course(spec.transition, velocity, targets, terms, term_names(spec))


def trained_steps(pieces: Pieces) -> int:
    """Their number."""
    first, stop = pieces.spec.window
    return stop - first


def room(pieces: Pieces, course: Course, rows: Tree, levels: Level, x: Array) -> Stored:
    """Blank, for the trained timesteps of a batch that starts at `x`."""
    velocities = needs_old_velocity(pieces.spec.objective)
    return blank(course, pieces.groups, rows, levels, x, trained_steps(pieces), velocities=velocities)


def _ends(pieces: Pieces, draws: Any) -> tuple[Any, Any]:
    """Drawing begins at the noise, training at the first trained timestep."""
    first, stop = pieces.spec.window
    return jnp.where(draws, 0, first), jnp.int32(stop)


# ---- the parts of it, on the whole batch


def collect(pieces: Pieces, frozen: Frozen, state: TrainState, batch: Batch) -> Stored:
    """Roll out under the current student; states, actions, log-densities and targets of every trained step, and
    velocities where the loss compares them.
    """
    spec, size, frozen = pieces.spec, batch.route.shape[0], following(pieces, frozen, state)
    noise, keys = start(spec, state, size)
    course, levels = opd_course(pieces, frozen, anchor_picks(spec, state, size)), spec.levels(0, spec.window[1])
    stored = room(pieces, course, batch, levels, noise)
    with jax.named_scope("opd_rollout"):
        return visit(
            course, pieces.groups, pieces.student.compute(state.trained), batch, keys, levels, noise, stored,
            _ends(pieces, True), spec.window, draws=True, asks=True, trains=False,
        )[1]  # fmt: skip


def loss_and_gradient(
    pieces: Pieces, frozen: Frozen, trained: Tree, batch: Batch, stored: Stored
) -> tuple[Float[Array, ""], Tree, Totals]:
    """Loss and gradient at a given trajectory, whoever rolled it out; no optimizer, no average, nothing drawn.

    `trained`: the student's parameters, as in `TrainState.trained`. `stored`: the trained steps of a rollout of the
    spec's schedule, `[T, B, …]`, T the length of `spec.window`; where it has no targets, teachers and anchor are asked
    about every sample on the way; an anchor that was asked about some counts as it is stored. Returns the mean loss
    over samples and timesteps, its gradient in float32, shaped like `trained`, and `TERMS` (with those of
    `steps.opd.gaps`, where it is measured) summed over timesteps `[B]`: a sample's mean of any is what it has by its
    `weight`.

    Raises:
      ValueError: the trajectory has another number of steps or of samples, or no velocities where they are compared.
    """
    expected = (trained_steps(pieces), batch.route.shape[0])
    if stored.log_prob.shape != expected:
        raise ValueError(f"stored: found {stored.log_prob.shape} steps and samples, expected {expected}")
    if stored.velocity is None and needs_old_velocity(pieces.spec.objective):
        raise ValueError("stored.velocity: found None, expected velocities: surrogate 'dppo' compares with them")
    with activation_rules(pieces.groups.mesh):
        gradient, totals = replayed_gradients(pieces, frozen, trained, batch, stored)
    return totals["loss"].sum() / totals["weight"].sum(), gradient, totals


def replayed_gradients(
    pieces: Pieces, frozen: Frozen, trained: Tree, batch: Batch, stored: Stored
) -> tuple[Tree, Totals]:
    """The fused gradient at stored states and actions, for parameters that may have moved since; sums per sample."""
    spec, course, asks = pieces.spec, opd_course(pieces, frozen, None), stored.targets is None
    levels = spec.levels(0, spec.window[1])
    if asks:
        stored = dataclasses.replace(stored, targets=room(pieces, course, batch, levels, stored.x[0]).targets)
    keys = jnp.broadcast_to(jax.random.key(0), (levels.sigma.shape[0], batch.route.shape[0]))  # nothing is drawn
    with jax.named_scope("opd_replay"):
        _, _, gradients, totals = visit(
            course, pieces.groups, pieces.student.compute(trained), batch, keys, levels, stored.x[0], stored,
            _ends(pieces, False), spec.window, draws=False, asks=asks, trains=True,
        )  # fmt: skip
    return mean_gradient(pieces.groups, gradients, totals), totals

"""Distillation with the tasks' rewards beside the teachers', as passes that a host drives and scores between.

A rollout goes down to its final latents, since images are scored; teachers and anchor are asked while it is drawn, and
updates go through it again, as `replay` does, with each sample's advantage in their reward.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from fopd_jax.config.schema import EMA
from fopd_jax.flow.rollout import sample_keys
from fopd_jax.flow.schedule import Level
from fopd_jax.flow.transition import standard_normal
from fopd_jax.objectives.opd import Compared, Targets, Totals, timestep_terms
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.grpo.metrics import credit_metrics, credit_names
from fopd_jax.steps.grpo.spec import Credit, Rollout
from fopd_jax.steps.grpo.step import Programs, Progress, Seen, jit_passes, take_pass
from fopd_jax.steps.opd.anchor import close, following
from fopd_jax.steps.opd.gaps import gap_names, parted
from fopd_jax.steps.opd.offline import apart, offline_if
from fopd_jax.steps.opd.pieces import Metrics, Pieces, mean_metrics, metric_names, regular_names
from fopd_jax.steps.opd.replay import opd_course, room, trained_steps, visited
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.opd.targets import anchor_picks
from fopd_jax.steps.state import TrainState
from fopd_jax.steps.visits import Course, Pass, Stored, Sums, make_passes, part_of
from fopd_jax.worlds.prompt_stream import Batch


@struct.dataclass
class _Rows:
    """What a timestep needs of each sample; `advantage [B]`, 0 where the sample has none."""

    batch: Batch
    advantage: Any


def begin(pieces: Pieces, frozen: Frozen, state: TrainState, batch: Batch) -> tuple[Rollout, Sums]:
    """Pure noise and room for what is drawn of it: that of `replay`."""
    spec, groups, size = pieces.spec, pieces.groups, batch.route.shape[0]
    frozen, (batch, _) = following(pieces, frozen, state), apart(batch)
    keys = sample_keys(state.rng(), len(spec.sigmas), size)
    x = groups.rows(standard_normal(keys[0], spec.latent_shape))
    rows, course = _Rows(batch, jnp.zeros(size)), _course(pieces, frozen, anchor_picks(spec, state, size))
    stored = room(pieces, course, rows, _levels(spec), x)
    sums = Sums.zeros(groups, pieces.student.compute(state.trained))
    return Rollout(x, keys[1:], jnp.int32(spec.window[0]), stored), sums


def go(
    pieces: Pieces,
    optimizer: optax.GradientTransformation,
    frozen: Frozen,
    progress: Progress,
    batch: Batch,
    credit: Credit,
    each: Pass,
) -> tuple[Progress, Seen]:
    """One pass: a part is drawn down to its final latents and asked about, or trained on."""
    spec, state = pieces.spec, progress[0]
    frozen, (batch, captioned) = following(pieces, frozen, state), apart(batch)
    picks = anchor_picks(spec, state, batch.route.shape[0])
    course = _course(pieces, frozen, part_of(picks, each.part, spec.parts, axis=1), state.beta)
    matched = offline_if(each.lands, pieces, frozen, state, captioned)
    progress, seen = take_pass(
        course, pieces.groups, pieces.student, optimizer, _levels(spec), trained_steps(pieces), spec.parts, progress,
        _Rows(batch, credit.advantage), each, matched,
    )  # fmt: skip
    return progress, seen if matched is None else (*seen[:3], matched[1])


def end(pieces: Pieces, ema: EMA, state: TrainState, credit: Credit, seen: Any) -> tuple[TrainState, Metrics]:
    """Close a step; `seen`: what every training pass saw, stacked. Each task has a teacher, the one of its number."""
    spec, (totals, norms, skips, *matched) = pieces.spec, seen
    size, passes = len(credit.advantage), make_passes(spec.updates_per_rollout, spec.minibatches, spec.micro_batches)
    route = jnp.zeros(size, jnp.int32) if credit.task is None else credit.task
    rows = visited(passes, size // spec.parts, spec.parts)
    flat = {name: value.reshape(-1) for name, value in totals.items()}
    state, learnt = close(spec, ema, state, flat, skips.any())
    return state, {
        **mean_metrics(flat, route[rows], spec.teachers),
        **({"offline_loss": matched[0].sum() / spec.updates_per_rollout} if matched else {}),
        **learnt,
        **credit_metrics(spec.rewards, credit, spec.tasks),
        "grad_norm": norms.sum() / spec.updates_per_rollout,
        "skipped": skips.any().astype(jnp.float32),
        "samples/advantage": credit.advantage,
    }


def mixed_names(spec: OPDSpec) -> tuple[str, ...]:
    """Of the scalars that a step returns, weights apart."""
    return (
        *metric_names(spec.teachers, gap_names(spec)),
        *regular_names(spec),
        *credit_names(spec.rewards, spec.tasks),
    )


def make_programs(
    pieces: Pieces, optimizer: optax.GradientTransformation, ema: EMA, places: Any = None, everywhere: Any = None
) -> Programs:
    """As `steps.grpo.step.make_programs`, of `Frozen` and of a `Batch`."""

    functions = partial(begin, pieces), partial(go, pieces, optimizer), partial(end, pieces, ema)
    return jit_passes(*functions, pieces.groups.mesh, places, everywhere)


def _course(pieces: Pieces, frozen: Frozen, picks: Array | None, beta: Array | None = None) -> Course:
    """Distillation's, with the advantage in the reward."""
    plain, spec = opd_course(pieces, frozen, picks), pieces.spec

    def velocity(parameters: Tree, rows: _Rows, x: Array, sigma: Array) -> tuple[Array, Compared]:
        return plain.velocity(parameters, rows.batch, x, sigma)

    def ask(rows: _Rows, x: Array, level: Level, t: Array) -> Targets:
        return plain.ask(rows.batch, x, level, t)

    def terms(level: Level, t: Array, own: Compared, at: Stored, log_prob: Array, rows: _Rows) -> Totals:
        found = timestep_terms(
            spec.objective, spec.transition, level, own, at.targets, at.x, at.x_next, log_prob, at.log_prob,
            rows.advantage, beta, at.velocity,
        )  # fmt: skip
        return parted(spec, found, t)

    return Course(plain.transition, velocity, ask, terms, plain.names)


def _levels(spec: OPDSpec) -> Level:
    """All of the schedule's: images need the last one, too."""
    return spec.levels(0, len(spec.sigmas) - 1)

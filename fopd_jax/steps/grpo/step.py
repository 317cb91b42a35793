"""Flow-GRPO as passes of one body (`steps.visits`): a rollout of every part, credit, then updates.

The host may drive the passes one by one, scoring between them; where rewards are in JAX, `make_step` makes one program
of everything. The reference is the base with the adapter left off, asked while the rollout is drawn.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import EMA
from fopd_jax.flow.rollout import sample_keys, starting_keys
from fopd_jax.flow.schedule import Level
from fopd_jax.flow.transition import standard_normal
from fopd_jax.objectives.grpo import TERMS, Acted, Totals, needs_old_velocity, step_weights, timestep_terms
from fopd_jax.parallel.gradients import GradientGroups, on_one_device
from fopd_jax.parallel.sharding import activation_rules
from fopd_jax.policy.velocity import Tree, Velocity, guided_velocity
from fopd_jax.steps.grpo.metrics import NO_TASKS, Tasks, credit_metrics, credit_names
from fopd_jax.steps.grpo.spec import Base, Credit, GRPOSpec, Rollout
from fopd_jax.steps.state import TrainState, advance
from fopd_jax.steps.student import ADAPTER, Student
from fopd_jax.steps.visits import Course, Pass, Stored, Sums, blank, land_if, make_passes, part_of, put_part, visit

Metrics = dict[str, jax.Array]
Progress = tuple[TrainState, Rollout, Sums]
Seen = tuple[Totals, Array, Array] | tuple[Totals, Array, Array, Array]
"""Of a pass: sums of terms by sample, the gradient's norm, whether the update was left out, and the value of a loss
beside, where there is one."""
Stacked = tuple[dict[str, Array], Array, Array]
"""The same of several passes."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What the update is made of. `policy`: what trains; `groups`: over which devices gradients are summed when."""

    spec: GRPOSpec
    velocity: Velocity
    policy: Student = ADAPTER
    groups: GradientGroups = dataclasses.field(default_factory=on_one_device)


def begin(pieces: Pieces, base: Base, state: TrainState, conditioning: Conditioning) -> tuple[Rollout, Sums]:
    """Pure noise and room for what is drawn of it: each sample's a function of the seed, the step and its row."""
    spec, size = pieces.spec, jax.tree.leaves(conditioning)[0].shape[0]
    keys = sample_keys(state.rng(), len(spec.sigmas), size)
    starts = starting_keys(keys, spec.group if spec.shared_noise else 1)
    x = pieces.groups.rows(standard_normal(starts, spec.latent_shape))
    first = spec.place(state)
    course, levels = _course(pieces, base, first), spec.levels(first)
    rows = _Rows(conditioning, jnp.zeros(size), jnp.zeros(size))
    velocities = needs_old_velocity(spec.objective)
    stored = blank(course, pieces.groups, rows, levels, x, spec.trained, velocities=velocities)
    sums = Sums.zeros(pieces.groups, pieces.policy.compute(state.trained))
    return Rollout(x, keys[1:], first, stored), sums


def go(
    pieces: Pieces,
    optimizer: optax.GradientTransformation,
    base: Base,
    progress: Progress,
    conditioning: Conditioning,
    credit: Credit,
    each: Pass,
) -> tuple[Progress, Seen]:
    """One pass: a part is drawn down to its final latents, or trained on, and perhaps an update made."""
    spec, first = pieces.spec, progress[1].first
    rows, course = _Rows(conditioning, credit.advantage, credit.counts), _course(pieces, base, first)
    return take_pass(
        course, pieces.groups, pieces.policy, optimizer, spec.levels(first), spec.trained, spec.parts, progress, rows,
        each,
    )  # fmt: skip


def take_pass(
    course: Course,
    groups: GradientGroups,
    policy: Student,
    optimizer: optax.GradientTransformation,
    levels: Level,
    trained: int,
    parts: int,
    progress: Progress,
    rows: Tree,
    each: Pass,
    beside: tuple[Tree, Array] | None = None,
) -> tuple[Progress, Seen]:
    """The same of any course; `levels`: all of them, `trained`: how many timesteps are, `rows`: of the whole batch;
    `beside`: as in `land_if`.
    """
    state, rollout, sums = progress
    rows, x = part_of((rows, rollout.x), each.part, parts)
    own, keys = part_of((rollout.stored, rollout.keys), each.part, parts, axis=1)
    first, count = rollout.first, levels.sigma.shape[0]
    ends = jnp.where(each.draws, 0, first), jnp.where(each.draws, count, first + trained)
    last, own, gradients, totals = visit(
        course, groups, policy.compute(state.trained), rows, keys, levels, x, own,
        ends, (first, first + trained), each.draws, each.draws, each.trains,
    )  # fmt: skip
    last = jnp.where(each.draws, last, x)
    rollout = dataclasses.replace(
        rollout,
        x=put_part(rollout.x, last, each.part, parts),
        stored=put_part(rollout.stored, own, each.part, parts, axis=1),
    )
    sums = sums.plus(gradients, totals)
    state, sums, norm, skipped = land_if(each.lands, groups, optimizer, state, sums, beside)
    return (state, rollout, sums), (totals, norm, skipped)


def end(pieces: Pieces, ema: EMA, state: TrainState, credit: Credit, seen: Any) -> tuple[TrainState, Metrics]:
    """Close a step; `seen`: what every training pass saw, stacked."""
    totals, norms, skips = seen
    weight = totals["weight"].sum()
    means = {name: value.sum() / jnp.maximum(weight, 1) for name, value in totals.items() if name != "weight"}
    means |= {f"weights/{name}": weight for name in list(means)}
    skipped = skips.any()
    return advance(state, ema, skipped), {
        **means,
        **credit_metrics(pieces.spec.rewards, credit, pieces.spec.tasks),
        "grad_norm": norms.sum() / pieces.spec.updates_per_rollout,
        "skipped": skipped.astype(jnp.float32),
        "samples/advantage": credit.advantage,
    }


def metric_names(rewards: tuple[str, ...], tasks: Tasks = NO_TASKS) -> tuple[str, ...]:
    """Of the scalars that a step returns, weights apart."""
    terms = (name for name in TERMS if name != "weight")
    return (*terms, *credit_names(rewards, tasks), "grad_norm", "skipped")


Score = Callable[[Tree, Array, Tree], tuple[Credit, Tree]]
"""`(what rewards and decoder need, final latents, what they need of the prompts) → (credit, seen)`, traced; `seen` is
returned as it is, `[B, …]`."""
Step = Callable[[Base, Tree, TrainState, Conditioning, Tree], tuple[TrainState, Metrics, Credit, Tree]]
"""`(base, scorers, state, conditioning, prompts) → (state, metrics, credit, seen)`; the state is donated."""


def make_step(
    pieces: Pieces, optimizer: optax.GradientTransformation, ema: EMA, score: Score, placed: Any = None
) -> Step:
    """Everything as one jitted program; `placed`: shardings of what it returns."""
    spec = pieces.spec
    passes = make_passes(spec.updates_per_rollout, spec.minibatches, spec.micro_batches)
    scores = np.arange(len(passes.part)) == spec.parts

    def step(
        base: Base, scorers: Tree, state: TrainState, conditioning: Conditioning, prompts: Tree
    ) -> tuple[TrainState, Metrics, Credit, Tree]:
        def pass_(carry: tuple[Progress, tuple[Credit, Tree]], turn: tuple[Pass, Array]) -> tuple[Any, Seen]:
            (progress, scored), (each, now) = carry, turn
            scored = jax.lax.cond(now, lambda: score(scorers, progress[1].x, prompts), lambda: scored)
            progress, seen = go(pieces, optimizer, base, progress, conditioning, scored[0], each)
            return (progress, scored), seen

        with activation_rules(pieces.groups.mesh):
            progress = (state, *begin(pieces, base, state, conditioning))
            shapes = jax.eval_shape(score, scorers, progress[1].x, prompts)
            credit, images = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            scored = credit, pieces.groups.rows(images)
            (progress, (credit, images)), seen = jax.lax.scan(pass_, (progress, scored), (passes, scores))
            seen = jax.tree.map(lambda leaf: leaf[spec.parts :], seen)
            return *end(pieces, ema, progress[0], credit, seen), credit, images

    return jax.jit(step, donate_argnums=2, out_shardings=placed)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The same for a host that scores between them: `begin`, `go` and `end`, jitted; states are donated.

    What does not train comes first, `Base` here; what a rollout is of stands beside the state, here conditioning.
    """

    begin: Callable[[Any, TrainState, Any], tuple[Rollout, Sums]]
    go: Callable[[Any, Progress, Any, Credit, Pass], tuple[Progress, Seen]]
    end: Callable[[TrainState, Credit, Sequence[Seen]], tuple[TrainState, Metrics]]


def make_programs(
    pieces: Pieces, optimizer: optax.GradientTransformation, ema: EMA, places: Any = None, everywhere: Any = None
) -> Programs:
    """`places`: shardings of the state; `everywhere`: of metrics."""
    functions = partial(begin, pieces), partial(go, pieces, optimizer), partial(end, pieces, ema)
    return jit_passes(*functions, pieces.groups.mesh, places, everywhere)


def jit_passes(
    begin: Callable[..., tuple[Rollout, Sums]],
    go: Callable[..., tuple[Progress, Seen]],
    end: Callable[..., tuple[TrainState, Metrics]],
    mesh: Any,
    places: Any = None,
    everywhere: Any = None,
) -> Programs:
    """The programs of three such functions, what is static given to them before."""

    def begin_(base: Any, state: TrainState, conditioning: Any) -> tuple[Rollout, Sums]:
        with activation_rules(mesh):
            return begin(base, state, conditioning)

    def go_(base: Any, progress: Progress, *rest: Any) -> tuple[Progress, Seen]:
        with activation_rules(mesh):
            return go(base, progress, *rest)

    def end_(state: TrainState, credit: Credit, seen: Sequence[Seen]) -> tuple[TrainState, Metrics]:
        return end(state, credit, jax.tree.map(lambda *each: jnp.stack(each), *seen))

    return Programs(
        jax.jit(begin_),
        jax.jit(go_, donate_argnums=1, out_shardings=((places, None, None), everywhere)),
        jax.jit(end_, donate_argnums=0, out_shardings=(places, everywhere)),
    )


# ---- the loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Rows:
    """What a timestep needs of each sample."""

    conditioning: Conditioning
    advantage: Array
    counts: Array


def _course(pieces: Pieces, base: Base, first: Array) -> Course:
    """What passes have in common, the trained timesteps beginning at `first`."""
    spec = pieces.spec
    null = base.null if spec.guidance != 1 else None
    shares = jnp.asarray(step_weights(spec.objective, spec.transition, spec.sigmas))

    def guided(variables: Tree, adapter: Tree, conditioning: Conditioning, x: Array, sigma: Array) -> Array:
        return guided_velocity(pieces.velocity, variables, adapter, x, sigma, conditioning, null, spec.guidance)

    def velocity(parameters: Tree, rows: _Rows, x: Array, sigma: Array) -> tuple[Array, Array]:
        with jax.named_scope("policy"):
            v = guided(*pieces.policy.read(base.variables, parameters), rows.conditioning, x, sigma)
        return v, v

    def reference(rows: _Rows, x: Array, level: Level, t: Array) -> Array | None:
        if spec.objective.kl_beta == 0:
            return None
        with jax.named_scope("reference"):
            v = guided(base.variables, {}, rows.conditioning, x, level.sigma)
            return jax.lax.stop_gradient(v.astype(x.dtype))

    def terms(level: Level, t: Array, v: Array, at: Stored, log_prob: Array, rows: _Rows) -> Totals:
        acted = Acted(at.x, at.x_next, at.log_prob, at.velocity, at.targets)
        share = shares[jnp.minimum(first + t, len(shares) - 1)]
        return timestep_terms(
            spec.objective, spec.transition, level, v, acted, log_prob, rows.advantage, rows.counts, share
        )

    return Course(spec.transition, velocity, reference, terms, TERMS)

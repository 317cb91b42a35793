"""Several updates per rollout: the trajectory and its targets are stored once, and gone through again for each.

`loss_and_gradient` is the loss at any given trajectory, for whoever has an optimizer of their own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import EMA
from fopd_jax.flow.rollout import Seen, Step, log_density, sample, scan_steps
from fopd_jax.objectives.opd import Totals, timestep_terms
from fopd_jax.parallel.sharding import activation_rules
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.opd.pieces import (
    Metrics,
    Pieces,
    add,
    approach,
    mean_gradient,
    mean_metrics,
    student_policy,
    student_velocity,
    zero_totals,
)
from fopd_jax.steps.opd.spec import Frozen, OPDSpec, Stored
from fopd_jax.steps.opd.targets import anchor_picks, ask
from fopd_jax.steps.state import TrainState, advance, apply_if_finite
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
    stored = collect(pieces, frozen, state, batch)
    indices = minibatch_indices(pieces.spec, state, batch.route.shape[0])

    def update(state: TrainState, index: Array) -> tuple[TrainState, tuple[Totals, Array, Array]]:
        part, rows = _rows(stored, index, axis=1), _rows(batch, index, axis=0)
        gradients, totals = replayed_gradients(pieces, frozen, state.trained, rows, part)
        state, norm, skipped = apply_if_finite(state, gradients, totals["loss"].sum(), optimizer)
        return state, (totals, norm, skipped)

    state, (totals, norms, skips) = jax.lax.scan(update, state, indices)
    flat, rows = {name: value.reshape(-1) for name, value in totals.items()}, indices.reshape(-1)
    losses = jnp.zeros(batch.route.shape).at[rows].add(flat["loss"] / flat["weight"])
    return advance(state, ema, skips.any()), mean_metrics(flat, batch.route[rows], pieces.spec.teachers) | {
        "grad_norm": norms.mean(),
        "skipped": skips.any().astype(jnp.float32),
        "samples/loss": losses,
    }


def loss_and_gradient(
    pieces: Pieces, frozen: Frozen, trained: Tree, batch: Batch, stored: Stored
) -> tuple[Float[Array, ""], Tree, Totals]:
    """Loss and gradient at a given trajectory, whoever rolled it out; no optimizer, no average, nothing drawn.

    `trained`: the student's parameters, as in `TrainState.trained`. `stored`: the trained steps of a rollout of the
    spec's schedule, `[T, B, …]`, T the length of `spec.window`; where it has no targets, teachers and anchor are asked
    about every sample on the way. Returns the mean loss over samples and timesteps, its gradient in float32, shaped
    like `trained`, and `TERMS` summed over timesteps `[B]`: a sample's mean of any is what it has by its `weight`.

    Raises:
      ValueError: the trajectory has another number of steps or of samples.
    """
    first, stop = pieces.spec.window
    expected = (stop - first, batch.route.shape[0])
    if stored.log_prob.shape != expected:
        raise ValueError(f"stored: found {stored.log_prob.shape} steps and samples, expected {expected}")
    with activation_rules(pieces.groups.mesh):
        gradient, totals = replayed_gradients(pieces, frozen, trained, batch, stored)
    return totals["loss"].sum() / totals["weight"].sum(), gradient, totals


def replayed_gradients(
    pieces: Pieces, frozen: Frozen, trained: Tree, batch: Batch, stored: Stored
) -> tuple[Tree, Totals]:
    """The fused gradient at stored states and actions, for parameters that may have moved since; sums per sample."""
    spec, groups = pieces.spec, pieces.groups
    parameters = pieces.student.compute(trained)

    def visit(carry: Any, step: Step) -> tuple[Any, None]:
        gradients, totals = carry
        level, at = step.level, step.inputs
        if at.targets is None:
            at = at.replace(targets=ask(pieces, frozen, batch, at.x, level))

        def loss(parameters: Tree, rows: tuple[Conditioning, Stored]) -> tuple[Array, Totals]:
            conditioning, at = rows
            v = student_velocity(pieces, frozen, parameters, conditioning, at.x, level.sigma)
            log_prob = log_density(spec.transition, level, at.x, v, at.x_next)
            terms = timestep_terms(
                spec.objective, spec.transition, level, v, at.targets, at.x, at.x_next, log_prob, at.log_prob
            )
            return terms["loss"].sum(), terms

        grads, terms = groups.gradient(jax.grad(loss, has_aux=True), parameters, (batch.conditioning, at))
        return (add(gradients, grads), add(totals, terms)), None

    init = (groups.zeros(parameters), zero_totals(batch.route.shape[0]))
    with jax.named_scope("opd_replay"):
        (gradients, totals), _ = scan_steps(visit, init, spec.levels(*spec.window), inputs=stored)
    return mean_gradient(groups, gradients, totals), totals


def collect(pieces: Pieces, frozen: Frozen, state: TrainState, batch: Batch) -> Stored:
    """Roll out under the current student; states, actions, log-densities and targets of every trained step."""
    spec, size = pieces.spec, batch.route.shape[0]
    parameters = pieces.student.compute(state.trained)
    x, keys = approach(pieces, frozen, state, parameters, batch)

    def watch(_: None, seen: Seen) -> tuple[None, Stored]:
        targets = ask(pieces, frozen, batch, seen.x, seen.level, seen.inputs)
        return None, Stored(seen.x, seen.x_next, seen.log_prob, targets)

    policy, levels = student_policy(pieces, frozen, parameters, batch.conditioning), spec.levels(*spec.window)
    picks = anchor_picks(spec, state, size)
    with jax.named_scope("opd_rollout"):
        return sample(policy, spec.transition, levels, x, keys, watch, inputs=picks)[2]


def minibatch_indices(spec: OPDSpec, state: TrainState, batch: int) -> Int[Array, "updates rows"]:
    """Rows of each update: the minibatches of a fresh permutation per pass over the rollout."""
    count, updates = spec.minibatches, spec.updates_per_rollout
    if count == 1:
        return jnp.broadcast_to(jnp.arange(batch), (updates, batch))
    passes = -(-updates // count)
    keys = jax.random.split(jax.random.fold_in(state.rng(), -1 % 2**32), passes)
    order = jax.vmap(lambda key: jax.random.permutation(key, batch))(keys)
    return order.reshape(passes * count, batch // count)[:updates]


def _rows(tree: Tree, index: Array, axis: int) -> Tree:
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis), tree)

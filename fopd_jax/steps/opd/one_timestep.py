"""The direct objective at one timestep of each rollout, drawn in proportion to the timesteps' weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fopd_jax.flow.rollout import Seen, sample, sample_keys
from fopd_jax.objectives.opd import Totals, direct_terms
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.opd.gaps import parted
from fopd_jax.steps.opd.pieces import Pieces, approach, mean_gradient, student_policy, student_says
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.opd.targets import PICKS, ask
from fopd_jax.steps.state import TrainState
from fopd_jax.worlds.prompt_stream import Batch


def picked_gradients(
    pieces: Pieces, frozen: Frozen, state: TrainState, batch: Batch, chosen: Int[Array, " b"] | None = None
) -> tuple[Tree, Totals]:
    """Gradient of the direct loss at one timestep a sample, `chosen` or drawn; sums per sample.

    A timestep's share of the draws is its share of the loss, so every sample counts the mean weight.
    """
    spec, groups = pieces.spec, pieces.groups
    parameters = pieces.student.compute(state.trained)
    shares, mean_weight = spec.shares()
    chosen = _drawn(state, shares, batch.route.shape[0]) if chosen is None else chosen
    x = _held(pieces, frozen, state, parameters, batch, chosen)
    level = jax.tree.map(lambda leaf: leaf[chosen], spec.levels(*spec.window))
    targets = ask(pieces, frozen, batch, x, level)

    def loss(parameters: Tree, rows: Any) -> tuple[Array, Totals]:
        conditioning, x, targets, sigma = rows
        _, own = student_says(pieces, frozen, parameters, conditioning, x, sigma)
        terms = direct_terms(spec.objective, own, targets, jnp.full(x.shape[:1], mean_weight), state.beta)
        return terms["loss"].sum(), terms

    rows = batch.student, x, targets, level.sigma
    gradients, totals = groups.gradient(jax.grad(loss, has_aux=True), parameters, rows)
    return mean_gradient(groups, gradients, totals), parted(spec, totals, chosen)


def _drawn(state: TrainState, shares: Any, size: int) -> Int[Array, " b"]:
    """Each sample's timestep, counted from the first trained one."""
    draws = sample_keys(jax.random.fold_in(state.rng(), PICKS), 1, size)[0]
    p = jnp.asarray(shares, jnp.float32)
    return jax.vmap(lambda key: jax.random.choice(key, len(shares), p=p))(draws)


def _held(
    pieces: Pieces, frozen: Frozen, state: TrainState, parameters: Tree, batch: Batch, chosen: Int[Array, " b"]
) -> Array:
    """Each sample's state at its chosen timestep: the rollout holds it as it passes."""
    spec = pieces.spec
    x, keys = approach(pieces, frozen, state, parameters, batch)
    first, last = spec.window[0], spec.window[1] - 1

    def watch(held: Array, seen: Seen) -> tuple[Array, None]:
        return _where(chosen == seen.inputs, seen.x, held), None

    policy, levels = student_policy(pieces, frozen, parameters, batch.student), spec.levels(first, last)
    with jax.named_scope("opd_rollout"):
        x, held, _ = sample(policy, spec.transition, levels, x, keys[:-1], watch, x, jnp.arange(last - first))
    return _where(chosen == last - first, x, held)


def _where(condition: Array, x: Array, y: Array) -> Array:
    return jnp.where(condition[:, None, None, None], x, y)

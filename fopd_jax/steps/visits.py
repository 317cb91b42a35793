"""Rollouts that are stored and gone through again, by one compiled body for both.

On policy the ratio of new to old density is 1, and clipping acts within 1e-4 of it; but two programs round the same
network differently, in bfloat16 by far more than that. So the velocity that a rollout is drawn by and the one that its
loss is taken of come from the same instructions: a *pass* takes a part of the batch through a range of timesteps, and
whether it draws the next state or finds it stored, and whether it takes a gradient or leaves the backward out, are
inputs of the one program. A rollout is a pass that draws, an update one or several that train; the parts are always the
same rows in the same places.

Part p of n holds the rows p, p + n, p + 2n, …: of every device's rows as many, so that nothing is moved.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float

from fopd_jax.flow.rollout import draw, log_density
from fopd_jax.flow.schedule import Level
from fopd_jax.flow.transition import Transition
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.state import TrainState, apply_if_finite, land

Totals = dict[str, Float[Array, " b"]]


@struct.dataclass
class Stored:
    """A rollout's trained steps: from x to x_next `[T, B, h, w, c]`, drawn with log-density `log_prob [T, B]`.

    `targets`: what others say at x, stacked likewise; None: not asked yet, or nobody is. `velocity`: the policy's own
    there, where it is kept.
    """

    x: Any  # float arrays; Any because tree operations put anything into a leaf
    x_next: Any
    log_prob: Any
    targets: Any = None
    velocity: Any = None


@dataclasses.dataclass(frozen=True)
class Course:
    """What the passes of one kind of update have in common.

    `velocity(parameters, rows, x, sigma) → (v, beside)`: the policy's, guidance included, and what of it the terms are
    of. `ask(rows, x, level, t) → targets`: of others at trained timestep t, counted from the first one.
    `terms(level, t, beside, at, log_prob, rows) → {"loss": [B], "weight": [B], …}`: one timestep's loss, what its mean
    divides by, and what is counted beside it; `at`: what is stored of it, `log_prob`: of its action under v. `names`:
    of the terms. `rows`: whatever has a leading batch axis, such as conditioning.
    """

    transition: Transition
    velocity: Callable[[Tree, Tree, Array, Array], tuple[Array, Any]]
    ask: Callable[[Tree, Array, Level, Array], Tree]
    terms: Callable[[Level, Array, Any, Stored, Array, Tree], Totals]
    names: tuple[str, ...]


@struct.dataclass
class Pass:
    """What is done with which part; 0-d each.

    `draws`: the next states are drawn, kept and asked about; else they are those that are stored. `trains`: gradients
    are taken, in the trained timesteps. `lands`: an update is made of all that was summed since the last one.
    """

    part: Any
    draws: Any
    trains: Any
    lands: Any


def visit(
    course: Course,
    groups: GradientGroups,
    parameters: Tree,
    rows: Tree,
    keys: Any,
    levels: Level,
    x: Float[Array, "b *shape"],
    stored: Stored,
    ends: tuple[Any, Any],
    trained: tuple[Any, Any],
    draws: Any,
    asks: Any,
    trains: Any,
) -> tuple[Float[Array, "b *shape"], Stored, Tree, Totals]:
    """One part through the timesteps `ends[0] <= t < ends[1]`: the last state, what is kept, sums of gradients by group
    and of terms by sample.

    `x`: where drawing begins; `keys [T, B]` and `levels` are of all timesteps, `stored` of those in `trained`, whose
    number is static; the ends may be traced. What is drawn or asked in a trained timestep is kept there.
    """
    first, stop = trained
    count, size = stored.log_prob.shape
    rows = jax.tree.map(jnp.asarray, rows)

    def body(t: Array, carry: Any) -> Any:
        x, stored, gradients, totals = carry
        level = jax.tree.map(lambda leaf: leaf[t], levels)
        inside = (first <= t) & (t < stop)
        slot = jnp.clip(t - first, 0, count - 1)
        at = jax.tree.map(lambda leaf: leaf[slot], stored)
        x = jnp.where(draws, x, at.x)
        targets = at.targets
        if asks is not False:  # what is stored may be of another form than what would be said now
            targets = jax.lax.cond(inside & asks, lambda: course.ask(rows, x, level, slot), lambda: at.targets)
        here = dataclasses.replace(at, x=x, targets=targets)
        differentiates = inside & trains

        def differentiate(parameters: Tree, members: Tree) -> tuple[Tree, Tree]:
            loss = partial(_timestep, course, level, slot, inside, draws, members)
            total, backward, seen = jax.vjp(loss, parameters, has_aux=True)
            taken = lambda: backward(jnp.ones_like(total))[0]  # noqa: E731
            return jax.lax.cond(differentiates, taken, lambda: _zeros(parameters)), seen

        grads, (acted, terms) = groups.gradient(differentiate, parameters, (rows, here, keys[t]))
        kept = jax.tree.map(lambda old, new: jnp.where(inside & (draws | asks), new, old), at, acted)
        stored = jax.tree.map(lambda whole, new: whole.at[slot].set(new.astype(whole.dtype)), stored, kept)
        counted = {name: jnp.where(differentiates, value, 0.0) for name, value in terms.items()}
        return acted.x_next, stored, add(gradients, grads), add(totals, counted)

    totals = {name: jnp.zeros(size) for name in course.names}
    init = (x, stored, groups.zeros(parameters), totals)
    return jax.lax.fori_loop(ends[0], ends[1], body, init)


def _timestep(
    course: Course, level: Level, slot: Array, inside: Array, draws: Any, members: Tree, parameters: Tree
) -> tuple[Array, tuple[Stored, Totals]]:
    """The loss of one timestep, and what was done there: the action that was drawn now, or the stored one.

    What is stored is what is measured: neither the state nor its density may be computed a second time beside it, which
    fusion does, rounding otherwise. What leaves a conditional is in memory; a barrier keeps compilers that move code
    across conditionals from it, while on CPUs it is gone before anything is fused.
    """
    rows, here, keys = members
    v, beside = course.velocity(parameters, rows, here.x, level.sigma)
    drawn = partial(draw, course.transition, level, here.x, jax.lax.stop_gradient(v), keys)
    x_next = jax.lax.optimization_barrier(jax.lax.cond(draws, lambda: drawn()[0], lambda: here.x_next))
    density = partial(log_density, course.transition, level, here.x)
    nothing = jnp.zeros(here.x.shape[:1], here.x.dtype)
    log_prob = jax.lax.optimization_barrier(jax.lax.cond(inside, lambda: density(v, x_next), lambda: nothing))
    old = jnp.where(draws, jax.lax.stop_gradient(log_prob), here.log_prob)
    acted = dataclasses.replace(here, x_next=x_next, log_prob=old)
    if here.velocity is not None:
        v_old = jax.lax.stop_gradient(v.astype(here.velocity.dtype))
        acted = dataclasses.replace(acted, velocity=jnp.where(draws, v_old, here.velocity))
    terms = course.terms(level, slot, beside, acted, log_prob, rows)
    return terms["loss"].sum(), (acted, terms)


def add(left: Tree, right: Tree) -> Tree:
    return jax.tree.map(jnp.add, left, right)


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


def blank(
    course: Course, groups: GradientGroups, rows: Tree, levels: Level, x: Array, count: int, *, velocities: bool = False
) -> Stored:
    """Room for so many trained timesteps of a batch that starts at `x`."""
    level = jax.tree.map(lambda leaf: leaf[0], levels)
    targets = jax.eval_shape(lambda rows, x: course.ask(rows, x, level, jnp.int32(0)), rows, x)
    one = Stored(x, x, jax.ShapeDtypeStruct(x.shape[:1], x.dtype), targets, x if velocities else None)
    return groups.rows(jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), one), axis=1)


# ---- updates


@struct.dataclass
class Sums:
    """Of what was trained on since the last update: gradients by group, the loss and the weight of all samples."""

    gradients: Any
    loss: Any
    weight: Any

    @classmethod
    def zeros(cls, groups: GradientGroups, parameters: Tree) -> "Sums":
        return cls(groups.zeros(parameters), jnp.zeros(()), jnp.zeros(()))

    def plus(self, gradients: Tree, totals: Totals) -> "Sums":
        return Sums(
            add(self.gradients, gradients), self.loss + totals["loss"].sum(), self.weight + totals["weight"].sum()
        )


def land_if(
    lands: Any,
    groups: GradientGroups,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    sums: Sums,
    beside: tuple[Tree, Array] | None = None,
) -> tuple[TrainState, Sums, Array, Array]:
    """One update of the mean gradient, where it `lands`: state, sums to go on with, the gradient's norm, and whether it
    was left out, not being finite. Where no sample counts nothing moves. `beside`: the gradient and the value of
    another mean loss.
    """

    def update() -> tuple[TrainState, Sums, Array, Array]:
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1), groups.total(sums.gradients))
        loss = sums.loss
        if beside is not None:
            gradients, loss = add(gradients, beside[0]), loss + beside[1]
        updated, norm, skipped = apply_if_finite(state, gradients, loss, optimizer)
        return land(sums.weight > 0, updated, state), _zeros(sums), norm, skipped

    return jax.lax.cond(lands, update, lambda: (state, sums, jnp.zeros(()), jnp.array(False)))


# ---- parts of a batch


def part_of(tree: Tree, part: Array, parts: int, axis: int = 0) -> Tree:
    """The rows `part`, `part + parts`, … of every leaf."""

    def take(leaf: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(_parted(leaf, parts, axis), part, axis + 1, keepdims=False)

    return jax.tree.map(take, tree)


def put_part(tree: Tree, rows: Tree, part: Array, parts: int, axis: int = 0) -> Tree:
    """The tree with other rows there."""

    def put(leaf: Array, new: Array) -> Array:
        found = jax.lax.dynamic_update_index_in_dim(_parted(leaf, parts, axis), new, part, axis + 1)
        return found.reshape(leaf.shape)

    return jax.tree.map(put, tree, rows)


def check_parts(batch_size: int, updates: int, minibatches: int, micro_batches: int) -> None:
    """Refuse minibatches and micro-batches that a batch does not divide into, or that no update would see.

    Raises:
      ValueError: names the field.
    """
    if minibatches > updates:
        raise ValueError(
            f"minibatches: found {minibatches}, expected at most updates_per_rollout ({updates}): the rest of each "
            "rollout would never be trained on"
        )
    if batch_size % minibatches:
        raise ValueError(f"minibatches: found {minibatches}, expected a divisor of batch_size {batch_size}")
    if batch_size % (minibatches * micro_batches):
        raise ValueError(
            f"run.micro_batches: found {micro_batches}, expected a divisor of the {batch_size // minibatches} samples "
            "a minibatch"
        )


def _parted(leaf: Array, parts: int, axis: int) -> Array:
    return leaf.reshape(*leaf.shape[:axis], -1, parts, *leaf.shape[axis + 1 :])


def make_passes(updates: int, minibatches: int, micro_batches: int) -> Pass:
    """All passes of an update, stacked: those that roll the parts out, then for each update those that train on its
    minibatch, the minibatches in turn. Minibatch m is the parts m, m + M, …: rows m, m + M, … of the batch.
    """
    parts = minibatches * micro_batches
    rolled = [(part, True, False, False) for part in range(parts)]
    trained = [
        (update % minibatches + minibatches * micro, False, True, micro == micro_batches - 1)
        for update in range(updates)
        for micro in range(micro_batches)
    ]
    part, draws, trains, lands = (np.array(each) for each in zip(*rolled, *trained, strict=True))
    return Pass(part.astype(np.int32), draws, trains, lands)

"""What trains: parameters, optimizer, exponential moving average, step and seed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from fopd_jax.config.learning import OldDecay
from fopd_jax.config.schema import EMA, Optimizer

Tree = Any


@struct.dataclass
class TrainState:
    """Everything a checkpoint holds. `step` counts optimizer updates' *outer* steps: one per batch of prompts."""

    step: Any  # int32 0-d; Any because tree operations put anything into a leaf
    seed: Any  # uint32 0-d
    trained: Tree
    opt_state: Tree
    ema: Tree
    old: Tree = None  # a second, slower copy of what trains, in stages that roll out by one or are anchored to it
    beta: Any = None  # float32 0-d: the anchor's weight, where it learns

    def rng(self) -> PRNGKeyArray:
        """The key of this step alone, so that resuming needs no generator state.

        Of one seed, `fold_in(key, i)` is also `split(key, n)[i]`, from which `init_adapter` draws layer i. So a fresh
        adapter's layer and the keys of step i come from one key, by different derivations: normal numbers there, keys
        of samples here. They are not correlated in any way that training could see, and another derivation would
        change every run that is there.
        """
        return jax.random.fold_in(jax.random.key(self.seed), self.step)


def move_average(ema: EMA, average: Tree, trained: Tree, step: jax.Array) -> Tree:
    """average ← d·average + (1 - d)·trained every `every` steps; d = min((1 + n)/(10 + n), decay) after n steps.

    The formula is that of Flow-GRPO's code. `step` counts batches of prompts, however many updates each takes.
    """
    n = step.astype(jnp.float32)
    d = jnp.minimum((1 + n) / (10 + n), ema.decay)
    d = jnp.where(step % ema.every == 0, d, jnp.ones_like(d))
    return jax.tree.map(lambda e, x: d * e + (1 - d) * x, average, trained)


def make_optimizer(settings: Optimizer) -> optax.GradientTransformation:
    """AdamW behind clipping by global norm; the rate warms up linearly over `warmup` updates, then stays.

    The schedule does not know the number of steps: a finished run can be extended.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            _schedule(settings), b1=settings.betas[0], b2=settings.betas[1], weight_decay=settings.weight_decay
        ),
    )


def _schedule(settings: Optimizer) -> optax.Schedule:
    rate, warmup = settings.learning_rate, settings.warmup
    return optax.linear_schedule(rate / max(warmup, 1), rate, max(warmup - 1, 1))


def learning_rate(settings: Optimizer, opt_state: Tree) -> jax.Array:
    """The rate of the next update of `make_optimizer(settings)`; updates that did not land have not moved it."""
    scheduled = optax.ScaleByScheduleState.__name__
    count = optax.tree.get(opt_state, "count", filtering=lambda path, _: path[-1].tuple_name == scheduled)
    return jnp.asarray(_schedule(settings)(count), jnp.float32)


def init_state(
    trained: Tree,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    keeps_old: bool = False,
    beta: float | None = None,
) -> TrainState:
    """A fresh state; the average, and the old copy where there is one, start at the initial values.

    `beta`: what the anchor's weight starts from, where it learns.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        trained=jax.tree.map(jnp.copy, trained),  # the step donates its state: the caller keeps what it gave
        opt_state=optimizer.init(trained),
        ema=jax.tree.map(jnp.copy, trained),
        old=jax.tree.map(jnp.copy, trained) if keeps_old else None,
        beta=None if beta is None else jnp.asarray(beta, jnp.float32),
    )


def apply_gradients(
    state: TrainState, gradients: Tree, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """One optimizer update without advancing `step`; also returns the gradient norm before clipping."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    return dataclasses.replace(state, trained=trained, opt_state=opt_state), optax.tree.norm(gradients)


def apply_if_finite(
    state: TrainState, gradients: Tree, loss: jax.Array, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array, jax.Array]:
    """One optimizer update, unless loss or gradient is not finite; the gradient's norm, and whether it was left out."""
    with jax.named_scope("optimizer"):
        updated, norm = apply_gradients(state, gradients, optimizer)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        return land(finite, updated, state), norm, ~finite


def land(finite: jax.Array, updated: TrainState, before: TrainState) -> TrainState:
    """The update where it is `finite`, bit by bit the state before it elsewhere."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, before)


def advance(state: TrainState, ema: EMA, skipped: jax.Array | bool = False) -> TrainState:
    """Close an outer step: count it, then move the average, unless the step was skipped."""
    step = state.step + 1
    with jax.named_scope("optimizer"):
        moved = move_average(ema, state.ema, state.trained, step)
        moved = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), moved, state.ema)
    return dataclasses.replace(state, step=step, ema=moved)


def old_decay(settings: OldDecay, step: jax.Array) -> jax.Array:
    """What is kept of the old copy at the end of a step, the first being 1."""
    grown = settings.start + settings.slope * jnp.maximum(step - settings.wait, 0).astype(jnp.float32)
    return jnp.minimum(grown, settings.limit)


def move_old(settings: OldDecay, state: TrainState, skipped: jax.Array | bool = False) -> TrainState:
    """old ← d·old + (1 - d)·trained, d being `old_decay` of the steps that are closed; a skipped one moves nothing."""
    if state.old is None:
        return state
    d = jnp.where(skipped, 1.0, old_decay(settings, state.step))
    return dataclasses.replace(state, old=jax.tree.map(lambda o, x: d * o + (1 - d) * x, state.old, state.trained))


def state_shardings(state: TrainState, optimizer: optax.GradientTransformation, trained: Tree) -> TrainState:
    """Where a state lives: averages, old copies and moments as what trains, the scalars everywhere.

    `state`: arrays or shapes; `trained`: shardings of what trains.
    """
    everywhere = NamedSharding(jax.tree.leaves(trained)[0].mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer, lambda _, place: place, state.opt_state, trained, transform_non_params=lambda _: everywhere
    )
    return TrainState(
        step=everywhere,
        seed=everywhere,
        trained=trained,
        opt_state=opt_state,
        ema=trained,
        old=None if state.old is None else trained,
        beta=None if state.beta is None else everywhere,
    )

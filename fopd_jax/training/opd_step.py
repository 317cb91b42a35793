"""One jitted OPD update: rollout, teachers, anchor, objective, optimizer.

Gradients are taken inside the scan over timesteps and summed in its carry. With one update per rollout the rollout's
velocity *is* the training velocity, so the fused form computes it once; with several, the trajectory and its targets
are stored and replayed. The last sampler step is not trained, hence not sampled.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from fopd_jax.adapters import Adapter, effective
from fopd_jax.conditioning import Conditioning
from fopd_jax.flow.rollout import sample_keys
from fopd_jax.flow.transition import Transition, standard_normal, transition_step
from fopd_jax.flow.weighting import weight
from fopd_jax.objectives.opd import Objective, check_objective, distillation_loss, divergence, trains
from fopd_jax.policy import Tree, Velocity, guided_velocity
from fopd_jax.training.state import EMA, TrainState, advance, apply_gradients

TERMS = ("loss", "teacher_gap", "anchor_gap", "velocity_mse", "ratio", "clipped", "weight")
Metrics = dict[str, jax.Array]
Totals = dict[str, Float[Array, " b"]]


@struct.dataclass
class Frozen:
    """What does not train: base network, bank of teachers (and anchor), the empty prompt (one row)."""

    variables: Tree
    bank: Tree
    null: Conditioning


@struct.dataclass
class Batch:
    """Encoded prompts `[B, …]` and each one's teacher `[B]`."""

    conditioning: Conditioning
    route: Any


@dataclasses.dataclass(frozen=True)
class OPDSpec:
    """The static part of the update.

    `teachers` names the bank's entries that are routed to, in its order; the anchor follows them. Guidance scales are
    one per bank entry and one for the student; where all of a forward's are 1 it does without the empty prompt.
    """

    objective: Objective
    transition: Transition
    sigmas: np.ndarray
    noisy: np.ndarray
    latent_shape: tuple[int, int, int]
    teachers: tuple[str, ...]
    guidance: float
    teacher_guidance: tuple[float, ...]
    updates_per_rollout: int = 1
    minibatches: int = 1

    def check(self, batch_size: int) -> None:
        """Raises ValueError naming the field where the parts do not fit."""
        check_objective(self.objective, self.transition)
        if len(self.sigmas) < 3:
            raise ValueError(
                f"sampler.num_steps: found {len(self.sigmas) - 1}, expected at least 2: the last is not trained"
            )
        if self.updates_per_rollout < 1:
            raise ValueError(f"updates_per_rollout: found {self.updates_per_rollout}, expected at least 1")
        if len(self.teacher_guidance) != len(self.teachers) + 1:
            raise ValueError(
                f"teacher_guidance: found {len(self.teacher_guidance)} scales, expected {len(self.teachers) + 1}: "
                "one per teacher and the anchor's"
            )
        if self.minibatches < 1 or batch_size % self.minibatches:
            raise ValueError(f"minibatches: found {self.minibatches}, expected a divisor of batch_size {batch_size}")
        if self.minibatches > self.updates_per_rollout:
            raise ValueError(
                f"minibatches: found {self.minibatches}, expected at most updates_per_rollout "
                f"({self.updates_per_rollout}): the rest of each rollout would never be trained on"
            )
        if not self.noisy[: len(self.sigmas) - 2].any() and trains(self.objective, jnp.zeros(())) == 0:
            raise ValueError("sampler.window: holds no trained step, so the objective would have nothing to train")


@struct.dataclass
class Level:
    """One timestep's scalars (stacked over timesteps as scan inputs)."""

    sigma: Any
    sigma_next: Any
    noisy: Any


@struct.dataclass
class Targets:
    """Velocities to match at one state: the routed teachers', and the anchor's where β > 0."""

    teacher: Any
    anchor: Any


@struct.dataclass
class Stored:
    """What replay needs of each step of a rollout, all `[T, B, …]`."""

    x: Any
    x_next: Any
    log_prob: Any
    targets: Targets


class OPDStep:
    """Builds the pieces of the update from a spec; `make` returns the jitted step."""

    def __init__(self, spec: OPDSpec, velocity: Velocity, optimizer: optax.GradientTransformation, ema: EMA) -> None:
        self.spec, self.velocity, self.optimizer, self.ema = spec, velocity, optimizer, ema
        trained = len(spec.sigmas) - 2
        sigmas = jnp.asarray(spec.sigmas)
        self.levels = Level(sigmas[:trained], sigmas[1 : trained + 1], jnp.asarray(spec.noisy[:trained]))

    def make(
        self, placed: jax.sharding.Sharding | None = None
    ) -> Callable[[Frozen, TrainState, Batch], tuple[TrainState, Metrics]]:
        """The step: fused for one update on the whole batch, replayed otherwise.

        `placed`: where the new state and the metrics live; as the state before them, or each step compiles anew.
        """
        fused = self.spec.updates_per_rollout == 1 and self.spec.minibatches == 1
        return jax.jit(self.fused if fused else self.replay, donate_argnums=1, out_shardings=placed)

    # ---- the two forms

    def fused(self, frozen: Frozen, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One pass over timesteps: sample, ask teachers, differentiate, move on."""
        gradients, totals = self.fused_gradients(frozen, state, batch)
        state, norm = apply_gradients(state, gradients, self.optimizer)
        return advance(state, self.ema), self.metrics(totals, batch.route) | {"grad_norm": norm}

    def replay(self, frozen: Frozen, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Roll out once and store; then `updates_per_rollout` updates, each on one minibatch of whole trajectories."""
        stored = self.collect(frozen, state, batch)
        indices = self.minibatch_indices(state, batch.route.shape[0])

        def update(state: TrainState, index: Array) -> tuple[TrainState, tuple[Totals, Array]]:
            part, rows = _rows(stored, index, axis=1), _rows(batch, index, axis=0)
            gradients, totals = self.replayed_gradients(frozen, state.trained, rows, part)
            state, norm = apply_gradients(state, gradients, self.optimizer)
            return state, (totals, norm)

        state, (totals, norms) = jax.lax.scan(update, state, indices)
        flat = {name: value.reshape(-1) for name, value in totals.items()}
        metrics = self.metrics(flat, batch.route[indices.reshape(-1)])
        return advance(state, self.ema), metrics | {"grad_norm": norms.mean()}

    # ---- gradients

    def fused_gradients(self, frozen: Frozen, state: TrainState, batch: Batch) -> tuple[Adapter, Totals]:
        """Gradient of the mean loss over samples and trained timesteps, sampling on the way."""
        x, keys = self.start(state, batch)

        def step(carry: Any, inputs: tuple[Level, Array]) -> tuple[Any, None]:
            x, gradients, totals = carry
            level, step_keys = inputs
            targets = self.targets(frozen, batch, x, level)

            def loss(trained: Adapter) -> tuple[Array, tuple[Array, Totals]]:
                v = self.student(frozen, trained, batch, x, level)
                x_next, log_prob = self.act(x, v, level, step_keys)
                terms = self.terms(v, targets, x, x_next, log_prob, jax.lax.stop_gradient(log_prob), level)
                return terms["loss"].sum(), (x_next, terms)

            grads, (x_next, terms) = jax.grad(loss, has_aux=True)(state.trained)
            return (x_next, _add(gradients, grads), _add(totals, terms)), None

        init = (x, _zeros(state.trained), _zero_totals(x.shape[0]))
        with jax.named_scope("opd_fused"):
            (_, gradients, totals), _ = jax.lax.scan(step, init, (self.levels, keys))
        return _reduce(gradients, totals), totals

    def replayed_gradients(
        self, frozen: Frozen, trained: Adapter, batch: Batch, stored: Stored
    ) -> tuple[Adapter, Totals]:
        """The same gradient at stored states and actions, for parameters that may have moved since."""

        def step(carry: Any, inputs: tuple[Level, Stored]) -> tuple[Any, None]:
            gradients, totals = carry
            level, at = inputs

            def loss(trained: Adapter) -> tuple[Array, Totals]:
                v = self.student(frozen, trained, batch, at.x, level)
                log_prob = self.log_prob(at.x, v, at.x_next, level)
                terms = self.terms(v, at.targets, at.x, at.x_next, log_prob, at.log_prob, level)
                return terms["loss"].sum(), terms

            grads, terms = jax.grad(loss, has_aux=True)(trained)
            return (_add(gradients, grads), _add(totals, terms)), None

        init = (_zeros(trained), _zero_totals(batch.route.shape[0]))
        with jax.named_scope("opd_replay"):
            (gradients, totals), _ = jax.lax.scan(step, init, (self.levels, stored))
        return _reduce(gradients, totals), totals

    def collect(self, frozen: Frozen, state: TrainState, batch: Batch) -> Stored:
        """Roll out under the current student; states, actions, log-densities and targets of every trained step."""
        x, keys = self.start(state, batch)

        def step(x: Array, inputs: tuple[Level, Array]) -> tuple[Array, Stored]:
            level, step_keys = inputs
            x_next, log_prob = self.act(x, self.student(frozen, state.trained, batch, x, level), level, step_keys)
            return x_next, Stored(x, x_next, log_prob, self.targets(frozen, batch, x, level))

        with jax.named_scope("opd_rollout"):
            return jax.lax.scan(step, x, (self.levels, keys))[1]

    # ---- one timestep

    def start(self, state: TrainState, batch: Batch) -> tuple[Float[Array, "b h w c"], Array]:
        """Pure noise, and the keys `[T, B]` of the trained steps; both per sample, whatever the batch or mesh."""
        keys = sample_keys(state.rng(), self.levels.sigma.shape[0] + 1, batch.route.shape[0])
        return standard_normal(keys[0], self.spec.latent_shape), keys[1:]

    def student(self, frozen: Frozen, trained: Adapter, batch: Batch, x: Array, level: Level) -> Array:
        null = frozen.null if self.spec.guidance != 1 else None
        with jax.named_scope("student"):
            return guided_velocity(
                self.velocity,
                frozen.variables,
                effective(trained),
                x,
                level.sigma,
                batch.conditioning,
                null,
                self.spec.guidance,
            )

    def targets(self, frozen: Frozen, batch: Batch, x: Array, level: Level) -> Targets:
        """Teachers and anchor as one routed forward over the bank."""
        anchored = self.spec.objective.mar_beta > 0
        scales, route, conditioning = self.spec.teacher_guidance, batch.route, batch.conditioning
        if anchored:
            anchor_route = jnp.full_like(route, len(self.spec.teachers))
            route, x = jnp.concatenate([route, anchor_route]), jnp.concatenate([x, x])
            conditioning = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), conditioning)
        null = frozen.null if any(scale != 1 for scale in scales) else None
        with jax.named_scope("teachers"):
            v = guided_velocity(
                self.velocity, frozen.variables, frozen.bank, x, level.sigma, conditioning, null,
                jnp.asarray(scales, jnp.float32)[route], route,
            )  # fmt: skip
        v = jax.lax.stop_gradient(v)
        return Targets(*jnp.split(v, 2)) if anchored else Targets(v, None)

    def act(self, x: Array, v: Array, level: Level, keys: Array) -> tuple[Array, Float[Array, " b"]]:
        """Draw the next state; noise only where the window has it."""
        transition = self.spec.transition.windowed(level.noisy)
        return transition_step(transition, x, v, level.sigma, level.sigma_next, keys)

    def log_prob(self, x: Array, v: Array, x_next: Array, level: Level) -> Float[Array, " b"]:
        """Log-density of a given next state under velocity v; zeros for a transition without one."""
        transition = self.spec.transition.windowed(level.noisy)
        if not transition.has_density:
            return jnp.zeros(x.shape[0])
        return transition.log_prob(x_next, *transition.moments(x, v, level.sigma, level.sigma_next))

    def terms(
        self, v: Array, targets: Targets, x: Array, x_next: Array, log_prob: Array, log_prob_old: Array, level: Level
    ) -> Totals:
        """Per-sample sums of one timestep: `loss` and `weight` for the reduction, the rest for metrics."""
        objective = self.spec.objective
        w = weight(objective.weighting, self.spec.transition, level.sigma, level.sigma_next)
        counts = jnp.broadcast_to(trains(objective, level.noisy), log_prob.shape)
        gap = divergence(v, targets.teacher, w)
        log_prob_teacher = self.log_prob(x, targets.teacher, x_next, level)
        loss = distillation_loss(objective, gap, log_prob, log_prob_old, log_prob_teacher)
        drift = divergence(v, targets.anchor, w) if targets.anchor is not None else jnp.zeros_like(gap)
        ratio = jnp.exp(log_prob - log_prob_old)
        terms = {
            "loss": loss + objective.mar_beta * drift,
            "teacher_gap": gap,
            "anchor_gap": drift,
            "velocity_mse": divergence(v, targets.teacher, jnp.ones_like(w)),
            "ratio": ratio,
            "clipped": (jnp.abs(ratio - 1) > objective.clip).astype(jnp.float32),
        }
        return {name: value * counts for name, value in terms.items()} | {"weight": counts}

    # ---- bookkeeping

    def minibatch_indices(self, state: TrainState, batch: int) -> Int[Array, "updates rows"]:
        """Rows of each update: the minibatches of a fresh permutation per pass over the rollout."""
        count, updates = self.spec.minibatches, self.spec.updates_per_rollout
        if count == 1:
            return jnp.broadcast_to(jnp.arange(batch), (updates, batch))
        passes = -(-updates // count)
        keys = jax.random.split(jax.random.fold_in(state.rng(), -1 % 2**32), passes)
        order = jax.vmap(lambda key: jax.random.permutation(key, batch))(keys)
        return order.reshape(passes * count, batch // count)[:updates]

    def metrics(self, totals: Totals, route: Int[Array, " b"]) -> Metrics:
        """Means over samples and trained timesteps; the teacher gap also per task."""
        total = totals["weight"].sum()
        means = {name: value.sum() / total for name, value in totals.items() if name != "weight"}
        for k, name in enumerate(self.spec.teachers):
            mine = (route == k).astype(jnp.float32)
            # A batch may hold no prompt of a task: report 0 then, not 0/0.
            means[f"teacher_gap/{name}"] = (totals["teacher_gap"] * mine).sum() / jnp.maximum(
                (totals["weight"] * mine).sum(), 1
            )
        return means


def _add(left: Tree, right: Tree) -> Tree:
    return jax.tree.map(jnp.add, left, right)


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


def _zero_totals(batch: int) -> Totals:
    return {name: jnp.zeros(batch) for name in TERMS}


def _rows(tree: Tree, index: Array, axis: int) -> Tree:
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis), tree)


def _reduce(gradients: Tree, totals: Totals) -> Tree:
    """Divide the summed gradient by the summed weight, once."""
    return jax.tree.map(lambda g: g / totals["weight"].sum(), gradients)

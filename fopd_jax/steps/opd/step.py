"""One jitted OPD update: rollout, teachers, anchor, objective, optimizer.

Gradients are taken inside the scan over timesteps and summed in its carry. With one update per rollout the rollout's
velocity *is* the training velocity, so the fused form computes it once; with several, the trajectory and its targets
are stored and replayed. The last sampler step is not trained, hence not sampled.

A step whose loss or gradient is not finite does not land: only the count of steps moves on.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import EMA, MeshShape
from fopd_jax.flow.rollout import sample_keys
from fopd_jax.flow.transition import standard_normal, transition_step
from fopd_jax.flow.weighting import weight
from fopd_jax.objectives.opd import distillation_loss, divergence, trains
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import activation_rules
from fopd_jax.policy.velocity import Tree, Velocity, guided_velocity
from fopd_jax.steps.opd.spec import Batch, Frozen, Level, OPDSpec, Stored, Targets
from fopd_jax.steps.state import TrainState, advance, apply_gradients, land
from fopd_jax.steps.student import ADAPTER, Student

PICKS = 2**32 - 2  # what the step's key is folded with for draws that are no noise
TERMS = ("loss", "teacher_gap", "anchor_gap", "velocity_mse", "ratio", "clipped", "weight")
Metrics = dict[str, jax.Array]
Totals = dict[str, Float[Array, " b"]]


class OPDStep:
    """Builds the pieces of the update from a spec; `make` returns the jitted step.

    `student`: what trains; `groups`: over which devices its gradients are summed when (default: on one device).
    """

    def __init__(
        self,
        spec: OPDSpec,
        velocity: Velocity,
        optimizer: optax.GradientTransformation,
        ema: EMA,
        student: Student = ADAPTER,
        groups: GradientGroups | None = None,
    ) -> None:
        self.spec, self.velocity, self.optimizer, self.ema = spec, velocity, optimizer, ema
        self.trains = student
        self.groups = groups or GradientGroups(make_mesh(MeshShape(), jax.devices()[:1]), (), PartitionSpec())
        trained = len(spec.sigmas) - 2
        sigmas = jnp.asarray(spec.sigmas)
        self.teacher_scales = jnp.asarray(spec.teacher_guidance, jnp.float32)
        self.levels = Level(sigmas[:trained], sigmas[1 : trained + 1], jnp.asarray(spec.noisy[:trained]))
        self.trained = slice(*spec.window)
        self.shares = spec.shares() if spec.one_timestep else (np.ones(0), 0.0)

    def make(self, placed: Any = None) -> Callable[[Frozen, TrainState, Batch], tuple[TrainState, Metrics]]:
        """The step: fused for one update on the whole batch, replayed otherwise.

        `placed`: shardings of the new state and of the metrics; as the state before them, or each step compiles anew.
        """
        fused = self.spec.updates_per_rollout == 1 and self.spec.minibatches == 1
        update = self.fused if fused else self.replay

        def step(frozen: Frozen, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            with activation_rules(self.groups.mesh):
                return update(frozen, state, batch)

        return jax.jit(step, donate_argnums=1, out_shardings=placed)

    # ---- the two forms

    def fused(self, frozen: Frozen, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One pass over timesteps: sample, ask teachers, differentiate, move on."""
        gradients_of = self.picked_gradients if self.spec.one_timestep else self.fused_gradients
        gradients, totals = gradients_of(frozen, state, batch)
        state, norm, skipped = self.update(state, gradients, totals)
        return advance(state, self.ema, skipped), self.metrics(totals, batch.route) | {
            "grad_norm": norm,
            "skipped": skipped.astype(jnp.float32),
            "samples/loss": totals["loss"] / totals["weight"],
        }

    def replay(self, frozen: Frozen, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Roll out once and store; then `updates_per_rollout` updates, each on one minibatch of whole trajectories."""
        stored = self.collect(frozen, state, batch)
        indices = self.minibatch_indices(state, batch.route.shape[0])

        def update(state: TrainState, index: Array) -> tuple[TrainState, tuple[Totals, Array, Array]]:
            part, rows = _rows(stored, index, axis=1), _rows(batch, index, axis=0)
            gradients, totals = self.replayed_gradients(frozen, state.trained, rows, part)
            state, norm, skipped = self.update(state, gradients, totals)
            return state, (totals, norm, skipped)

        state, (totals, norms, skips) = jax.lax.scan(update, state, indices)
        flat, rows = {name: value.reshape(-1) for name, value in totals.items()}, indices.reshape(-1)
        losses = jnp.zeros(batch.route.shape).at[rows].add(flat["loss"] / flat["weight"])
        return advance(state, self.ema, skips.any()), self.metrics(flat, batch.route[rows]) | {
            "grad_norm": norms.mean(),
            "skipped": skips.any().astype(jnp.float32),
            "samples/loss": losses,
        }

    def update(self, state: TrainState, gradients: Tree, totals: Totals) -> tuple[TrainState, Array, Array]:
        """One optimizer update unless loss or gradient is not finite; also the gradient's norm, and whether so."""
        updated, norm = apply_gradients(state, gradients, self.optimizer)
        finite = jnp.isfinite(norm) & jnp.isfinite(totals["loss"].sum())
        return land(finite, updated, state), norm, ~finite

    # ---- gradients

    def fused_gradients(self, frozen: Frozen, state: TrainState, batch: Batch) -> tuple[Tree, Totals]:
        """Gradient of the mean loss over samples and trained timesteps, sampling on the way."""
        parameters = self.trains.compute(state.trained)
        x, keys, picks = self.approach(frozen, state, parameters, batch)

        def step(carry: Any, inputs: tuple[Level, Array, Array]) -> tuple[Any, None]:
            x, gradients, totals = carry
            level, step_keys, pick = inputs
            targets = self.targets(frozen, batch, x, level, pick)

            def loss(parameters: Tree, rows: Any) -> tuple[Array, tuple[Array, Totals]]:
                conditioning, x, targets, step_keys = rows
                v = self.student(frozen, parameters, conditioning, x, level)
                x_next, log_prob = self.act(x, v, level, step_keys)
                terms = self.terms(v, targets, x, x_next, log_prob, jax.lax.stop_gradient(log_prob), level)
                return terms["loss"].sum(), (x_next, terms)

            rows = batch.conditioning, x, targets, step_keys
            grads, (x_next, terms) = self.groups.gradient(jax.grad(loss, has_aux=True), parameters, rows)
            return (x_next, _add(gradients, grads), _add(totals, terms)), None

        init = (x, self.groups.zeros(parameters), _zero_totals(x.shape[0]))
        with jax.named_scope("opd_fused"):
            (_, gradients, totals), _ = jax.lax.scan(step, init, (self.part(self.levels), keys, picks))
        return self.mean(gradients, totals), totals

    def picked_gradients(
        self, frozen: Frozen, state: TrainState, batch: Batch, chosen: Int[Array, " b"] | None = None
    ) -> tuple[Tree, Totals]:
        """Gradient of the direct loss at one timestep a sample, `chosen` in proportion to the timesteps' weights.

        A timestep's share of the draws is its share of the loss, so every sample counts the mean weight.
        """
        parameters, count = self.trains.compute(state.trained), batch.route.shape[0]
        x, keys, _ = self.approach(frozen, state, parameters, batch)
        shares, mean_weight = self.shares
        if chosen is None:
            draws = sample_keys(jax.random.fold_in(state.rng(), PICKS), 1, count)[0]
            p = jnp.asarray(shares, jnp.float32)
            chosen = jax.vmap(lambda key: jax.random.choice(key, len(shares), p=p))(draws)
        levels = self.part(self.levels)

        def roll(carry: tuple[Array, Array], inputs: tuple[Array, Level, Array]) -> tuple[tuple[Array, Array], None]:
            x, held = carry
            t, level, step_keys = inputs
            v = self.student(frozen, parameters, batch.conditioning, x, level)
            return (self.act(x, v, level, step_keys)[0], _where(chosen == t, x, held)), None

        earlier = jax.tree.map(lambda leaf: leaf[:-1], (jnp.arange(len(shares)), levels, keys))
        with jax.named_scope("opd_rollout"):
            (x, held), _ = jax.lax.scan(roll, (x, x), earlier)
        x = _where(chosen == len(shares) - 1, x, held)
        level = jax.tree.map(lambda leaf: leaf[chosen], levels)
        targets = self.targets(frozen, batch, x, level)

        def loss(parameters: Tree, rows: Any) -> tuple[Array, Totals]:
            conditioning, x, targets, level = rows
            v = self.student(frozen, parameters, conditioning, x, level)
            terms = self.direct_terms(v, targets, jnp.full(x.shape[:1], mean_weight))
            return terms["loss"].sum(), terms

        rows = batch.conditioning, x, targets, level
        gradients, totals = self.groups.gradient(jax.grad(loss, has_aux=True), parameters, rows)
        return self.mean(gradients, totals), totals

    def replayed_gradients(self, frozen: Frozen, trained: Tree, batch: Batch, stored: Stored) -> tuple[Tree, Totals]:
        """The same gradient at stored states and actions, for parameters that may have moved since."""
        parameters = self.trains.compute(trained)

        def step(carry: Any, inputs: tuple[Level, Stored]) -> tuple[Any, None]:
            gradients, totals = carry
            level, at = inputs

            def loss(parameters: Tree, rows: tuple[Conditioning, Stored]) -> tuple[Array, Totals]:
                conditioning, at = rows
                v = self.student(frozen, parameters, conditioning, at.x, level)
                log_prob = self.log_prob(at.x, v, at.x_next, level)
                terms = self.terms(v, at.targets, at.x, at.x_next, log_prob, at.log_prob, level)
                return terms["loss"].sum(), terms

            rows = batch.conditioning, at
            grads, terms = self.groups.gradient(jax.grad(loss, has_aux=True), parameters, rows)
            return (_add(gradients, grads), _add(totals, terms)), None

        init = (self.groups.zeros(parameters), _zero_totals(batch.route.shape[0]))
        with jax.named_scope("opd_replay"):
            (gradients, totals), _ = jax.lax.scan(step, init, (self.part(self.levels), stored))
        return self.mean(gradients, totals), totals

    def mean(self, sums: Tree, totals: Totals) -> Tree:
        """Add the groups' sums and divide by the summed weight, once."""
        weight = totals["weight"].sum()
        return jax.tree.map(lambda g: g / weight, self.groups.total(sums))

    def collect(self, frozen: Frozen, state: TrainState, batch: Batch) -> Stored:
        """Roll out under the current student; states, actions, log-densities and targets of every trained step."""
        parameters = self.trains.compute(state.trained)
        x, keys, picks = self.approach(frozen, state, parameters, batch)

        def step(x: Array, inputs: tuple[Level, Array, Array]) -> tuple[Array, Stored]:
            level, step_keys, pick = inputs
            v = self.student(frozen, parameters, batch.conditioning, x, level)
            x_next, log_prob = self.act(x, v, level, step_keys)
            return x_next, Stored(x, x_next, log_prob, self.targets(frozen, batch, x, level, pick))

        with jax.named_scope("opd_rollout"):
            return jax.lax.scan(step, x, (self.part(self.levels), keys, picks))[1]

    # ---- one timestep

    def start(self, state: TrainState, batch: Batch) -> tuple[Float[Array, "b h w c"], Array]:
        """Pure noise, and the keys `[T, B]` of the trained steps; both per sample, whatever the batch or mesh."""
        keys = sample_keys(state.rng(), self.levels.sigma.shape[0] + 1, batch.route.shape[0])
        return standard_normal(keys[0], self.spec.latent_shape), keys[1:]

    def approach(
        self, frozen: Frozen, state: TrainState, parameters: Tree, batch: Batch
    ) -> tuple[Float[Array, "b h w c"], Array, Int[Array, "t n"]]:
        """The state at the first trained timestep, and of the trained ones the keys and whom the anchor is asked of."""
        x, keys = self.start(state, batch)

        def step(x: Array, inputs: tuple[Level, Array]) -> tuple[Array, None]:
            level, step_keys = inputs
            v = self.student(frozen, parameters, batch.conditioning, x, level)
            return self.act(x, v, level, step_keys)[0], None

        first, every = self.spec.window[0], self.spec.anchor_every
        if first:
            with jax.named_scope("opd_approach"):
                x, _ = jax.lax.scan(step, x, jax.tree.map(lambda leaf: leaf[:first], (self.levels, keys)))
        shape = (keys.shape[0], x.shape[0] // every)
        picks = jax.random.randint(jax.random.fold_in(state.rng(), PICKS), shape, 0, every)
        return x, self.part(keys), self.part(picks)

    def part(self, tree: Tree) -> Tree:
        """The trained timesteps of something stacked over all."""
        return jax.tree.map(lambda leaf: leaf[self.trained], tree)

    def student(
        self, frozen: Frozen, parameters: Tree, conditioning: Conditioning, x: Array, level: Level
    ) -> Float[Array, "b h w c"]:
        null = frozen.null if self.spec.guidance != 1 else None
        variables, adapter = self.trains.read(frozen.variables, parameters)
        with jax.named_scope("student"):
            return guided_velocity(
                self.velocity, variables, adapter, x, level.sigma, conditioning, null, self.spec.guidance
            )

    def targets(
        self, frozen: Frozen, batch: Batch, x: Array, level: Level, pick: Int[Array, " n"] | None = None
    ) -> Targets:
        """What teachers and anchor say at x, without gradient; `pick`: which of `anchor_every` rows the anchor gets."""
        ask = self.ask_networks if self.spec.whole_teachers else self.ask_adapters
        pick = jnp.zeros(batch.route.shape, jnp.int32) if pick is None else pick
        with jax.named_scope("teachers"):
            return jax.lax.stop_gradient(ask(frozen, batch, x, level, pick))

    def ask_adapters(self, frozen: Frozen, batch: Batch, x: Array, level: Level, pick: Array) -> Targets:
        """Teachers and anchor as one routed forward over the bank.

        The anchor's row stands behind the rows that it was picked from: rows stay on the devices that hold them.
        """
        every, anchor = self.spec.anchor_every, len(self.spec.teachers)
        rows = batch.conditioning, x, jnp.broadcast_to(level.sigma, x.shape[:1]), batch.route
        if self.anchored:
            rows = jax.tree.map(lambda leaf: _behind(leaf, pick, every), rows)
            rows = (*rows[:3], rows[3].reshape(-1, every + 1).at[:, every].set(anchor).reshape(-1))
        conditioning, x, sigma, route = rows
        v = guided_velocity(
            self.velocity, frozen.variables, frozen.bank, x, sigma, conditioning, self.teachers_null(frozen),
            self.teacher_scales[route], route,
        )  # fmt: skip
        if not self.anchored:
            return Targets(v)
        blocks = v.reshape(-1, every + 1, *v.shape[1:])
        counts = jnp.where(jnp.arange(every)[None] == pick[:, None], float(every), 0.0)
        said = jnp.repeat(blocks[:, every], every, axis=0)
        return Targets(blocks[:, :every].reshape(-1, *v.shape[1:]), said, counts.reshape(-1))

    def ask_networks(self, frozen: Frozen, batch: Batch, x: Array, level: Level, pick: Array) -> Targets:
        """Whole networks in turn, each on all samples, of which its own are kept.

        Their weights are gathered layer by layer like the student's, so only one network's shards are ever whole.
        """
        null, count = self.teachers_null(frozen), len(self.spec.teachers)

        def ask(v: Array, inputs: tuple[Array, Array, Tree]) -> tuple[Array, None]:
            k, scale, params = inputs
            variables = {"params": params, "constants": frozen.variables["constants"]}
            found = guided_velocity(self.velocity, variables, {}, x, level.sigma, batch.conditioning, null, scale)
            mine = jnp.stack([batch.route == k, jnp.broadcast_to(k == count, batch.route.shape)])
            return jnp.where(mine[..., None, None, None], found[None], v), None

        asked = count + self.anchored
        bank = jax.tree.map(lambda leaf: leaf[:asked], frozen.bank)
        inputs = (jnp.arange(asked), self.teacher_scales[:asked], bank)
        teacher, anchor = jax.lax.scan(ask, jnp.zeros((2, *x.shape), x.dtype), inputs)[0]
        return Targets(teacher, anchor if self.anchored else None)

    @property
    def anchored(self) -> bool:
        return self.spec.objective.mar_beta > 0

    def teachers_null(self, frozen: Frozen) -> Conditioning | None:
        return frozen.null if any(scale != 1 for scale in self.spec.teacher_guidance) else None

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
        direct = self.direct_terms(v, targets, jnp.broadcast_to(w, log_prob.shape))
        log_prob_teacher = self.log_prob(x, targets.teacher, x_next, level)
        loss = distillation_loss(objective, direct["teacher_gap"], log_prob, log_prob_old, log_prob_teacher)
        ratio = jnp.exp(log_prob - log_prob_old)
        terms = direct | {
            "loss": loss + objective.mar_beta * direct["anchor_gap"],
            "ratio": ratio,
            "clipped": (jnp.abs(ratio - 1) > objective.clip).astype(jnp.float32),
        }
        return {name: value * counts for name, value in terms.items()}

    def direct_terms(self, v: Array, targets: Targets, w: Float[Array, " b"]) -> Totals:
        """The direct objective's terms at one state a sample, each counting w."""
        gap = divergence(v, targets.teacher, w)
        drift = jnp.zeros_like(gap)
        if targets.anchor is not None:
            drift = divergence(v, targets.anchor, w if targets.anchored is None else w * targets.anchored)
        return {
            "loss": gap + self.spec.objective.mar_beta * drift,
            "teacher_gap": gap,
            "anchor_gap": drift,
            "velocity_mse": divergence(v, targets.teacher, jnp.ones_like(w)),
            "ratio": jnp.ones_like(gap),
            "clipped": jnp.zeros_like(gap),
            "weight": jnp.ones_like(gap),
        }

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


def _zero_totals(batch: int) -> Totals:
    return {name: jnp.zeros(batch) for name in TERMS}


def _rows(tree: Tree, index: Array, axis: int) -> Tree:
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis), tree)


def _where(condition: Array, x: Array, y: Array) -> Array:
    return jnp.where(condition[:, None, None, None], x, y)


def _behind(leaf: Array, pick: Array, every: int) -> Array:
    """Rows in blocks of `every`, each followed by a copy of the row in it that was picked."""
    blocks = leaf.reshape(-1, every, *leaf.shape[1:])
    picked = blocks[:, 0]
    for k in range(1, every):  # a selection, not a gather, which could move rows between devices
        picked = jnp.where((pick == k).reshape(-1, *(1,) * (picked.ndim - 1)), blocks[:, k], picked)
    return jnp.concatenate([blocks, picked[:, None]], axis=1).reshape(-1, *leaf.shape[1:])

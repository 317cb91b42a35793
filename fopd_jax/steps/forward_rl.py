"""Reinforcement on the forward process: the old policy rolls out, and its final latents are noised and learned from.

Nothing of the way to a latent is kept, so that any sampler will do. Every latent is trained on at some noise levels,
each with noise of its own: both are functions of the seed, the step, the row and the number of the level alone. The
policy's, the old policy's and the base's velocities are compared there (`objectives.forward_rl`). Where the old policy
is the current one throughout, it has no copy, and its velocity is the policy's own: one forward less.

Part p of n holds the rows p, p + n, p + 2n, …, or as many whole groups where a loss compares within them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int, Key

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.learning import ForwardObjective, OldDecay, TrainedLevels
from fopd_jax.config.schema import EMA
from fopd_jax.flow.rollout import sample_keys, starting_keys
from fopd_jax.flow.schedule import make_levels
from fopd_jax.flow.solver import Solver, solve
from fopd_jax.flow.transition import at_least_float32, standard_normal
from fopd_jax.objectives.forward_rl import Noised, Totals, forward_terms, term_names
from fopd_jax.parallel.gradients import GradientGroups, on_one_device
from fopd_jax.parallel.sharding import activation_rules, check_parted
from fopd_jax.policy.velocity import Tree, Velocity, guided_velocity
from fopd_jax.steps.grpo.metrics import Tasks, credit_metrics, credit_names
from fopd_jax.steps.grpo.spec import Base, Credit
from fopd_jax.steps.state import TrainState, advance, move_old, old_decay
from fopd_jax.steps.student import ADAPTER, Student
from fopd_jax.steps.visits import Sums, add, check_parts, land_if, part_of

Metrics = dict[str, jax.Array]
NOISE, LEVELS = 2**32 - 5, 2**32 - 6  # what a step's key is folded with for what latents are noised with, and to
LEAST_LEVEL = 0.01  # of the continuous ones: below it a latent has next to nothing to learn from
WITHIN = 1 - 1e-4  # of a stratum: rounded to float32, no draw falls into the next


@dataclasses.dataclass(frozen=True)
class ForwardSpec:
    """The static part. `group`: neighbouring rows that come from one draw of a prompt; `rewards`: their names.

    `limit`: of advantages; `shift`: of continuous levels; `keeps_old`: whether the old policy has a copy of its own.
    """

    objective: ForwardObjective
    levels: TrainedLevels
    old: OldDecay
    keeps_old: bool
    solver: Solver
    sigmas: np.ndarray
    shift: float
    latent_shape: tuple[int, int, int]
    guidance: float
    group: int
    limit: float
    rewards: tuple[str, ...]
    tasks: Tasks = dataclasses.field(default_factory=dict)
    shared_noise: bool = False
    updates_per_rollout: int = 1
    minibatches: int = 1
    micro_batches: int = 1

    def check(self, batch_size: int, groups: GradientGroups) -> None:
        """Raises ValueError naming the field where the parts do not fit one another or the mesh."""
        steps, (start, stop) = len(self.sigmas) - 1, self.within
        if not 0 <= start < stop <= steps:
            raise ValueError(f"levels.within: found {(start, stop)}, expected 0 <= start < stop <= {steps}")
        check_parts(batch_size, self.updates_per_rollout, self.minibatches, self.micro_batches)
        check_parted(batch_size, self.parts, self.micro_batches, groups.mesh)
        wanted = self.parts * groups.count
        if self.unit > 1 and (batch_size // self.group) % wanted:
            raise ValueError(
                f"objective.name: found {self.objective.name!r}, which compares within groups: expected a batch whose "
                f"{batch_size // self.group} groups are a multiple of {wanted}, the parts (minibatches x "
                "run.micro_batches) times what run.reduce_once keeps apart"
            )

    @property
    def within(self) -> tuple[int, int]:
        """The steps of the schedule whose levels are trained."""
        return self.levels.within or (0, max(len(self.sigmas) - 2, 1))

    @property
    def times(self) -> int:
        """Levels a latent."""
        return self.levels.times or self.within[1] - self.within[0]

    @property
    def parts(self) -> int:
        """Of a batch, that go through the network one after the other."""
        return self.minibatches * self.micro_batches

    @property
    def unit(self) -> int:
        """Neighbouring rows that stay together, and share their levels."""
        return self.group if self.objective.name == "crd" else 1

    @property
    def asks_reference(self) -> bool:
        return self.objective.kl_beta > 0


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a step is made of. `policy`: what trains; `groups`: over which devices gradients are summed when."""

    spec: ForwardSpec
    velocity: Velocity
    policy: Student = ADAPTER
    groups: GradientGroups = dataclasses.field(default_factory=on_one_device)

    def guided(self, base: Base, weights: tuple[Tree, Tree], scale: float) -> Callable[..., Array]:
        """`(conditioning, x, sigma) → v` of variables and adapter under a guidance scale, in float32 or wider."""
        null = base.null if scale != 1 else None

        def velocity(conditioning: Conditioning, x: Array, sigma: Array) -> Array:
            return at_least_float32(guided_velocity(self.velocity, *weights, x, sigma, conditioning, null, scale))

        return velocity


# ---- rolling out


def roll_out(pieces: Pieces, base: Base, state: TrainState, conditioning: Conditioning) -> Float[Array, "b h w c"]:
    """Final latents of the old policy: each sample's a function of the seed, the step and its row."""
    spec, size = pieces.spec, jax.tree.leaves(conditioning)[0].shape[0]
    keys = sample_keys(state.rng(), len(spec.sigmas), size)
    starts = starting_keys(keys, spec.group if spec.shared_noise else 1)
    weights = pieces.policy.policy(base.variables, state.trained if state.old is None else state.old)
    velocity = pieces.guided(base, weights, spec.guidance)

    def draw(part: Array) -> Array:
        own, start = part_of((conditioning, starts), part, spec.parts)
        x = pieces.groups.rows(standard_normal(start, spec.latent_shape))
        steps = part_of(keys[1:], part, spec.parts, axis=1)
        policy = lambda x, sigma: velocity(own, x, sigma)  # noqa: E731
        return solve(spec.solver, policy, make_levels(spec.sigmas), x, steps)

    with jax.named_scope("rollout"):
        drawn = jax.lax.map(draw, jnp.arange(spec.parts))  # [part, row of it, ...]
    return pieces.groups.rows(jnp.moveaxis(drawn, 0, 1).reshape(size, *spec.latent_shape))


# ---- learning


def draw_levels(
    spec: ForwardSpec, rng: Key[Array, ""], rows: Int[Array, " b"], visit: Int[Array, ""]
) -> Float[Array, "t b"]:
    """Noise levels of some rows, one of each of as many equal shares of the distribution, in any order.

    Of 'schedule', where all are asked for, each once.
    """
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(rng, row), visit))(rows // spec.unit * spec.unit)

    def strata(key: Key[Array, ""]) -> Float[Array, " t"]:
        order, inside = jax.random.split(key)
        whole = jax.random.permutation(order, spec.times).astype(jnp.float32)
        return (whole + jax.random.uniform(inside, (spec.times,), maxval=WITHIN)) / spec.times

    u = jax.vmap(strata)(keys).T
    if spec.levels.distribution == "schedule":
        start, stop = spec.within
        index = jnp.minimum(jnp.floor(u * (stop - start)).astype(jnp.int32), stop - start - 1)
        return jnp.asarray(spec.sigmas)[start + index]
    s = u if spec.levels.distribution == "uniform" else jax.nn.sigmoid(ndtri(jnp.maximum(u, 1e-6)))
    return jnp.maximum(spec.shift * s / (1 + (spec.shift - 1) * s), LEAST_LEVEL)


def learn(
    pieces: Pieces,
    optimizer: optax.GradientTransformation,
    ema: EMA,
    base: Base,
    state: TrainState,
    latents: Float[Array, "b h w c"],
    conditioning: Conditioning,
    credit: Credit,
) -> tuple[TrainState, Metrics]:
    """All updates on final latents, and the end of the step."""
    spec, rng = pieces.spec, state.rng()
    whole = latents, conditioning, credit.advantage, credit.counts, jnp.arange(latents.shape[0])

    def visit(carry: tuple[TrainState, Sums], each: tuple[Array, Array, Array]) -> Any:
        (state, sums), (part, number, lands) = carry, each
        rows = _part_of(spec, whole, part)
        gradients, totals = _gradients(pieces, base, state, rows, number, rng)
        state, sums, norm, skipped = land_if(lands, pieces.groups, optimizer, state, sums.plus(gradients, totals))
        return (state, sums), (totals, norm, skipped)

    sums = Sums.zeros(pieces.groups, pieces.policy.compute(state.trained))
    (state, _), (totals, norms, skips) = jax.lax.scan(visit, (state, sums), _visits(spec))
    skipped = skips.any()
    state = move_old(spec.old, advance(state, ema, skipped), skipped)
    weight = totals["weight"].sum()
    means = {name: value.sum() / jnp.maximum(weight, 1) for name, value in totals.items() if name != "weight"}
    return state, {
        **means,
        **{f"weights/{name}": weight for name in means},
        **credit_metrics(spec.rewards, credit, spec.tasks),
        "old_decay": old_decay(spec.old, state.step) if spec.keeps_old else jnp.zeros(()),
        "grad_norm": norms.sum() / spec.updates_per_rollout,
        "skipped": skipped.astype(jnp.float32),
        "samples/advantage": credit.advantage,
    }


def metric_names(spec: ForwardSpec) -> tuple[str, ...]:
    """Of the scalars that a step returns, weights apart."""
    terms = (name for name in term_names(spec.objective) if name != "weight")
    return (*terms, *credit_names(spec.rewards, spec.tasks), "old_decay", "grad_norm", "skipped")


def _visits(spec: ForwardSpec) -> tuple[Int[Array, " n"], Int[Array, " n"], Array]:
    """Of the parts that are trained on, in turn: which it is, how often it was before, whether an update follows."""
    found = [
        (update % spec.minibatches + spec.minibatches * micro, update // spec.minibatches, micro + 1)
        for update in range(spec.updates_per_rollout)
        for micro in range(spec.micro_batches)
    ]
    part, number, last = (jnp.asarray(each, jnp.int32) for each in zip(*found, strict=True))
    return part, number, last == spec.micro_batches


def _part_of(spec: ForwardSpec, tree: Tree, part: Array) -> Tree:
    together = jax.tree.map(lambda leaf: leaf.reshape(-1, spec.unit, *leaf.shape[1:]), tree)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), part_of(together, part, spec.parts))


def _gradients(
    pieces: Pieces, base: Base, state: TrainState, rows: Tree, number: Array, rng: Key[Array, ""]
) -> tuple[Tree, Totals]:
    """Of one part at all its levels, in turn: sums of gradients by group of devices, and of terms by sample."""
    spec, groups = pieces.spec, pieces.groups
    x0, conditioning, advantage, counts, index = rows
    levels = draw_levels(spec, jax.random.fold_in(rng, LEVELS), index, number)
    parameters = pieces.policy.compute(state.trained)

    def body(time: Array, carry: tuple[Tree, Totals]) -> tuple[Tree, Totals]:
        keys = _noise_keys(jax.random.fold_in(rng, NOISE), index, number * spec.times + time)
        noised = Noised(x0, groups.rows(standard_normal(keys, spec.latent_shape)), levels[time], None)
        noised = _ask(pieces, base, state, noised, conditioning)

        def differentiate(parameters: Tree, members: Tree) -> tuple[Tree, Totals]:
            def loss(parameters: Tree) -> tuple[Array, Totals]:
                terms = _terms(pieces, base, parameters, *members)
                return terms["loss"].sum(), terms

            return jax.grad(loss, has_aux=True)(parameters)

        members = noised, conditioning, advantage, counts
        gradients, terms = groups.gradient(differentiate, parameters, members)
        return add(carry[0], gradients), add(carry[1], terms)

    totals = {name: jnp.zeros(len(index)) for name in term_names(spec.objective)}
    return jax.lax.fori_loop(0, spec.times, body, (groups.zeros(parameters), totals))


def _noise_keys(rng: Key[Array, ""], rows: Int[Array, " b"], time: Array) -> Key[Array, " b"]:
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(rng, row), time))(rows)


def _ask(pieces: Pieces, base: Base, state: TrainState, at: Noised, conditioning: Conditioning) -> Noised:
    """With what the old policy and the base say there, as far as they are asked."""
    spec, x = pieces.spec, at.state
    if state.old is not None:
        with jax.named_scope("old"):
            old = pieces.guided(base, pieces.policy.policy(base.variables, state.old), spec.guidance)
            at = dataclasses.replace(at, old=old(conditioning, x, at.t))
    if spec.asks_reference:
        with jax.named_scope("reference"):
            reference = pieces.guided(base, (base.variables, {}), spec.objective.reference_guidance)
            at = dataclasses.replace(at, reference=reference(conditioning, x, at.t))
    return jax.lax.stop_gradient(at)


def _terms(
    pieces: Pieces,
    base: Base,
    parameters: Tree,
    at: Noised,
    conditioning: Conditioning,
    advantage: Array,
    counts: Array,
) -> Totals:
    """`term_names` of one level, of the policy that is read from `parameters`."""
    spec = pieces.spec
    with jax.named_scope("policy"):
        policy = pieces.guided(base, pieces.policy.read(base.variables, parameters), spec.guidance)
        v = policy(conditioning, at.state, at.t)
    if at.old is None:
        at = dataclasses.replace(at, old=jax.lax.stop_gradient(v))
    return forward_terms(spec.objective, v, at, advantage, counts, spec.limit, spec.unit)


# ---- programs


@dataclasses.dataclass(frozen=True)
class Programs:
    """`roll_out` and `learn`, jitted; the latter donates its state."""

    roll_out: Callable[[Base, TrainState, Conditioning], Array]
    learn: Callable[[Base, TrainState, Array, Conditioning, Credit], tuple[TrainState, Metrics]]


def make_programs(
    pieces: Pieces, optimizer: optax.GradientTransformation, ema: EMA, places: Any = None, everywhere: Any = None
) -> Programs:
    """`places`: shardings of the state; `everywhere`: of metrics."""

    def roll_out_(base: Base, state: TrainState, conditioning: Conditioning) -> Array:
        with activation_rules(pieces.groups.mesh):
            return roll_out(pieces, base, state, conditioning)

    def learn_(base: Base, state: TrainState, *rest: Any) -> tuple[TrainState, Metrics]:
        with activation_rules(pieces.groups.mesh):
            return learn(pieces, optimizer, ema, base, state, *rest)

    return Programs(jax.jit(roll_out_), jax.jit(learn_, donate_argnums=1, out_shardings=(places, everywhere)))

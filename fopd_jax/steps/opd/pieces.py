"""What every form of the OPD update is made of: the student's velocity, the way to the trained steps, the reduction."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.flow.rollout import PolicyVelocity, sample, sample_keys
from fopd_jax.flow.transition import standard_normal
from fopd_jax.objectives.opd import TERMS, Compared, Totals, compared, needs_old_velocity
from fopd_jax.parallel.gradients import GradientGroups, on_one_device
from fopd_jax.policy.guidance import guided
from fopd_jax.policy.velocity import Tree, Velocity, branches, guided_velocity
from fopd_jax.steps.opd.gaps import gap_metrics
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.state import TrainState
from fopd_jax.steps.student import ADAPTER, Student
from fopd_jax.worlds.prompt_stream import Batch

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What the loss and its gradient are made of.

    `student`: what trains; `groups`: over which devices its gradients are summed when (default: on one device).
    `voices`: velocities of the other networks among the teachers, by name.
    """

    spec: OPDSpec
    velocity: Velocity
    student: Student = ADAPTER
    groups: GradientGroups = dataclasses.field(default_factory=on_one_device)
    voices: Mapping[str, Velocity] = dataclasses.field(default_factory=dict)


def student_velocity(
    pieces: Pieces, frozen: Frozen, parameters: Tree, conditioning: Conditioning, x: Array, sigma: Array
) -> Float[Array, "b h w c"]:
    """The student's guided velocity; `parameters`: what `student.compute` made of the trained ones."""
    guidance = pieces.spec.guidance
    null = frozen.null if guidance != 1 else None
    variables, adapter = pieces.student.read(frozen.variables, parameters)
    with jax.named_scope("student"):
        return guided_velocity(pieces.velocity, variables, adapter, x, sigma, conditioning, null, guidance)


def student_says(
    pieces: Pieces, frozen: Frozen, parameters: Tree, conditioning: Conditioning, x: Array, sigma: Array
) -> tuple[Float[Array, "b h w c"], Compared]:
    """The same, and what of the student is held to its targets."""
    spec = pieces.spec
    if spec.objective.match == "guided" or (spec.guidance == 1 and not spec.apart):
        v = student_velocity(pieces, frozen, parameters, conditioning, x, sigma)
        own = Compared(v)
    else:
        variables, adapter = pieces.student.read(frozen.variables, parameters)
        with jax.named_scope("student"):
            text, null = branches(pieces.velocity, variables, adapter, x, sigma, conditioning, frozen.null)
        v, own = guided(text, null, spec.guidance), compared(spec.objective.match, text, null)
    return v, dataclasses.replace(own, acting=v) if needs_old_velocity(spec.objective) else own


def student_policy(pieces: Pieces, frozen: Frozen, parameters: Tree, conditioning: Conditioning) -> PolicyVelocity:
    """The same as a function of state and noise level, to sample with."""
    return lambda x, sigma: student_velocity(pieces, frozen, parameters, conditioning, x, sigma)


def start(spec: OPDSpec, state: TrainState, size: int) -> tuple[Float[Array, "b h w c"], Array]:
    """Pure noise, and the keys `[T, B]` of all steps but the last; both per sample, whatever the batch or mesh."""
    keys = sample_keys(state.rng(), len(spec.sigmas) - 1, size)
    return standard_normal(keys[0], spec.latent_shape), keys[1:]


def approach(
    pieces: Pieces, frozen: Frozen, state: TrainState, parameters: Tree, batch: Batch
) -> tuple[Float[Array, "b h w c"], Array]:
    """The state at the first trained timestep, and the keys of the trained ones."""
    spec = pieces.spec
    x, keys = start(spec, state, batch.route.shape[0])
    first, stop = spec.window
    if first:
        policy = student_policy(pieces, frozen, parameters, batch.student)
        with jax.named_scope("opd_approach"):
            x, _, _ = sample(policy, spec.transition, spec.levels(0, first), x, keys[:first])
    return x, keys[first:stop]


# ---- sums, and the one reduction


def add(left: Tree, right: Tree) -> Tree:
    return jax.tree.map(jnp.add, left, right)


def zero_totals(size: int, names: tuple[str, ...] = TERMS) -> Totals:
    return {name: jnp.zeros(size) for name in names}


def mean_gradient(groups: GradientGroups, sums: Tree, totals: Totals) -> Tree:
    """Add the groups' sums and divide by the summed weight, once."""
    weight = totals["weight"].sum()
    return jax.tree.map(lambda g: g / weight, groups.total(sums))


def metric_names(teachers: tuple[str, ...], gaps: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Of the scalars that an update returns, weights apart; `gaps`: those of `gaps.gap_names`."""
    means = (name for name in TERMS if name != "weight")
    return (*means, *(f"teacher_gap/{name}" for name in teachers), *gaps, "grad_norm", "skipped")


def regular_names(spec: OPDSpec) -> tuple[str, ...]:
    """Of those that what regularises adds to them."""
    return ("offline_loss",) * (spec.offline is not None) + ("mar_beta",) * (spec.bound is not None)


def mean_metrics(totals: Totals, route: Int[Array, " b"], teachers: tuple[str, ...]) -> Metrics:
    """Means over samples and trained timesteps; the teacher gap also per task, with the weight that a mean over
    several steps gives it: a batch may hold no prompt of a task, which then has gap and weight 0, not 0/0. With
    `gaps.parted` totals its plain square also per task and timestep."""
    weight = totals["weight"]
    means = {name: totals[name].sum() / weight.sum() for name in TERMS if name != "weight"}
    for k, name in enumerate(teachers):
        mine = (route == k).astype(jnp.float32)
        counted = (weight * mine).sum()
        means[f"teacher_gap/{name}"] = (totals["teacher_gap"] * mine).sum() / jnp.maximum(counted, 1)
        means[f"weights/teacher_gap/{name}"] = counted
    return means | gap_metrics(totals, route, teachers)

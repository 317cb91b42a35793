"""From a config to the jitted OPD update, or the programs of its mixed form, and to where what trains lives.

No weights and no devices are needed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from fopd_jax.backbones.record import Pass
from fopd_jax.backbones.registry import family_of
from fopd_jax.config.rules import within
from fopd_jax.config.schema import EMA, OPD
from fopd_jax.config.stages import is_mixed, taught
from fopd_jax.config.teaching import PAPER_GUIDANCE
from fopd_jax.flow.rollout import noise_window
from fopd_jax.flow.schedule import flow_match_sigmas, sublevels
from fopd_jax.flow.transition import make_transition
from fopd_jax.parallel.sharding import AnyMesh, batch_ways, check_batch, check_parted, replicated
from fopd_jax.performance.flops import NOTHING, Schedule, Update, update_flops
from fopd_jax.policy.velocity import Tree, Velocity, make_velocity
from fopd_jax.stages.coordinates import check_coordinates, skills
from fopd_jax.stages.grouping import asked_flops, slots_of
from fopd_jax.stages.rewards import reward_names, told_apart
from fopd_jax.stages.routing import asked
from fopd_jax.stages.trained import Trained, make_trained
from fopd_jax.steps.grpo.step import Programs
from fopd_jax.steps.opd.mixed import make_programs
from fopd_jax.steps.opd.pieces import Pieces
from fopd_jax.steps.opd.spec import Bound, OPDSpec
from fopd_jax.steps.opd.step import OPDStep, make_step
from fopd_jax.steps.state import TrainState


@dataclasses.dataclass(frozen=True)
class OPDUpdate:
    """The update of a config on a mesh: `step(frozen, state, batch)`, jitted, its state donated.

    `trained`: what its state holds, and where. `pieces`, `optimizer`, `ema`: what the step is made of.
    """

    step: OPDStep
    trained: Trained
    pieces: Pieces
    optimizer: optax.GradientTransformation
    ema: EMA

    @property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return self.trained.state


@dataclasses.dataclass(frozen=True)
class MixedUpdate:
    """The same of objective 'mixed', as programs that a host drives."""

    programs: Programs
    pieces: Pieces
    trained: Trained


def make_update(
    config: OPD,
    model: Any,
    boxed: Tree,
    spec: OPDSpec,
    optimizer: optax.GradientTransformation,
    mesh: AnyMesh,
    voices: Mapping[str, Velocity] | None = None,
) -> OPDUpdate:
    """Build the update; `boxed`: the network's variables as shapes with logical axes. `voices`: see `Pieces`.

    Raises:
      ValueError: names the field that is out of range, or that does not go with another.
    """
    trained, pieces = _make_pieces(config, model, boxed, spec, optimizer, mesh, voices)
    step = make_step(pieces, optimizer, config.ema, (trained.places, replicated(mesh)))
    return OPDUpdate(step, trained, pieces, optimizer, config.ema)


def make_mixed(
    config: OPD,
    model: Any,
    boxed: Tree,
    spec: OPDSpec,
    optimizer: optax.GradientTransformation,
    mesh: AnyMesh,
    voices: Mapping[str, Velocity] | None = None,
) -> MixedUpdate:
    """The same of objective 'mixed'.

    Raises:
      ValueError: as `make_update`; or images do not come in groups, which advantages are of.
    """
    if config.images_per_prompt < 2:
        raise ValueError("images_per_prompt: found 1, expected at least 2: 'mixed' compares a prompt's images")
    trained, pieces = _make_pieces(config, model, boxed, spec, optimizer, mesh, voices)
    check_parted(config.batch_size, spec.parts, spec.micro_batches, mesh)
    programs = make_programs(pieces, optimizer, config.ema, trained.places, replicated(mesh))
    return MixedUpdate(programs, pieces, trained)


def _make_pieces(
    config: OPD,
    model: Any,
    boxed: Tree,
    spec: OPDSpec,
    optimizer: optax.GradientTransformation,
    mesh: AnyMesh,
    voices: Mapping[str, Velocity] | None,
) -> tuple[Trained, Pieces]:
    check_batch("batch_size", config.batch_size, mesh)
    spec.check(config.batch_size)
    samples = config.batch_size // batch_ways(mesh)
    if samples % spec.anchor_every:
        raise ValueError(
            f"anchor.every: found {spec.anchor_every}, expected a divisor of the {samples} samples a device"
        )
    trained = make_trained(config, model, boxed, optimizer, mesh)
    return trained, Pieces(spec, make_velocity(model), trained.student, trained.groups, voices or {})


def make_spec(config: OPD, latent_shape: tuple[int, int, int], mesh: AnyMesh | None = None) -> OPDSpec:
    """The static part of the update from the config; with the mesh that it is for several networks have as many slots
    as its prompt stream asks for, and all that could be without one.

    Raises:
      ValueError: as `make_transition` and `noise_window`, of the section `sampler`, and as `check_coordinates`.
    """
    check_coordinates(config)
    sampler, teachers = config.sampler, [config.tasks[name] for name in taught(config)]
    with within("sampler"):
        transition = make_transition(sampler.transition, sampler.noise_level)
        noisy = noise_window(sampler.num_steps, *(sampler.window or (0, sampler.num_steps)))
    networks = (*(task.network for task in teachers), config.anchor.network)
    sigmas, finer = flow_match_sigmas(sampler.num_steps, config.model.shift), sampler.teacher_steps
    spec = OPDSpec(
        objective=config.objective,
        transition=transition,
        sigmas=sigmas,
        noisy=noisy,
        latent_shape=latent_shape,
        teachers=taught(config),
        guidance=config.guidance,
        teacher_guidance=tuple(scale_of(each.guidance) for each in (*teachers, config.anchor)),
        anchor_moves=config.anchor.moves,
        anchor_decay=config.anchor.decay,
        bound=bound_of(config),
        offline=config.offline if config.offline.weight else None,
        updates_per_rollout=config.updates_per_rollout,
        minibatches=config.minibatches,
        micro_batches=config.run.micro_batches,
        whole_teachers=config.whole_teachers,
        trained=sampler.trained,
        anchor_every=config.anchor.every,
        one_timestep=config.one_timestep,
        extrapolation=tuple(task.extrapolation for task in teachers),
        rewards=reward_names(config.tasks) if is_mixed(config) else (),
        tasks=told_apart(config.tasks) if is_mixed(config) else {},
        gaps=config.health.gaps,
        between=sublevels(sigmas, finer, config.model.shift) if finer > 1 else None,
        asks_base=bool(skills(config)),
        networks=networks if config.networks else (),
    )
    return spec if mesh is None else dataclasses.replace(spec, slots=slots_of(config, spec, mesh))


def bound_of(config: OPD) -> Bound | None:
    """What the anchor's gap is held to; None where its weight does not learn, or there is no anchor."""
    anchor = config.anchor
    if not anchor.bound or not config.objective.mar_beta:
        return None
    return Bound(anchor.bound, anchor.bound_rate, anchor.bound_limits)


def scale_of(guidance: float | None) -> float:
    """What is left to a file counts as the paper's where no file is read, see `stages.cards.settled`."""
    return PAPER_GUIDANCE if guidance is None else guidance


def update_cost(
    config: OPD, spec: OPDSpec, text_tokens: int, model: Any, others: Mapping[str, Any] | None = None
) -> Update:
    """FLOPs of one update of a config, whose static part is `spec`, on a network; `others`: networks of teachers by
    name, by default those of their presets.
    """
    family, shape = family_of(model), model.config
    start, stop = spec.window
    trained = 1 if spec.one_timestep else stop - start
    guided = spec.guidance != 1
    schedule = Schedule(
        batch=config.batch_size,
        timesteps=trained,
        only_sampled=stop - trained,
        guided_student=guided or spec.apart,
        guided_teachers=spec.table.guided or spec.apart,
        teacher_forwards=spec.teacher_steps
        * (
            (len(spec.teachers) if skills(config) else asked(config))
            + (spec.table.base is not None)
            + (spec.anchored and not spec.follows) / spec.anchor_every
        ),
        updates_per_rollout=spec.updates_per_rollout,
        minibatches=spec.minibatches,
        micro_batches=spec.micro_batches,
        guided_sampling=guided or (spec.apart and spec.replays),  # what is stored is drawn by what trains
    )
    tokens = family.tokens(shape, spec.latent_shape, text_tokens)
    student = family.flops(shape, tokens, config.adapter if config.trained == "adapter" else None, config.run.remat)
    if skills(config) and family.coordinates is not None:
        more = family.coordinates(shape, tokens, config.adapter)
        student = dataclasses.replace(student, backward=student.backward + more)
    teacher = family.flops(shape, tokens, config.adapter, config.run.remat)
    found = update_flops(student, teacher.forward, schedule)
    if spec.grouped:
        each = asked_flops(config, spec, text_tokens, model, others or {})
        found = dataclasses.replace(found, teachers=trained * spec.teacher_steps * sum(each.values()))
    found += _regular_flops(spec, student, schedule)
    if not is_mixed(config):
        return found
    rows = config.batch_size * (2 if schedule.guided_student else 1)  # all steps are drawn, since images are scored
    return dataclasses.replace(found, rollout=rows * (len(spec.sigmas) - 1) * student.forward)


def _regular_flops(spec: OPDSpec, student: Pass, schedule: Schedule) -> Update:
    """Of what regularises beside the teachers: an anchor that follows the student, and captioned latents."""
    found = NOTHING
    if spec.follows:
        guided = spec.apart or (spec.objective.match == "guided" and spec.guidance != 1)
        asks = schedule.timesteps * spec.teacher_steps / spec.anchor_every
        rows = schedule.batch * asks * (2 if guided else 1)
        found += dataclasses.replace(NOTHING, teachers=rows * student.forward)
    if spec.offline is not None:
        rows = spec.offline.batch_size * spec.updates_per_rollout
        found += Update(0.0, 0.0, rows * student.forward, rows * student.backward, rows * student.recomputed)
    return found

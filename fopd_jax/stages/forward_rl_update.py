"""From a config to the programs of forward-process reinforcement and to where what trains lives; needs no weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fopd_jax.backbones.registry import family_of
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.learning import ForwardRL
from fopd_jax.config.rules import within
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.solver import make_solver
from fopd_jax.parallel.sharding import AnyMesh, batch_sharding, check_batch, replicated
from fopd_jax.performance.flops import Update
from fopd_jax.performance.program import Program
from fopd_jax.policy.velocity import Tree, make_velocity
from fopd_jax.stages.abstract import abstract_base, abstract_model, encoded_rows, encoding_programs, world_shapes
from fopd_jax.stages.rewards import reward_names, told_apart
from fopd_jax.stages.trained import Trained, make_trained, place
from fopd_jax.steps.forward_rl import ForwardSpec, Pieces, Programs, make_programs
from fopd_jax.steps.grpo.spec import Base, Credit
from fopd_jax.steps.state import make_optimizer


@dataclasses.dataclass(frozen=True)
class ForwardUpdate:
    """A step's programs on a mesh; `trained`: what the state holds, and where."""

    programs: Programs
    pieces: Pieces
    trained: Trained


def make_spec(config: ForwardRL, latent_shape: tuple[int, int, int]) -> ForwardSpec:
    """The static part of a step from the config.

    Raises:
      ValueError: as `make_solver`, of the section `rollouts`.
    """
    rollouts = config.rollouts
    with within("rollouts"):
        solver = make_solver(rollouts.transition, rollouts.noise_level)
    return ForwardSpec(
        objective=config.objective,
        levels=config.levels,
        old=config.old,
        keeps_old=config.keeps_old,
        solver=solver,
        sigmas=flow_match_sigmas(rollouts.num_steps, config.model.shift),
        shift=config.model.shift,
        latent_shape=latent_shape,
        guidance=config.guidance,
        group=config.images_per_prompt,
        limit=config.advantages.clip,
        rewards=reward_names(config.tasks),
        tasks=told_apart(config.tasks),
        shared_noise=rollouts.shared_noise,
        updates_per_rollout=config.updates_per_rollout,
        minibatches=config.minibatches,
        micro_batches=config.run.micro_batches,
    )


def make_update(
    config: ForwardRL, model: Any, boxed: Tree, spec: ForwardSpec, optimizer: optax.GradientTransformation,
    mesh: AnyMesh,
) -> ForwardUpdate:  # fmt: skip
    """Build the programs; `boxed`: the network's variables as shapes with logical axes.

    Raises:
      ValueError: names the field that is out of range, or that does not go with another.
    """
    check_batch("batch_size", config.batch_size, mesh)
    trained = make_trained(config, model, boxed, optimizer, mesh)
    spec.check(config.batch_size, trained.groups)
    pieces = Pieces(spec, make_velocity(model), trained.student, trained.groups)
    programs = make_programs(pieces, optimizer, config.ema, trained.places, replicated(mesh))
    return ForwardUpdate(programs, pieces, trained)


def abstract_update(config: ForwardRL, mesh: AnyMesh) -> ForwardUpdate:
    """The update that `main` would build, from the config's `model.preset`; no file is read, no weight made.

    Raises:
      ValueError: a field is out of range; names it.
    """
    model, (latent_shape, _) = abstract_model(config, mesh), world_shapes(config.model)
    boxed, spec = boxed_variables(model, latent_shape), make_spec(config, latent_shape)
    return make_update(config, model, boxed, spec, make_optimizer(config.optimizer), mesh)


def forward_rl_programs(config: ForwardRL, mesh: AnyMesh) -> list[Program]:
    """What `main` would run: the updates on one rollout, then the rollout before them; what encodes their prompts.

    Arguments of the first two: `(base, state, latents, conditioning, credit)` and `(base, state, conditioning)`.

    Raises:
      ValueError: as `abstract_update`.
    """
    model, dtype = abstract_model(config, mesh), jnp.dtype(config.model.dtype)
    latent_shape, encoded = world_shapes(config.model)
    update, boxed = abstract_update(config, mesh), boxed_variables(model, latent_shape)
    spec, split, everywhere = update.pieces.spec, batch_sharding(mesh), replicated(mesh)
    base = Base(abstract_base(boxed, dtype, mesh), encoded_rows(encoded, 1, dtype, everywhere))
    conditioning = encoded_rows(encoded, config.batch_size, dtype, split)
    latents = jax.ShapeDtypeStruct((config.batch_size, *latent_shape), jnp.float32, sharding=split)
    credit = jax.eval_shape(lambda: Credit.none(len(spec.rewards), config.batch_size, len(spec.tasks)))
    credit = place(credit, jax.tree.map(lambda _: everywhere, credit))
    state, programs = update.trained.state, update.programs
    whole = update_cost(config, spec, encoded.context.shape[0], model)
    rolled = Update(0.0, whole.rollout, 0.0, 0.0, 0.0)
    return [
        Program("update", programs.learn, (base, state, latents, conditioning, credit),
                dataclasses.replace(whole, rollout=0.0)),
        Program("rollout", programs.roll_out, (base, state, conditioning), rolled),
        *encoding_programs(config, encoded, mesh),
    ]  # fmt: skip


def update_cost(config: ForwardRL, spec: ForwardSpec, text_tokens: int, model: Any) -> Update:
    """FLOPs of one step: the rollout, and at every level of every latent the old policy, the base and the policy."""
    family, shape = family_of(model), model.config
    lora = config.adapter if config.trained == "adapter" else None
    tokens = family.tokens(shape, spec.latent_shape, text_tokens)
    policy = family.flops(shape, tokens, lora, config.run.remat)
    base = family.flops(shape, tokens, None, config.run.remat)
    rows = config.batch_size * (2 if spec.guidance != 1 else 1)
    visits = spec.times * spec.updates_per_rollout / spec.minibatches
    guided = config.batch_size * (2 if spec.objective.reference_guidance != 1 else 1)
    return Update(
        teachers=visits * (guided * base.forward * spec.asks_reference + rows * policy.forward * spec.keeps_old),
        rollout=rows * (len(spec.sigmas) - 1) * policy.forward,
        forward=visits * rows * policy.forward,
        backward=visits * rows * policy.backward,
        recomputed=visits * rows * policy.recomputed,
    )

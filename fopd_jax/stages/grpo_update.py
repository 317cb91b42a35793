"""From a config to Flow-GRPO's programs and to where what trains lives; needs no weights and no devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fopd_jax.backbones.registry import family_of
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.learning import GRPO
from fopd_jax.config.rules import within
from fopd_jax.flow.rollout import sample_keys
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import make_transition
from fopd_jax.objectives.grpo import needs_old_velocity
from fopd_jax.parallel.sharding import AnyMesh, batch_sharding, check_batch, check_parted, replicated
from fopd_jax.performance.flops import NOTHING, Update
from fopd_jax.performance.program import Calls, Program, whole
from fopd_jax.policy.velocity import Tree, make_velocity
from fopd_jax.stages.abstract import abstract_base, abstract_model, encoded_rows, encoding_programs, world_shapes
from fopd_jax.stages.rewards import reward_names, told_apart
from fopd_jax.stages.trained import Trained, make_trained, place
from fopd_jax.steps.grpo.spec import Base, Credit, GRPOSpec, Rollout
from fopd_jax.steps.grpo.step import Pieces, Programs, make_programs
from fopd_jax.steps.state import make_optimizer
from fopd_jax.steps.visits import Stored, Sums, make_passes


@dataclasses.dataclass(frozen=True)
class GRPOUpdate:
    """A step's programs on a mesh; `trained`: what the state holds, and where."""

    programs: Programs
    pieces: Pieces
    trained: Trained


def make_spec(config: GRPO, latent_shape: tuple[int, int, int]) -> GRPOSpec:
    """The static part of the update from the config.

    Raises:
      ValueError: as `make_transition`, of the section `rollouts`.
    """
    rollouts = config.rollouts
    with within("rollouts"):
        transition = make_transition(rollouts.transition, rollouts.noise_level)
    return GRPOSpec(
        objective=config.objective,
        transition=transition,
        sigmas=flow_match_sigmas(rollouts.num_steps, config.model.shift),
        latent_shape=latent_shape,
        guidance=config.guidance,
        group=config.images_per_prompt,
        rewards=reward_names(config.tasks),
        tasks=told_apart(config.tasks),
        window=config.window,
        shared_noise=rollouts.shared_noise,
        updates_per_rollout=config.updates_per_rollout,
        minibatches=config.minibatches,
        micro_batches=config.run.micro_batches,
    )


def make_update(
    config: GRPO, model: Any, boxed: Tree, spec: GRPOSpec, optimizer: optax.GradientTransformation, mesh: AnyMesh
) -> GRPOUpdate:
    """Build the programs; `boxed`: the network's variables as shapes with logical axes.

    Raises:
      ValueError: names the field that is out of range, or that does not go with another.
    """
    check_batch("batch_size", config.batch_size, mesh)
    spec.check(config.batch_size)
    check_parted(config.batch_size, spec.parts, spec.micro_batches, mesh)
    trained = make_trained(config, model, boxed, optimizer, mesh)
    pieces = Pieces(spec, make_velocity(model), trained.student, trained.groups)
    programs = make_programs(pieces, optimizer, config.ema, trained.places, replicated(mesh))
    return GRPOUpdate(programs, pieces, trained)


def update_cost(config: GRPO, spec: GRPOSpec, text_tokens: int, model: Any) -> Update:
    """FLOPs of one step: the rollout, the reference at its trained timesteps, and the updates."""
    return whole(pass_calls(config, spec, text_tokens, model))


def pass_calls(config: GRPO, spec: GRPOSpec, text_tokens: int, model: Any) -> dict[str, Calls]:
    """Of one step by kind of pass, the reference being asked by those that draw."""
    family, shape = family_of(model), model.config
    lora = config.adapter if config.trained == "adapter" else None
    tokens = family.tokens(shape, spec.latent_shape, text_tokens)
    policy = family.flops(shape, tokens, lora, config.run.remat)
    reference = family.flops(shape, tokens, None, config.run.remat).forward * (spec.objective.kl_beta > 0)
    rows = config.batch_size // spec.parts * (2 if spec.guidance != 1 else 1)
    asked, steps = rows * spec.trained, len(spec.sigmas) - 1
    draws = dataclasses.replace(NOTHING, teachers=asked * reference, rollout=rows * steps * policy.forward)
    trains = Update(0.0, 0.0, asked * policy.forward, asked * policy.backward, asked * policy.recomputed)
    return {"draws": Calls(spec.parts, draws), "trains": Calls(spec.updates_per_rollout * spec.micro_batches, trains)}


# ---- as shapes alone


def abstract_update(config: GRPO, mesh: AnyMesh) -> GRPOUpdate:
    """The update that `main` would build, from the config's `model.preset`; no file is read, no weight made.

    Raises:
      ValueError: a field is out of range; names it.
    """
    model, (latent_shape, _) = abstract_model(config, mesh), world_shapes(config.model)
    boxed, spec = boxed_variables(model, latent_shape), make_spec(config, latent_shape)
    return make_update(config, model, boxed, spec, make_optimizer(config.optimizer), mesh)


def grpo_programs(config: GRPO, mesh: AnyMesh) -> list[Program]:
    """The passes' program, which is nearly all of a step; those that begin and end one; what encodes its prompts.

    Where `run.one_program` makes one of them, it is of the same passes, and of decoder and rewards, which are not here.

    The second one's arguments are `(base, state, conditioning)`.

    Raises:
      ValueError: as `abstract_update`.
    """
    model, dtype = abstract_model(config, mesh), jnp.dtype(config.model.dtype)
    latent_shape, encoded = world_shapes(config.model)
    update, boxed = abstract_update(config, mesh), boxed_variables(model, latent_shape)
    base = Base(abstract_base(boxed, dtype, mesh), encoded_rows(encoded, 1, dtype, replicated(mesh)))
    conditioning = encoded_rows(encoded, config.batch_size, dtype, batch_sharding(mesh))
    started = (base, update.trained.state, conditioning)
    calls = pass_calls(config, update.pieces.spec, encoded.context.shape[0], model)
    passes = _pass_arguments(update, base, conditioning, config.batch_size)
    _, seen = jax.eval_shape(update.programs.go, *passes)
    seen = place(seen, jax.tree.map(lambda _: replicated(mesh), seen))
    ended = (update.trained.state, passes[3], [seen] * calls["trains"].count)
    return [
        Program("pass", update.programs.go, passes, whole(calls), calls),
        Program("begin", update.programs.begin, started, NOTHING),
        Program("end", update.programs.end, ended, NOTHING),
        *encoding_programs(config, encoded, mesh),
    ]


def _pass_arguments(update: GRPOUpdate, base: Base, conditioning: Conditioning, batch_size: int) -> tuple[Any, ...]:
    """What `Programs.go` takes, each where the one before it leaves it."""
    groups, spec, state = update.pieces.groups, update.pieces.spec, update.trained.state
    everywhere, rollout = replicated(groups.mesh), rollout_shapes(spec, groups.mesh, batch_size)
    sums = jax.eval_shape(lambda: Sums.zeros(groups, update.pieces.policy.compute(state.trained)))
    kept = Sums(groups.places(sums.gradients), everywhere, everywhere)
    credit = jax.eval_shape(lambda: Credit.none(len(spec.rewards), batch_size, len(spec.tasks)))
    each = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), leaf.dtype), make_passes(1, 1, 1))
    credit, each = (place(tree, jax.tree.map(lambda _: everywhere, tree)) for tree in (credit, each))
    return base, (state, rollout, place(sums, kept)), conditioning, credit, each


def rollout_shapes(spec: GRPOSpec, mesh: AnyMesh, batch_size: int) -> Rollout:
    """What is kept of a rollout, each array where its samples are."""
    rows = batch_sharding(mesh)
    steps = NamedSharding(mesh, P(None, *rows.spec))
    keys = jax.eval_shape(lambda: sample_keys(jax.random.key(0), len(spec.sigmas) - 1, batch_size))
    x, first = jax.ShapeDtypeStruct((batch_size, *spec.latent_shape), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    kept = jax.ShapeDtypeStruct((spec.trained, *x.shape), x.dtype)
    densities = jax.ShapeDtypeStruct((spec.trained, batch_size), x.dtype)
    targets = kept if spec.objective.kl_beta > 0 else None
    stored = Stored(kept, kept, densities, targets, kept if needs_old_velocity(spec.objective) else None)
    places = Rollout(rows, steps, replicated(mesh), jax.tree.map(lambda _: steps, stored))
    return place(Rollout(x, keys, first, stored), places)

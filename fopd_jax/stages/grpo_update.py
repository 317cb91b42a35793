"""From a config to Flow-GRPO's programs and to where what trains lives; needs no weights and no devices."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from fopd_jax.backbones.registry import family_of
from fopd_jax.config.learning import GRPO, RewardedTask
from fopd_jax.config.rules import within
from fopd_jax.config.schema import RoutedTask
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import make_transition
from fopd_jax.parallel.sharding import AnyMesh, batch_ways, check_batch, replicated
from fopd_jax.performance.flops import Update
from fopd_jax.policy.velocity import Tree, make_velocity
from fopd_jax.stages.trained import Trained, make_trained
from fopd_jax.steps.grpo.spec import GRPOSpec
from fopd_jax.steps.grpo.step import Pieces, Programs, make_programs

Rewarded = Mapping[str, RewardedTask] | Mapping[str, RoutedTask]


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


def reward_names(tasks: Rewarded) -> tuple[str, ...]:
    """Of all tasks, each once, in the config's order."""
    return tuple(dict.fromkeys(name for task in tasks.values() for name in task.rewards))


def told_apart(tasks: Rewarded) -> dict[str, dict[str, float]]:
    """The weights of each task's rewards, where there are several tasks."""
    return {name: dict(task.rewards) for name, task in tasks.items()} if len(tasks) > 1 else {}


def make_update(
    config: GRPO, model: Any, boxed: Tree, spec: GRPOSpec, optimizer: optax.GradientTransformation, mesh: AnyMesh
) -> GRPOUpdate:
    """Build the programs; `boxed`: the network's variables as shapes with logical axes.

    Raises:
      ValueError: names the field that is out of range, or that does not go with another.
    """
    check_batch("batch_size", config.batch_size, mesh)
    spec.check(config.batch_size)
    if (config.batch_size // spec.parts) % batch_ways(mesh):
        raise ValueError(
            f"run.micro_batches: found {spec.micro_batches}: parts of {config.batch_size // spec.parts} samples, "
            f"which the mesh's {batch_ways(mesh)} batch ways do not divide"
        )
    trained = make_trained(config, model, boxed, optimizer, mesh)
    pieces = Pieces(spec, make_velocity(model), trained.student, trained.groups)
    programs = make_programs(pieces, optimizer, config.ema, trained.places, replicated(mesh))
    return GRPOUpdate(programs, pieces, trained)


def update_cost(config: GRPO, spec: GRPOSpec, text_tokens: int, model: Any) -> Update:
    """FLOPs of one step: the rollout, the reference at its trained timesteps, and the updates."""
    family, shape = family_of(model), model.config
    lora = config.adapter if config.trained == "adapter" else None
    tokens = family.tokens(shape, spec.latent_shape, text_tokens)
    policy = family.flops(shape, tokens, lora, config.run.remat)
    base = family.flops(shape, tokens, None, config.run.remat)
    rows = config.batch_size * (2 if spec.guidance != 1 else 1)
    visits = rows * spec.trained * spec.updates_per_rollout / spec.minibatches
    return Update(
        teachers=rows * spec.trained * base.forward * (spec.objective.kl_beta > 0),
        rollout=rows * (len(spec.sigmas) - 1) * policy.forward,
        forward=visits * policy.forward,
        backward=visits * policy.backward,
        recomputed=visits * policy.recomputed,
    )

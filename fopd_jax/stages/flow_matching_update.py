"""From a config to the jitted update of flow matching, and the same as shapes alone; needs no weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fopd_jax.backbones.registry import family_of
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.schema import FlowMatching
from fopd_jax.parallel.sharding import AnyMesh, batch_sharding, check_batch, replicated
from fopd_jax.performance.flops import Update
from fopd_jax.performance.program import Program
from fopd_jax.policy.velocity import Tree, make_velocity
from fopd_jax.stages.abstract import abstract_base, abstract_model, encoded_rows, world_shapes
from fopd_jax.stages.trained import Trained, make_trained
from fopd_jax.steps.flow_matching import make_flow_matching_step
from fopd_jax.steps.state import TrainState, make_optimizer

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class FlowMatchingUpdate:
    """The update of a config on a mesh: `step(frozen, state, batch)`, jitted, its state donated.

    `frozen`: the base's variables under an adapter; its constants alone, where all of the network trains.
    """

    step: Callable[[Tree, TrainState, Tree], tuple[TrainState, Metrics]]
    trained: Trained


def make_update(
    config: FlowMatching, model: Any, boxed: Tree, optimizer: optax.GradientTransformation, mesh: AnyMesh
) -> FlowMatchingUpdate:
    """Build the update; `boxed`: the network's variables as shapes with logical axes.

    Raises:
      ValueError: names the field that does not fit the mesh.
    """
    check_batch("batch_size", config.batch_size, mesh)
    trained = make_trained(config, model, boxed, optimizer, mesh)
    step = make_flow_matching_step(
        make_velocity(model), trained.student, trained.groups, config.levels, optimizer, config.ema,
        (trained.places, replicated(mesh)), config.target,
    )  # fmt: skip
    return FlowMatchingUpdate(step, trained)


def frozen_part(config: FlowMatching, variables: Tree) -> Tree:
    """Of a base's variables, arrays or shapes, those that do not train."""
    return {"constants": variables["constants"]} if config.trained == "params" else variables


def flow_matching_programs(config: FlowMatching, mesh: AnyMesh) -> list[Program]:
    """The update that `main` would run, from the config's `model.preset`; no file is read, no weight made.

    Its arguments are `(frozen, state, batch)`.

    Raises:
      ValueError: a field is out of range; names it.
    """
    model = abstract_model(config, mesh)
    latent_shape, encoded = world_shapes(config.model)
    boxed, split = boxed_variables(model, latent_shape), batch_sharding(mesh)
    update = make_update(config, model, boxed, make_optimizer(config.optimizer), mesh)
    dtype = jnp.dtype(config.model.dtype)
    frozen = frozen_part(config, abstract_base(boxed, dtype, mesh))
    latents = jax.ShapeDtypeStruct((config.batch_size, *latent_shape), jnp.float32, sharding=split)
    levels = jax.ShapeDtypeStruct((config.batch_size,), jnp.float32, sharding=split)
    arrays = {"x0": latents} if config.target == "data" else {"x": latents, "v": latents, "sigma": levels}
    batch = {**arrays, "conditioning": encoded_rows(encoded, config.batch_size, dtype, split)}
    cost = update_cost(config, latent_shape, encoded.context.shape[0], model)
    return [Program("update", update.step, (frozen, update.trained.state, batch), cost)]


def update_cost(config: FlowMatching, latent_shape: tuple[int, int, int], text_tokens: int, model: Any) -> Update:
    """FLOPs of one update of the network; those of the autoencoder, which is no part of it, are not counted."""
    family, shape = family_of(model), model.config
    lora = config.adapter if config.trained == "adapter" else None
    each = family.flops(shape, family.tokens(shape, latent_shape, text_tokens), lora, config.run.remat)
    return Update(
        teachers=0.0,
        rollout=0.0,
        forward=config.batch_size * each.forward,
        backward=config.batch_size * each.backward,
        recomputed=config.batch_size * each.recomputed,
    )

"""The OPD update of a config as shapes alone: to compile it for machines that are not there, or to time it."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fopd_jax.adapters.lora import adapter_shapes, stack_bank
from fopd_jax.backbones.record import LatentShape
from fopd_jax.backbones.registry import find_preset
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import OPD, Model
from fopd_jax.parallel.sharding import (
    AnyMesh,
    bank_shardings,
    batch_sharding,
    parameter_shardings,
    replicated,
    stacked_shardings,
)
from fopd_jax.policy.velocity import Tree
from fopd_jax.stages.opd_update import OPDUpdate, make_spec, make_update, place
from fopd_jax.stages.pipeline import choose_attention
from fopd_jax.steps.opd.spec import Batch, Frozen, OPDSpec
from fopd_jax.steps.state import make_optimizer
from fopd_jax.worlds.embedded import EMBEDDED


@dataclasses.dataclass(frozen=True)
class AbstractUpdate:
    """`step.lower(*arguments)` compiles it: `arguments` are `(frozen, state, batch)` as shapes with shardings."""

    step: Any
    arguments: tuple[Frozen, Tree, Batch]
    model: Any
    update: OPDUpdate


def abstract_update(config: OPD, mesh: AnyMesh) -> AbstractUpdate:
    """The update that `main` would run, from the config's `model.preset`; no file is read, no weight made.

    Raises:
      ValueError: a field is out of range; names it.
    """
    family, shape = find_preset(config.model.preset)
    dtype = jnp.dtype(config.model.dtype)
    attention = choose_attention(config.run.attention, config.model.dtype, shape.head_dim, mesh)
    model = family.build(shape, attention, dtype, config.run.remat)
    latent_shape, encoded = world_shapes(config.model)
    boxed = boxed_variables(model, latent_shape)
    spec = make_spec(config, latent_shape)
    update = make_update(config, model, boxed, spec, make_optimizer(config.optimizer), mesh)

    def rows(count: int, sharding: jax.sharding.Sharding) -> Conditioning:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), dtype, sharding=sharding), encoded)

    split = batch_sharding(mesh)
    batch = Batch(rows(config.batch_size, split), jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=split))
    frozen = Frozen(*_weights(config, boxed, spec, mesh), rows(1, replicated(mesh)))
    return AbstractUpdate(update.step, (frozen, update.state, batch), model, update)


def _weights(config: OPD, boxed: Tree, spec: OPDSpec, mesh: AnyMesh) -> tuple[Tree, Tree]:
    """Base and bank."""
    dtype, count, places = jnp.dtype(config.model.dtype), len(spec.teachers) + 1, parameter_shardings(mesh, boxed)
    variables = nn.unbox(boxed)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), variables["params"])
    base = {"params": place(params, places["params"]), "constants": place(variables["constants"], places["constants"])}
    if spec.whole_teachers:
        bank = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), dtype), params)
        return base, place(bank, stacked_shardings(mesh, boxed["params"]))
    adapter = adapter_shapes(config.adapter, params, find_preset(config.model.preset)[0].targets)
    bank = jax.eval_shape(stack_bank, {str(k): adapter for k in range(count)})
    bank = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), bank)
    return base, place(bank, bank_shardings(mesh, boxed["params"], bank))


def world_shapes(model: Model) -> tuple[LatentShape, Conditioning]:
    """Shape of one latent image, and of one encoded prompt."""
    if model.preset in EMBEDDED:
        world = EMBEDDED[model.preset]()
        encoded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), world.encode([""]))
        return world.latent_shape, encoded
    family, shape = find_preset(model.preset)
    shapes = family.encoded(shape, model.t5_length)
    encoded = (None if each is None else jax.ShapeDtypeStruct(each, jnp.float32) for each in shapes)
    return family.latent_shape(shape, model.resolution), Conditioning(*encoded)

"""One forward of a config's network as a program of its own, of shapes alone: what an update consists of most."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fopd_jax.backbones.record import Pass
from fopd_jax.backbones.registry import find_preset
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import OPD
from fopd_jax.parallel.sharding import AnyMesh, activation_rules, batch_sharding
from fopd_jax.performance.bounds import Attention
from fopd_jax.performance.flops import NOTHING
from fopd_jax.performance.program import Program
from fopd_jax.policy.velocity import Tree, make_velocity
from fopd_jax.stages.abstract import abstract_adapters, abstract_base, abstract_model, encoded_rows, world_shapes


def forward_program(config: OPD, mesh: AnyMesh, bank: int = 0) -> Program:
    """The network's velocity of `config.batch_size` rows: under no adapter, or each row under its own of `bank`.

    Raises:
      ValueError: a field is out of range; names it.
    """
    model, dtype, rows = abstract_model(config, mesh), jnp.dtype(config.model.dtype), config.batch_size
    latent, encoded = world_shapes(config.model)
    boxed, (family, shape) = boxed_variables(model, latent), find_preset(config.model.preset)
    split, velocity = batch_sharding(mesh), make_velocity(model)
    cost = family.flops(
        shape, family.tokens(shape, latent, encoded.context.shape[0]), config.adapter if bank else None, "none"
    )

    def forward(
        variables: Tree, adapters: Tree, x: Float[Array, "b h w c"], text: Conditioning, route: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        with activation_rules(mesh), jax.named_scope("student"):
            return velocity(variables, adapters, x, jnp.float32(0.5), text, route if bank else None)

    def row(*lengths: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *lengths), dtype, sharding=split)

    arguments = (
        abstract_base(boxed, dtype, mesh),
        abstract_adapters(config.adapter, boxed, family.targets, mesh, dtype, bank),
        row(*latent, dtype=jnp.float32),
        encoded_rows(encoded, rows, dtype, split),
        row(dtype=jnp.int32),
    )
    flops = dataclasses.replace(NOTHING, forward=cost.forward * rows)
    return Program("forward", jax.jit(forward), arguments, flops, attention=attention_of(cost, shape))


def attention_of(cost: Pass, shape: Any) -> Attention | None:
    """What of a forward is attention, where the family says so; `shape`: of the network."""
    return Attention(cost.attention / cost.forward, shape.head_dim) if cost.attention else None

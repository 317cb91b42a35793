"""A policy is one frozen network under one adapter: base, student, teachers and anchor differ in nothing else."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fopd_jax.adapters.coordinates import placed_at
from fopd_jax.backbones.registry import family_of
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.policy.guidance import guided

Tree = Any
Velocity = Callable[..., Float[Array, "b h w c"]]


def make_velocity(module: Any) -> Velocity:
    """Bind a network of a known family: returns `velocity(variables, adapter, x, sigma, conditioning, route=None) → v`.

    `variables` holds the collections `params` and `constants`; `adapter` is an effective low-rank tree (see
    `adapters.effective`), a bank of them when `route [B]` is given, or `{}` for the base. `sigma` is 0-d, or one
    value per sample. The adapter's coordinates are each sample's, where the conditioning has some.
    """

    inputs = family_of(module).inputs

    def velocity(
        variables: Tree,
        adapter: Tree,
        x: Float[Array, "b h w c"],
        sigma: Float[Array, "*s"],
        conditioning: Conditioning,
        route: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        if conditioning.coordinates is not None:
            adapter = placed_at(adapter, conditioning.coordinates)
        return module.apply({**variables, "adapter": adapter}, *inputs(x, sigma, conditioning), route)

    return velocity


def branches(
    velocity: Velocity,
    variables: Tree,
    adapter: Tree,
    x: Float[Array, "b h w c"],
    sigma: Float[Array, "*s"],
    conditioning: Conditioning,
    null: Conditioning,
    route: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """The velocities under the prompts and under the empty one, by one forward; `null` holds one empty prompt.

    Coordinates are no part of a prompt: both are under each sample's own.
    """
    null = dataclasses.replace(null, coordinates=conditioning.coordinates)
    empty = jax.tree.map(lambda text, row: jnp.broadcast_to(row, text.shape), conditioning, null)
    doubled = jax.tree.map(interleave, conditioning, empty)
    routes = None if route is None else interleave(route, route)
    sigma = jnp.broadcast_to(sigma, x.shape[:1])
    v = velocity(variables, adapter, interleave(x, x), interleave(sigma, sigma), doubled, routes)
    return deinterleave(v)


def guided_velocity(
    velocity: Velocity,
    variables: Tree,
    adapter: Tree,
    x: Float[Array, "b h w c"],
    sigma: Float[Array, "*s"],
    conditioning: Conditioning,
    null: Conditioning | None,
    scale: Float[Array, "*k"] | float | None,
    route: Int[Array, " b"] | None = None,
) -> Float[Array, "b h w c"]:
    """Classifier-free guided velocity, text and null rows in one forward; `null` is None where guidance is off.

    `null` holds one empty prompt (leading axis 1); `scale` is a scalar or one value per sample.
    """
    if null is None:
        return velocity(variables, adapter, x, sigma, conditioning, route)
    v_text, v_null = branches(velocity, variables, adapter, x, sigma, conditioning, null, route)
    return guided(v_text, v_null, jnp.asarray(scale, v_text.dtype))


def interleave(first: Array, second: Array) -> Array:
    """Two batches as one, row by row: joining them end to end would move rows between the devices that hold them."""
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])


def deinterleave(rows: Array) -> tuple[Array, Array]:
    """The two batches that `interleave` joined."""
    pairs = rows.reshape(-1, 2, *rows.shape[1:])
    return pairs[:, 0], pairs[:, 1]

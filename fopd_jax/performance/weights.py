"""Random state and inputs of an update, made on the device from their shapes: nothing is read."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fopd_jax.performance.problem import AbstractUpdate
from fopd_jax.policy.velocity import Tree
from fopd_jax.steps.opd.spec import Frozen
from fopd_jax.steps.state import TrainState
from fopd_jax.worlds.prompt_stream import Batch, Mix


def random_tree(shapes: Tree, seed: int) -> Tree:
    """Normal arrays for shapes, each where its sharding says; nothing is zero, which would be faster to multiply.

    Matrices have variance 1/inputs, so that no activation explodes, vectors and adapters' second factors .02², on 1 for
    the scales of norms; what is no parameter has variance 1.
    """

    def fill(index: int, path: tuple[Any, ...], shape: Any) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        width = shape.shape[-2] if name in ("kernel", "a") else 1
        scale = {"bias": 0.02, "scale": 0.02, "b": 0.02}.get(name, width**-0.5)
        draw = _normal(shape.shape, shape.dtype, float(name == "scale"), scale, getattr(shape, "sharding", None))
        return draw(seed * 10_000 + index)

    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(structure, [fill(index, path, shape) for index, (path, shape) in enumerate(leaves)])


@functools.cache
def _normal(shape: tuple[int, ...], dtype: Any, mean: float, std: float, sharding: Any) -> Callable[[int], jax.Array]:
    """A program that draws an array from a seed; arrays alike share it."""

    def draw(seed: jax.Array) -> jax.Array:
        return (mean + std * jax.random.normal(jax.random.key(seed, impl="rbg"), shape)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def random_arguments(update: AbstractUpdate, params: Tree | None = None) -> tuple[Frozen, TrainState, Batch]:
    """What `update.step` takes: random weights and prompts, a fresh optimizer; row i's teacher is i modulo them.

    `params`: the base's, where they are there already.
    """
    frozen, state, batch = update.arguments
    state = random_state(state)
    route = np.arange(batch.route.shape[0], dtype=np.int32) % len(update.pieces.spec.teachers)
    conditioning = random_tree(batch.conditioning, 2)
    if params is None:
        params = random_tree(frozen.variables["params"], 3)
    rest = {name: tree for name, tree in frozen.variables.items() if name != "params"}
    frozen = random_tree(dataclasses.replace(frozen, variables=rest), 4)
    frozen.variables["params"] = params
    route, offline = jax.device_put(route, batch.route.sharding), batch.offline and random_tree(batch.offline, 5)
    coordinates = batch.coordinates
    if coordinates is not None:
        coordinates = jax.device_put(np.ones(coordinates.shape, np.float32), coordinates.sharding)
    return frozen, state, Batch(conditioning, route, even_mix(batch.mix), offline=offline, coordinates=coordinates)


def even_mix(shapes: Mix | None) -> Mix | None:
    """Of several teachers the first ones, all alike."""
    if shapes is None:
        return None
    count = shapes.bank.shape[1]
    bank = np.broadcast_to(np.arange(count, dtype=np.int32), shapes.bank.shape)
    weights = np.full(shapes.weights.shape, 1 / count, np.float32)
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), Mix(bank, weights), shapes)


def random_state(state: TrainState) -> TrainState:
    """What trains and its copies at random, all of them alike; nothing counted yet."""
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), state)
    copies = {name: random_tree(getattr(state, name), 1) for name in ("trained", "ema", "old")}
    return dataclasses.replace(fresh, **copies)


def held_bytes(update: AbstractUpdate) -> dict[str, int]:
    """Bytes a device holds through all of training: base, bank, what trains, optimizer, average, and their sum."""
    frozen, state, _ = update.arguments
    parts = {
        "base": frozen.variables, "bank": frozen.bank, "trained": state.trained,
        "optimizer": state.opt_state, "ema": state.ema,
    }  # fmt: skip
    held = {name: sum(map(shard_bytes, jax.tree.leaves(tree))) for name, tree in parts.items()}
    if frozen.networks:
        held["networks"] = sum(map(shard_bytes, jax.tree.leaves(frozen.networks)))
    return held | {"total": sum(held.values())}


def shard_bytes(leaf: Any) -> int:
    """What one device holds of an array (or of a shape with a sharding)."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

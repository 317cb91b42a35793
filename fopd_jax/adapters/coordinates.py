"""Capability coordinates as one more layer of an adapter's weights, which `models.coordinates` reads.

The layer `coordinates` has factors as all others, `{"a": [K, R], "b": [R, D]}`, K being skills and D the width of the
network's conditioning embedding. No merge, bank or routing knows it: teachers have none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from fopd_jax.adapters.lora import Adapter
from fopd_jax.models.coordinates import LAYER

Tree = Any
DEFAULT = 1.0
"""A skill that nobody turned: all are there."""
WITHOUT = (
    "it has capability coordinates, which no file of a LoRA for others holds; without them it would draw as at "
    "coordinates 0, about as the base; this project's own file keeps them"
)
"""Why an adapter is not written for others."""
_STREAM = 2**32 - 3  # what a key is folded with for this layer alone, so that the others start as they would without it


def with_coordinates(key: PRNGKeyArray, adapter: Adapter, skills: int, rank: int, width: int) -> Adapter:
    """The adapter with coordinates beside its layers, which change nothing yet: a ~ N(0, 1), b = 0.

    A coordinate is about 1, not one of many features as at other layers, so that `a` is not divided by the rank.
    """
    a = jax.random.normal(jax.random.fold_in(key, _STREAM), (skills, rank), jnp.float32)
    return Adapter({**adapter.weights, LAYER: {"a": a, "b": jnp.zeros((rank, width), jnp.float32)}}, adapter.scale)


def skills_of(adapter: Adapter) -> int:
    """How many coordinates an adapter has; 0: none."""
    return adapter.weights[LAYER]["a"].shape[0] if LAYER in adapter.weights else 0


def placed_at(effective: Tree, coordinates: Float[Array | np.ndarray, "*b k"]) -> Tree:
    """What the network reads of an adapter at coordinates of all samples `[K]`, or of each `[B, K]`.

    Raises:
      ValueError: the adapter has none, or another number of them.
    """
    if LAYER not in effective:
        raise ValueError("coordinates: found some for an adapter that has none")
    skills = effective[LAYER]["a"].shape[0]
    if coordinates.shape[-1] != skills:
        raise ValueError(f"coordinates: found {coordinates.shape[-1]}, expected {skills}, one a skill")
    return {**effective, LAYER: {**effective[LAYER], "at": coordinates}}


def coordinates_of(names: Sequence[str], chosen: Mapping[str, float], field: str) -> Float[np.ndarray, " k"]:
    """The coordinates that were chosen by the skills' names, `DEFAULT` the others.

    Raises:
      ValueError: there is no such skill; names the field, it and the skills there are.
    """
    if unknown := sorted(chosen.keys() - set(names)):
        raise ValueError(f"{field}: found {', '.join(unknown)}, expected some of {', '.join(names)}")
    return np.asarray([chosen.get(name, DEFAULT) for name in names], np.float32)

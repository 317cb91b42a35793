"""Several rewards at once within a jitted program."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fopd_jax.parallel.distributed import spread
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.rewards.reward import Metadata, Reward, Traced

Tree = Any


def traced_of(rewards: Mapping[str, Reward]) -> dict[str, Traced]:
    """The traced form of each.

    Raises:
      ValueError: one has none; names it.
    """
    found = {name: reward.traced for name, reward in rewards.items()}
    if missing := [name for name, traced in found.items() if traced is None]:
        raise ValueError(f"rewards.{missing[0]}: has no form within a program; it is scored beside it")
    return {name: traced for name, traced in found.items() if traced is not None}


def prepare(rewards: Mapping[str, Traced], prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tree]:
    """What each reward needs of prompts, by name: rows on the host, to be put beside the prompts' conditioning."""
    return {name: traced.prepare(prompts, metadata) for name, traced in rewards.items()}


def place(rewards: Mapping[str, Traced], mesh: Mesh) -> dict[str, Tree]:
    """Each reward's parameters, by name, whole on every device of `mesh`."""
    return {name: spread(traced.params(), mesh) for name, traced in rewards.items()}


def score(
    rewards: Mapping[str, Traced], params: Mapping[str, Tree], images: Float[Array, "b h w 3"], rows: Mapping[str, Tree]
) -> Float[Array, "r b"]:
    """Values of decoded images in [-1, 1], in the order of `rewards`; NaN where one fails, all of an image with NaN."""
    pixels, whole = to_pixels(images), jnp.isfinite(images).all(axis=(1, 2, 3))
    values = [traced.score(params[name], pixels, rows[name]) for name, traced in rewards.items()]
    values = [jnp.where(whole & jnp.isfinite(each), each, jnp.nan) for each in values]
    return jnp.stack(values) if values else jnp.zeros((0, len(images)))

"""Capability coordinates: a dial per skill, as further conditioning of a network (CapField-OPD)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LAYER = "coordinates"
"""Its name, in the network and in an adapter: leaves `a [K, R]`, `b [R, D]` and, once chosen, `at`: the coordinates
`[K]` of all samples, or `[B, K]`. So they train, travel and are averaged with the adapter that they belong to.
"""


class Coordinates(nn.Module):
    """Adds silu(c·a)·b to the embedding that modulates every block, where the adapter has that layer; else nothing.

    Coordinates that nobody chose are 1 each, all skills together; at 0 the layer is silent. What follows an embedding
    in a network computes in its dtype, the layer in float32.
    """

    @nn.compact
    def __call__(self, embedding: Float[Array, "b d"]) -> Float[Array, "b d"]:
        if not self.has_variable("adapter", "a"):
            return embedding
        a, b = (self.get_variable("adapter", name).astype(jnp.float32) for name in ("a", "b"))
        chosen = self.has_variable("adapter", "at")
        at = self.get_variable("adapter", "at").astype(jnp.float32) if chosen else jnp.ones(a.shape[:1])
        hidden = nn.silu(_product(at.reshape(-1, a.shape[0]), a))
        return embedding + _product(hidden, b).astype(embedding.dtype)


def _product(left: Any, right: Any) -> Array:
    """In float32 as it is meant; it is small."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)

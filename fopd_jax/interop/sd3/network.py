"""The network as others' names refer to it: its parameters' shapes, and the layers that adapters may act on."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fopd_jax.models.mmdit import MMDiT, MMDiTConfig

# Groups by the last two parts of their layers' paths.
TARGETS = {
    "attn": tuple(
        f"attn/{name}"
        for name in ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ),  # the joint attention of both streams
    "attn2": tuple(f"attn2/{name}" for name in ("to_q", "to_k", "to_v", "to_out")),  # the image's with itself
    "mlp": tuple(f"{ff}/{name}" for ff in ("ff", "ff_context") for name in ("up", "down")),
}


@functools.cache
def parameter_shapes(config: MMDiTConfig) -> Any:
    """Shapes of all parameters, stacked layers leading."""
    x = jnp.zeros((1, config.patch_size, config.patch_size, config.channels))
    text = jnp.zeros((1, 1, config.context_dim)), jnp.zeros((1, config.pooled_dim))
    return nn.unbox(jax.eval_shape(MMDiT(config).init, jax.random.key(0), x, jnp.zeros(1), *text))["params"]

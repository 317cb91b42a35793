"""Classifier-free guidance of velocities."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fopd_jax.flow.transition import at_least_float32


def guided(
    v_text: Float[Array, "b *shape"],
    v_null: Float[Array, "b *shape"],
    scale: float | Float[Array, ""] | Float[Array, "b"],
) -> Float[Array, "b *shape"]:
    """`v_null + scale·(v_text - v_null)`, in float32 or wider; `scale` is one number or one per sample.

    A scale of 1 gives `v_text`, 0 gives `v_null`. Raises ValueError where the number of scales is not the batch size.
    """
    v_text, v_null = at_least_float32(v_text), at_least_float32(v_null)
    scale = jnp.asarray(scale, v_null.dtype)
    if scale.ndim:
        if scale.shape != v_null.shape[:1]:
            raise ValueError(f"scale: found shape {scale.shape}, expected () or {v_null.shape[:1]}")
        scale = scale.reshape(scale.shape + (1,) * (v_null.ndim - 1))  # [B, 1, ...]: else [B] meets the last axis
    return v_null + scale * (v_text - v_null)

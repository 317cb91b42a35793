"""LayerNorm without affine parameters and the modulation that follows it: plain, or one kernel for both."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fopd_jax.models.kernels import layer_norm as kernel
from fopd_jax.models.kernels.choice import KernelImpl

Pair = kernel.Pair


def norm_modulate(
    x: Float[Array, "b t d"], modulations: Sequence[Pair], impl: KernelImpl, dtype: Any
) -> tuple[Float[Array, "b t d"], tuple[Float[Array, "b t d"], ...]]:
    """x, which what else reads it should be given, and its norm under each pair (shift, scale) `[B, D]`."""
    if impl == "pallas":
        return kernel.norm_modulate(x.astype(dtype), modulations)
    normed = layer_norm(x, dtype)
    return x, tuple(modulate(normed, shift, scale) for shift, scale in modulations)


def layer_norm(x: Float[Array, "*b d"], dtype: Any) -> Float[Array, "*b d"]:
    """LayerNorm without affine parameters, eps 1e-6, two-pass variance in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + kernel.EPSILON)).astype(dtype)


def modulate(x: Array, shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Array:
    """x·(1 + scale) + shift, one shift and scale per sample."""
    return x * (1 + scale[:, None]) + shift[:, None]

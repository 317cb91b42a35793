"""Rectified-flow matching (Esser et al. 2024): regress v on ε - x0 at random noise levels, or on a teacher's v."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fopd_jax.config.schema import LogitNormal


def sample_levels(levels: LogitNormal, key: PRNGKeyArray, batch: int) -> Float[Array, " b"]:
    """Training noise levels: sigmoid(N(mean, std²)), shifted towards noise by `shift`·s/(1 + (shift - 1)·s)."""
    s = jax.nn.sigmoid(levels.mean + levels.std * jax.random.normal(key, (batch,)))
    return levels.shift * s / (1 + (levels.shift - 1) * s)


def interpolate(
    x0: Float[Array, "b *shape"], noise: Float[Array, "b *shape"], sigma: Float[Array, " b"]
) -> Float[Array, "b *shape"]:
    """x_t = (1 - t)·x0 + t·ε with one t per sample."""
    t = sigma.reshape(sigma.shape + (1,) * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def flow_matching(
    v: Float[Array, "b *shape"], x0: Float[Array, "b *shape"], noise: Float[Array, "b *shape"]
) -> Float[Array, " b"]:
    """‖v - (ε - x0)‖², mean per dimension, one value per sample."""
    return jnp.square(v - (noise - x0)).mean(tuple(range(1, v.ndim)))


def velocity_matching(v: Float[Array, "b *shape"], expected: Float[Array, "b *shape"]) -> Float[Array, " b"]:
    """‖v - v_k‖² for a teacher's velocities, mean per dimension, one value per sample."""
    return jnp.square(v - expected).mean(tuple(range(1, v.ndim)))

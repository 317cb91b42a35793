"""From projections to attention: streams of tokens that are attended together, by whatever implementation.

What splits heads off and what computes on `[B, T, N·H]` part here; before and behind there is no difference.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from fopd_jax.models.attention import AttentionImpl, attention, merged_attention
from fopd_jax.models.kernels.merged_attention import Stream

Dtype = Any


class RMSNorm(nn.Module):
    """Root-mean-square norm over the head dimension, eps 1e-6, in float32. Kernels that hold it inside read `scale`."""

    features: int
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        self.scale: Any = self.param("scale", init, (self.features,))

    def __call__(self, x: Float[Array, "b t n h"]) -> Float[Array, "b t n h"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
        return (y * self.scale.astype(jnp.float32)[None, None, None]).astype(self.dtype)


class Projected(NamedTuple):
    """Queries, keys and values of one stream, and the norms of q and k that follow, where the network has them."""

    q: Float[Array, "b t d"]
    k: Float[Array, "b t d"]
    v: Float[Array, "b t d"]
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None


def attend(
    streams: tuple[Projected, ...], head_dim: int, impl: AttentionImpl, read: int, tokens: tuple[int, ...]
) -> tuple[Float[Array, "b t d"], ...]:
    """One attention over the tokens of all streams; its outputs of at least the first `read` streams.

    `tokens`: how many of each stream are real. Only `merged` knows of others.
    """
    if impl == "merged":
        return _attend_merged(streams, head_dim, read, tokens)
    return _attend_split(streams, head_dim, impl)


def _attend_split(
    streams: tuple[Projected, ...], head_dim: int, impl: AttentionImpl
) -> tuple[Float[Array, "b t d"], ...]:
    """Heads split off and normalised, tokens of all streams one behind the other."""
    split = [
        tuple(rearrange(x, "B T (N H) -> B T N H", H=head_dim) for x in (stream.q, stream.k, stream.v))
        for stream in streams
    ]
    normed = [
        (q, k, v) if s.q_norm is None or s.k_norm is None else (s.q_norm(q), s.k_norm(k), v)
        for s, (q, k, v) in zip(streams, split, strict=True)
    ]
    q, k, v = (x[0] if len(x) == 1 else jnp.concatenate(x, axis=1) for x in zip(*normed, strict=True))
    y = rearrange(attention(q, k, v, impl), "B T N H -> B T (N H)")
    ends = np.cumsum([stream.q.shape[1] for stream in streams])
    return tuple(jnp.split(y, ends[:-1], axis=1)) if len(streams) > 1 else (y,)


def _attend_merged(
    streams: tuple[Projected, ...], head_dim: int, read: int, tokens: tuple[int, ...]
) -> tuple[Float[Array, "b t d"], ...]:
    """In one kernel, on the projections as they are."""

    def scale(norm: RMSNorm | None) -> Any:
        return None if norm is None else norm.scale

    operands = tuple(
        Stream(s.q if i < read else None, s.k, s.v, scale(s.q_norm), scale(s.k_norm)) for i, s in enumerate(streams)
    )
    return merged_attention(operands, head_dim, tokens)

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

from fopd_jax.models.attention import AttentionImpl, attention, cudnn_attention, merged_attention
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

    `tokens`: how many of each stream are real. `merged` and `cudnn` know of others, `cudnn` in the last stream alone.
    """
    if impl == "merged":
        return _attend_merged(streams, head_dim, read, tokens)
    heads = _split_heads(streams, head_dim)
    if impl == "cudnn":
        return _attend_apart(heads, read, sum(tokens))
    q, k, v = (_joined(x) for x in zip(*heads, strict=True))
    y = rearrange(attention(q, k, v, impl), "B T N H -> B T (N H)")
    ends = np.cumsum([stream.q.shape[1] for stream in streams])
    return tuple(jnp.split(y, ends[:-1], axis=1)) if len(streams) > 1 else (y,)


def _split_heads(streams: tuple[Projected, ...], head_dim: int) -> list[tuple[Array, Array, Array]]:
    """Queries, keys and values of each stream, heads split off, q and k normalised."""
    split = [
        tuple(rearrange(x, "B T (N H) -> B T N H", H=head_dim) for x in (stream.q, stream.k, stream.v))
        for stream in streams
    ]
    return [
        (q, k, v) if s.q_norm is None or s.k_norm is None else (s.q_norm(q), s.k_norm(k), v)
        for s, (q, k, v) in zip(streams, split, strict=True)
    ]


def _joined(x: tuple[Float[Array, "b _ n h"], ...]) -> Float[Array, "b t n h"]:
    """Tokens of all streams, one behind the other."""
    return x[0] if len(x) == 1 else jnp.concatenate(x, axis=1)


def _attend_apart(heads: list[tuple[Array, Array, Array]], read: int, keys: int) -> tuple[Float[Array, "b t d"], ...]:
    """Each stream's queries in a call of their own: they are not joined, and what they read is not split again.

    With text in whole tiles that halves what a forward's kernels move without computing, by XLA's GPU compiler
    (docs/running-at-scale.md). The first `keys` positions of all streams are real.
    """
    queries, *both = zip(*heads, strict=True)
    k, v = map(_joined, both)
    return tuple(rearrange(cudnn_attention(q, k, v, keys), "B T N H -> B T (N H)") for q in queries[:read])


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

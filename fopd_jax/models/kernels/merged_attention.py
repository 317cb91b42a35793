"""Attention of one or two streams of tokens on the layout `[B, T, N·H]` that projections write and read, for TPUs.

No head is split off, nothing is joined, padded or transposed between a projection and the kernel: qk-RMSNorm, scale and
the joint softmax over both streams are inside, forward and backward. See `merged_forward` and `merged_backward`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from fopd_jax.models.kernels.merged_backward import backward
from fopd_jax.models.kernels.merged_forward import BOUND, forward
from fopd_jax.models.kernels.merged_layout import HEAD_DIMS, ROWS, Layout

MOST_KEYS = 8704  # all keys of a group of heads stand in VMEM; 1440 px are 8100 tokens


class Stream(NamedTuple):
    """What one stream's projections gave, and its norms' scales `[H]`, both or neither.

    `q` is None where nobody reads this stream's output; only the last stream may be so.
    """

    q: Float[Array, "b t d"] | None
    k: Float[Array, "b t d"]
    v: Float[Array, "b t d"]
    q_scale: Float[Array, " h"] | None = None
    k_scale: Float[Array, " h"] | None = None


def merged_attention(
    streams: tuple[Stream, ...], head_dim: int, tokens: tuple[int, ...], residuals: str
) -> tuple[Float[Array, "b t d"], ...]:
    """softmax(q·kᵀ/√H)·v over the keys of all streams; an output for each stream that has queries.

    `tokens`: how many are real of each stream. What lies behind is not attended to, and its outputs mean nothing.
    `residuals`: the name under which a rematerialisation policy finds what the backward needs of the forward.

    Raises:
      ValueError: there are more tokens than a chip's VMEM holds.
    """
    if sum(tokens) > MOST_KEYS:
        raise ValueError(
            f"attention: 'merged' holds at most {MOST_KEYS} tokens, but there are {sum(tokens)}; use 'splash' or 'xla'"
        )
    layout = Layout(
        heads=streams[0].k.shape[2] // head_dim,
        head_dim=head_dim,
        tokens=tokens,
        asking=sum(stream.q is not None for stream in streams),
        normed=streams[0].q_scale is not None,
        dtype=streams[0].k.dtype,
    )
    q = tuple(whole_tiles(stream.q) for stream in streams if stream.q is not None)
    k, v = tuple(whole_tiles(stream.k) for stream in streams), tuple(whole_tiles(stream.v) for stream in streams)
    scales = [scale for stream in streams for scale in (stream.q_scale, stream.k_scale)]
    rows = jnp.stack([jnp.ones(head_dim) if scale is None else scale.astype(jnp.float32) for scale in scales])
    outs: Any = _attend(layout, residuals, q, k, v, jnp.tile(rows, (1, layout.group)))
    return tuple(out[:, : stream.k.shape[1]] for out, stream in zip(outs, streams, strict=False))


def refusal(head_dim: int, dtype: str) -> str:
    """Why the kernel cannot compute heads of that size in that dtype, or nothing."""
    if head_dim not in HEAD_DIMS:
        return f"needs a head dimension of {', '.join(map(str, HEAD_DIMS))}, but the network's is {head_dim}"
    if dtype not in ("bfloat16", "float32"):
        return f"computes in bfloat16 or float32, but the network's dtype is {dtype}"
    return ""


def whole_tiles(x: Float[Array, "b t d"]) -> Float[Array, "b u d"]:
    """Zeros behind the tokens, up to whole tiles of bfloat16."""
    missing = -x.shape[1] % ROWS
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0))) if missing else x


def _bounded(scales: Float[Array, "rows lanes"], layout: Layout) -> Int[Array, "1"]:
    """1 where no score can leave the forward's range: |q̂·k̂| ≤ H·max|s_q|·max|s_k| for unit-rms vectors of H numbers."""
    largest = jnp.abs(scales).max(1)
    bound = layout.head_dim * layout.query_scale * largest[0::2].max() * largest[1::2].max()
    return (bound <= BOUND).astype(jnp.int32).reshape(1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(layout: Layout, residuals: str, q: Any, k: Any, v: Any, scales: Any) -> Any:
    return forward(q, k, v, scales, _bounded(scales, layout), layout)[0]


def _attend_forward(layout: Layout, residuals: str, q: Any, k: Any, v: Any, scales: Any) -> Any:
    found = forward(q, k, v, scales, _bounded(scales, layout), layout)
    outs, lse = jax.tree.map(lambda x: checkpoint_name(x, residuals), found)
    return outs, (q, k, v, scales, outs, lse)


def _attend_backward(layout: Layout, residuals: str, kept: Any, gradients: Any) -> Any:
    q, k, v, scales, outs, lse = kept
    dq, dk, dv, dscales = backward(q, k, v, scales, outs, lse, gradients, layout)
    return dq, dk, dv, dscales.sum((0, 1))


_attend.defvjp(_attend_forward, _attend_backward)

"""Forward of merged attention. Its schedule, for one row of the batch and one group of heads:

1. Queries and keys of all streams are normalised into VMEM, scale and log2(e) in the queries. Values are transposed,
   each head's rows over rows of ones, so that one product gives Σp·v and Σp. Padding is zero in values and ones, so it
   counts for nothing and needs no mask.
2. For each block of queries and each head: scores `k·qᵀ` of all keys, their power of two, `[v; 1]ᵀ·p`. All keys are
   there, so nothing is carried from block to block. The other heads' lanes of q are zero: a product over 128 lanes
   costs what one over 64 does.
3. A block's output is transposed into the place of its queries; at the end each stream gets its own.

A softmax is the same less any number. As long as no score exceeds 2^`BOUND` or falls below 2^-`BOUND`, float32 holds
sums and products of all of them, and nothing is subtracted. qk-norm bounds scores by its learned scales, which are
looked at in every call; past the bound, and without qk-norm, each query's largest score is subtracted.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from fopd_jax.models.kernels.merged_layout import (
    ROWS,
    Layout,
    dot,
    fill_pads,
    group_spec,
    load_slot,
    normalise,
    shapes_of,
    token_spec,
    whole_spec,
)

BOUND = 96.0  # leaves float32's 2^±126 room for 2^13 keys and values from 2^-26 to 2^14
_SCORES = 7 * 2**20  # bytes of a block's scores
_VMEM = 100 * 2**20

Tokens = tuple[Float[Array, "b _ d"], ...]


def forward(
    q: Tokens, k: Tokens, v: Tokens, scales: Float[Array, "rows lanes"], bounded: Int[Array, "1"], layout: Layout
) -> tuple[Tokens, Float[Array, "b groups heads queries"]]:
    """Outputs of the streams that ask, and log2 Σ2^score of each head and query.

    `scales`: rows q, k of the first stream, then of the next, spread over lanes. `bounded`: 1 where qk-norm keeps all
    scores within `BOUND`. Rows of an output behind its stream's real tokens mean nothing.
    """
    batch, rows = q[0].shape[0], lambda arrays: tuple(token_spec(x.shape[1], layout) for x in arrays)
    lse = (layout.group, layout.queries)
    scratch: Sequence[Any] = (
        pltpu.VMEM((layout.queries, layout.lanes), layout.dtype),
        pltpu.VMEM((layout.keys, layout.lanes), layout.dtype),
        pltpu.VMEM((layout.group, layout.head_dim + ROWS, layout.keys), layout.dtype),
    )
    return pl.pallas_call(
        functools.partial(_kernel, layout=layout),
        grid=(batch, layout.groups),
        in_specs=(
            rows(q), rows(k), rows(v), whole_spec(scales.shape), pl.BlockSpec(memory_space=pltpu.SMEM),
        ),
        out_specs=(rows(q), group_spec(*lse)),
        out_shape=(shapes_of(q), jax.ShapeDtypeStruct((batch, layout.groups, *lse), jnp.float32)),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM
        ),
        name="merged_attention",
    )(q, k, v, scales, bounded)  # fmt: skip


def _kernel(
    q_refs: Any, k_refs: Any, v_refs: Any, scales: Any, bounded: Any, outs: Any, lse: Any,
    queries: Any, keys: Any, values: Any, *, layout: Layout,
) -> None:  # fmt: skip
    for i in range(len(k_refs)):
        _load_keys(k_refs[i], v_refs[i], scales[2 * i + 1 : 2 * i + 2], keys, values, i, layout)
    for i, slot in enumerate(layout.slots[: layout.asking]):
        scale = scales[2 * i : 2 * i + 1] * layout.query_scale
        q = normalise(load_slot(q_refs[i], i, layout), scale, layout)
        queries[slot.start : slot.stop] = q.astype(layout.dtype)
    if (end := layout.slots[layout.asking - 1].stop) < layout.queries:
        queries[end:] = jnp.zeros((layout.queries - end, layout.lanes), layout.dtype)

    def run(subtract: bool) -> None:
        size = layout.block(0 if subtract else _SCORES)  # what is rare is to be small
        pl.loop(0, layout.queries // size)(
            lambda j: _block(queries, keys, values, lse, pl.ds(pl.multiple_of(j * size, size), size), subtract, layout)
        )

    if layout.normed:
        pl.when(bounded[0] == 1)(lambda: run(False))
        pl.when(bounded[0] == 0)(lambda: run(True))
    else:
        run(True)
    for i, slot in enumerate(layout.slots[: layout.asking]):
        outs[i][0] = queries[slot.start : slot.start + outs[i].shape[1]]


def _load_keys(k: Any, v: Any, scale: Any, keys: Any, values: Any, stream: int, layout: Layout) -> None:
    slot, h = layout.slots[stream], layout.head_dim
    keys[slot.start : slot.stop] = normalise(load_slot(k, stream, layout), scale, layout).astype(layout.dtype)
    transposed = load_slot(v, stream, layout).astype(layout.dtype).T
    real = jax.lax.broadcasted_iota(jnp.int32, (ROWS, len(slot)), 1) < layout.tokens[stream]
    for n in range(layout.group):
        values[n, :h, slot.start : slot.stop] = transposed[n * h : (n + 1) * h]
        values[n, h:, slot.start : slot.stop] = jnp.where(real, 1.0, 0.0).astype(layout.dtype)


def _block(queries: Any, keys: Any, values: Any, lse: Any, window: Any, subtract: bool, layout: Layout) -> None:
    h = layout.head_dim
    q = queries[window].astype(jnp.float32)
    head = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (1, layout.lanes), 1), h)
    outs = []
    for n in range(layout.group):
        scores = dot(keys[...], jnp.where(head == n, q, 0.0).astype(layout.dtype), (1, 1))
        largest = 0.0
        if subtract:
            scores = fill_pads(scores, layout, -jnp.inf)
            largest = scores.max(0, keepdims=True)
            scores = scores - largest
        sums = dot(values[n], jnp.exp2(scores).astype(layout.dtype))
        total = sums[h : h + 1]
        outs.append(sums[:h] / total)
        lse[0, 0, n : n + 1, window] = jnp.log2(total) + largest
    queries[window] = jnp.concatenate(outs).T.astype(layout.dtype)

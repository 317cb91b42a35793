"""Backward of merged attention, qk-norm's included. Its schedule, for one row of the batch and one group of heads:

1. Keys and values of all streams into VMEM, keys normalised, and transposed as well; queries and the output's
   gradient transposed; δ = Σ o·do of each head and query.
2. For each block of queries and each head, scores transposed: p = 2^(k·qᵀ - lse), dp = v·doᵀ, ds = p·(dp - δ); then
   dvᵀ += doᵀ·p, dkᵀ += qᵀ·ds, dqᵀ = kᵀ·ds. In these three the large operand is the one that a matrix unit holds.
   Padding needs its mask here: 2^-lse may be anything, and its keys' gradients are to be zero.
3. Back through the norm, in float32, to each stream's own gradients, and each lane's sum for the norm's scales.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from fopd_jax.models.kernels.merged_layout import (
    Layout,
    dot,
    fill_pads,
    group_spec,
    load_slot,
    normalise,
    normalise_backward,
    shapes_of,
    token_spec,
    whole_spec,
)

_SCORES = 3 * 2**20  # bytes of a block's scores
_VMEM = 100 * 2**20

Tokens = tuple[Float[Array, "b _ d"], ...]


class _Operands(NamedTuple):
    """All streams of one program in VMEM, and what is summed there. A trailing `t`: tokens lie along lanes."""

    qt: Any
    dot: Any  # the output's gradient
    delta: Any
    keys: Any
    kt: Any
    values: Any
    dq: Any
    dkt: Any
    dvt: Any


def _scratch(layout: Layout) -> _Operands:
    queries, keys, lanes, dtype = layout.queries, layout.keys, layout.lanes, layout.dtype
    return _Operands(
        qt=pltpu.VMEM((lanes, queries), dtype),
        dot=pltpu.VMEM((lanes, queries), dtype),
        delta=pltpu.VMEM((layout.group, queries), jnp.float32),
        keys=pltpu.VMEM((keys, lanes), dtype),
        kt=pltpu.VMEM((lanes, keys), dtype),
        values=pltpu.VMEM((keys, lanes), dtype),
        dq=pltpu.VMEM((queries, lanes), jnp.float32),
        dkt=pltpu.VMEM((lanes, keys), jnp.float32),
        dvt=pltpu.VMEM((lanes, keys), jnp.float32),
    )


def backward(
    q: Tokens,
    k: Tokens,
    v: Tokens,
    scales: Float[Array, "rows lanes"],
    outs: Tokens,
    lse: Float[Array, "b groups heads queries"],
    gradients: Tokens,
    layout: Layout,
) -> tuple[Tokens, Tokens, Tokens, Float[Array, "b groups rows lanes"]]:
    """Gradients of q, k and v, and of `scales` in each program. `outs`, `lse`: the forward's; `gradients`: of outs."""
    batch, rows = k[0].shape[0], lambda arrays: tuple(token_spec(x.shape[1], layout) for x in arrays)
    scales_of_programs = jax.ShapeDtypeStruct((batch, layout.groups, *scales.shape), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, layout=layout),
        grid=(batch, layout.groups),
        in_specs=(
            rows(q), rows(k), rows(v), whole_spec(scales.shape), rows(outs), group_spec(*lse.shape[2:]), rows(outs),
        ),
        out_specs=(rows(q), rows(k), rows(v), group_spec(*scales.shape)),
        out_shape=(shapes_of(q), shapes_of(k), shapes_of(v), scales_of_programs),
        scratch_shapes=(_scratch(layout),),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM),
        name="merged_attention_backward",
    )(q, k, v, scales, outs, lse, gradients)  # fmt: skip


def _kernel(
    q_refs: Any, k_refs: Any, v_refs: Any, scales: Any, outs: Any, lse: Any, gradients: Any,
    dq_refs: Any, dk_refs: Any, dv_refs: Any, dscales: Any, own: _Operands, *, layout: Layout,
) -> None:  # fmt: skip
    asking = layout.slots[: layout.asking]
    q_scales = [scales[2 * i : 2 * i + 1] * layout.query_scale for i in range(len(k_refs))]
    k_scales = [scales[2 * i + 1 : 2 * i + 2] for i in range(len(k_refs))]
    for i in range(len(k_refs)):
        _load_keys(k_refs[i], v_refs[i], k_scales[i], own, i, layout)
    for i in range(len(asking)):
        _load_queries(q_refs[i], outs[i], gradients[i], q_scales[i], own, i, layout)
    if (end := asking[-1].stop) < layout.queries:
        for ref in (own.qt, own.dot, own.delta):
            ref[:, end:] = jnp.zeros((ref.shape[0], layout.queries - end), ref.dtype)
    own.dkt[...], own.dvt[...] = jnp.zeros_like(own.dkt), jnp.zeros_like(own.dvt)

    size = layout.block(_SCORES)
    pl.loop(0, layout.queries // size)(lambda j: _block(own, lse, pl.ds(pl.multiple_of(j * size, size), size), layout))

    dscales[...] = jnp.zeros_like(dscales)
    for i, slot in enumerate(layout.slots):
        at = slice(slot.start, slot.stop)
        dv_refs[i][0] = own.dvt[:, at].T[: dv_refs[i].shape[1]].astype(layout.dtype)
        dk, dscales[0, 0, 2 * i + 1 : 2 * i + 2] = normalise_backward(
            load_slot(k_refs[i], i, layout), own.dkt[:, at].T * math.log(2), k_scales[i], layout
        )
        dk_refs[i][0] = dk[: dk_refs[i].shape[1]].astype(layout.dtype)
        if i < layout.asking:
            dq, dscale = normalise_backward(
                load_slot(q_refs[i], i, layout), own.dq[at] * math.log(2), q_scales[i], layout
            )
            dq_refs[i][0] = dq[: dq_refs[i].shape[1]].astype(layout.dtype)
            dscales[0, 0, 2 * i : 2 * i + 1] = dscale * layout.query_scale


def _load_keys(k: Any, v: Any, scale: Any, own: _Operands, stream: int, layout: Layout) -> None:
    at = slice(layout.slots[stream].start, layout.slots[stream].stop)
    keys = normalise(load_slot(k, stream, layout), scale, layout).astype(layout.dtype)
    own.keys[at], own.kt[:, at] = keys, keys.T
    own.values[at] = load_slot(v, stream, layout).astype(layout.dtype)


def _load_queries(q: Any, out: Any, gradient: Any, scale: Any, own: _Operands, stream: int, layout: Layout) -> None:
    at, h = slice(layout.slots[stream].start, layout.slots[stream].stop), layout.head_dim
    own.qt[:, at] = normalise(load_slot(q, stream, layout), scale, layout).astype(layout.dtype).T
    do = load_slot(gradient, stream, layout)
    own.dot[:, at] = do.astype(layout.dtype).T
    products = (do * load_slot(out, stream, layout)).T
    for n in range(layout.group):
        own.delta[n : n + 1, at] = products[n * h : (n + 1) * h].sum(0, keepdims=True)


def _block(own: _Operands, lse: Any, window: Any, layout: Layout) -> None:
    h, dtype = layout.head_dim, layout.dtype
    q, do = own.qt[:, window], own.dot[:, window]
    dqs = []
    for n in range(layout.group):
        head = slice(n * h, (n + 1) * h)
        p = jnp.exp2(dot(own.keys[...], _alone(q, n, layout)) - lse[0, 0, n : n + 1, window])
        p = fill_pads(p, layout, 0.0)
        dp = dot(own.values[...], _alone(do, n, layout))
        ds = (p * (dp - own.delta[n : n + 1, window])).astype(dtype)
        own.dvt[head] += dot(do[head], p.astype(dtype), (1, 1))
        own.dkt[head] += dot(q[head], ds, (1, 1))
        dqs.append(dot(own.kt[head], ds))
    own.dq[window] = jnp.concatenate(dqs).T


def _alone(x: Float[Array, "lanes block"], head: int, layout: Layout) -> Float[Array, "lanes block"]:
    """The rows of one head; zeros in those of the others."""
    h = layout.head_dim
    before, behind = (jnp.zeros((count * h, x.shape[1]), x.dtype) for count in (head, layout.group - head - 1))
    return jnp.concatenate([piece for piece in (before, x[head * h : (head + 1) * h], behind) if piece.shape[0]])

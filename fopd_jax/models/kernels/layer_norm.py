"""LayerNorm and modulation in one pass over `[B, T, D]`, for TPUs.

By themselves XLA's two reductions over D and the product that reads the result make three passes, one of them in
float32. Here a block of rows stands in VMEM, so that x is read once and each modulated form written once; the
statistics are the plain form's, two passes in float32.

Schedule: the grid is (samples, blocks of tokens), the blocks as equal as whole tiles allow; a last block that reaches
beyond T reads what is there and writes nothing there. Statistics are by row, so foreign rows touch no other; the
backward leaves them out of its sums over tokens, which stay in VMEM from one block of a sample to the next.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from fopd_jax.models.kernels.rows import by_rows

EPSILON = 1e-6
_TILE = 16  # rows of a register tile of bfloat16
_BLOCK_BYTES = 256 * 1536 * 2  # of one operand: two buffers of five of them, and float32 beside, fit into 16 MiB
Pair = tuple[Float[Array, "b d"], Float[Array, "b d"]]


def norm_modulate(
    x: Float[Array, "b t d"], modulations: Sequence[Pair]
) -> tuple[Float[Array, "b t d"], tuple[Float[Array, "b t d"], ...]]:
    """x itself, and `LayerNorm(x)·(1 + scale) + shift` for each pair (shift, scale), rounded once.

    Who reads x beside its norm should read the one returned: then the backward adds up both gradients within its
    kernel. What is kept for the backward is x.
    """
    passed, normed = _norm_modulate(x, tuple(tuple(pair) for pair in modulations))
    return passed, tuple(normed)


@jax.custom_vjp
def _norm_modulate(x: Array, modulations: tuple[Pair, ...]) -> tuple[Array, tuple[Array, ...]]:
    return x, _forward(x, modulations)


def _keep(x: Any, modulations: Any) -> tuple[tuple[Array, tuple[Array, ...]], Any]:
    """Primal arguments come with whether anybody asks for their gradient: those of a frozen adaLN are not computed."""
    pairs = [(shift.value, scale.value) for shift, scale in modulations]
    scales = [scale for _, scale in pairs]
    trained = any(each.perturbed for pair in modulations for each in pair)
    # What is kept must be arrays, and structure: None says no where () says yes.
    return (x.value, _forward(x.value, pairs)), (x.value, scales, () if trained else None)


def _pull(kept: Any, cotangents: tuple[Any, Any]) -> tuple[Array, Any]:
    x, scales, trained = kept
    passed, normed = cotangents
    normed = [jnp.zeros_like(x) if isinstance(each, SymbolicZero) else each for each in normed]
    residual = [] if isinstance(passed, SymbolicZero) else [passed]
    dx, *sums = _backward(x, scales, normed, residual, trained is not None)
    if trained is None:
        return dx, None
    sums = [total[:, 0].astype(scales[0].dtype) for total in sums]
    return dx, tuple(zip(sums[::2], sums[1::2], strict=True))


_norm_modulate.defvjp(_keep, _pull, symbolic_zeros=True)


# ---- the calls


def token_block(tokens: int, row_bytes: int) -> int:
    """Rows of a block: all of them, or as few equal blocks of whole tiles as are small enough."""
    most = max(_BLOCK_BYTES // row_bytes // _TILE, 1) * _TILE
    if tokens <= most:
        return tokens
    count = -(-tokens // most)
    return -(-tokens // count // _TILE) * _TILE


def _specs(x: Array) -> tuple[tuple[int, int], Any, Any]:
    """Grid, and the blocks of arrays `[B, T, D]` and `[B, 1, D]`."""
    batch, tokens, width = x.shape
    block = token_block(tokens, width * x.dtype.itemsize)
    along = pl.BlockSpec((1, block, width), lambda b, t: (b, t, 0))
    whole = pl.BlockSpec((1, 1, width), lambda b, t: (b, 0, 0))
    return (batch, pl.cdiv(tokens, block)), along, whole


def _forward(x: Array, modulations: Sequence[Pair]) -> tuple[Array, ...]:
    def local(rows: Sequence[Array], _: Any) -> tuple[Array, ...]:
        x, *vectors = rows
        grid, along, whole = _specs(x)
        count = len(vectors) // 2
        return pl.pallas_call(
            _forward_kernel,
            grid=grid,
            in_specs=[along, *[whole] * len(vectors)],
            out_specs=(along,) * count,
            out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * count,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
            name="layer_norm_modulate",
        )(x, *vectors)

    return by_rows(local, (x, *(each[:, None] for pair in modulations for each in pair)))


def _backward(
    x: Array, scales: Sequence[Array], normed: Sequence[Array], residual: Sequence[Array], trained: bool
) -> tuple[Array, ...]:
    """dx, and where asked for the float32 gradients `[B, 1, D]` of each shift and scale in turn."""

    def local(rows: Sequence[Array], _: Any) -> tuple[Array, ...]:
        x, *rest = rows
        grid, along, whole = _specs(x)
        n = len(scales)
        sums = 2 * n if trained else 0
        vector = jax.ShapeDtypeStruct((x.shape[0], 1, x.shape[2]), jnp.float32)
        return pl.pallas_call(
            functools.partial(_backward_kernel, count=n, trained=trained, tokens=x.shape[1]),
            grid=grid,
            in_specs=[along, *[whole] * n, *[along] * (len(rest) - n)],
            out_specs=(along, *[whole] * sums),
            out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), *[vector] * sums),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            name="layer_norm_modulate_backward",
        )(x, *rest)

    return by_rows(local, (x, *(scale[:, None] for scale in scales), *normed, *residual))


# ---- the kernels


def _statistics(x: Float[Array, "t d"]) -> tuple[Float[Array, "t d"], Float[Array, "t 1"]]:
    """Normalised rows and 1/std, in float32; the mean goes off before the squares: large means cost no digits."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)
    return centred * inverse, inverse


def _forward_kernel(x: Any, *refs: Any) -> None:
    """Refs: shift and scale of each pair, then the results."""
    count = len(refs) // 3
    normed, _ = _statistics(x[0])
    for i in range(count):
        shift, scale = (refs[2 * i + j][0].astype(jnp.float32) for j in range(2))
        out = refs[2 * count + i]
        out[0] = (normed * (1 + scale) + shift).astype(out.dtype)


def _backward_kernel(x: Any, *refs: Any, count: int, trained: bool, tokens: int) -> None:
    """Refs: scales, gradients of the results, perhaps that of x passed through; then dx, and sums where trained.

    With n the normalised row and g = Σᵢ gᵢ·(1 + scaleᵢ): dx = (g - mean(g) - n·mean(g·n))/std.
    """
    outs = 1 + (2 * count if trained else 0)
    scales, gradients, residual = refs[:count], refs[count : 2 * count], refs[2 * count : len(refs) - outs]
    dx, *sums = refs[len(refs) - outs :]
    normed, inverse = _statistics(x[0])
    total: Any = sum(
        g[0].astype(jnp.float32) * (1 + s[0].astype(jnp.float32)) for g, s in zip(gradients, scales, strict=True)
    )
    slope = (total * normed).mean(-1, keepdims=True)
    change = (total - total.mean(-1, keepdims=True) - normed * slope) * inverse
    for each in residual:
        change = change + each[0].astype(jnp.float32)
    dx[0] = change.astype(dx.dtype)
    for i, each in enumerate(sums):
        gradient = gradients[i // 2][0].astype(jnp.float32)
        _add_over_tokens(each, gradient * normed if i % 2 else gradient, tokens)


def _add_over_tokens(out: Any, values: Float[Array, "t d"], tokens: int) -> None:
    """Adds a block's rows to the sums of its sample, those beyond the last token left out."""
    block = values.shape[0]
    if tokens % block:
        row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + pl.program_id(1) * block
        values = jnp.where(row < tokens, values, 0.0)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        out[0] = jnp.zeros_like(out[0])

    out[0] += values.sum(0, keepdims=True)

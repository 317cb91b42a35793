"""Products of one x with several frozen matrices, each with a low-rank update, as one kernel for TPUs.

    h = x·a,  yᵢ = x·Wᵢ + h·bᵢ + biasᵢ       dh = Σᵢ dyᵢ·bᵢᵀ,  dx = Σᵢ dyᵢ·Wᵢᵀ + dh·aᵀ

XLA makes a product of its own of every h·bᵢ, which writes and reads again what is as large as yᵢ (by the compiler's
estimate for a v6e 1.1 times the cycles of x·Wᵢ itself), and adds up the parts of dx in as many passes. Here a rank
costs one more step of the contraction. `a` holds the factors of all updates side by side, for one product; each takes
its own ranks of h, and puts its own into dh, by a product with zeros and ones, which is exact.

Schedule: the grid is (samples, blocks of tokens). All matrices stand in VMEM, in one buffer each since they never
change; a program reads a block of x and writes all its results. Rows beyond the last token touch no other row.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from fopd_jax.models.kernels.layer_norm import token_block
from fopd_jax.models.kernels.rows import by_rows

_BLOCKS = 32 * 2**20  # of VMEM beside the matrices: blocks of rows in two buffers each, and float32 sums
Rows = Float[Array, "b t d"]


@jax.custom_vjp
def adapted_products(
    x: Rows,
    kernels: tuple[Float[Array, "d o"], ...],
    biases: tuple[Float[Array, " o"], ...],
    a: Float[Array, "g d r"],
    b: tuple[Float[Array, "g _ o"], ...],
) -> tuple[Float[Array, "b t o"], ...]:
    """x·Wᵢ + (x·aᵢ)·bᵢ + biasᵢ for each i, sums in float32; with g = 1 one update for all samples, else one each.

    `a` joins all aᵢ along their ranks, which add up to r. Widths are multiples of 128.
    """
    return _forward(x, kernels, biases, a, b)[0]


def _keep(x: Any, kernels: Any, biases: Any, a: Any, b: Any) -> tuple[Any, Any]:
    products, hidden = _forward(x, kernels, biases, a, b)
    return products, (x, hidden, kernels, biases, a, b)


def _pull(kept: Any, gradients: Any) -> tuple[Any, ...]:
    """What nobody asks for, as the gradient of frozen matrices, XLA leaves out."""
    x, hidden, kernels, biases, a, b = kept
    dx, dhidden = _backward(gradients, kernels, a, b)
    over = "BTI,BTO->BIO" if a.shape[0] > 1 else "BTI,BTO->IO"
    da = jnp.einsum(over, x, dhidden).reshape(a.shape)
    own = (hidden[..., start : start + each.shape[1]] for start, each in zip(_starts(b), b, strict=True))
    db = tuple(jnp.einsum(over, h, g).reshape(each.shape) for h, g, each in zip(own, gradients, b, strict=True))
    dkernels = tuple(jnp.einsum("BTI,BTO->IO", x, g).astype(w.dtype) for g, w in zip(gradients, kernels, strict=True))
    dbiases = tuple(g.sum((0, 1)).astype(each.dtype) for g, each in zip(gradients, biases, strict=True))
    return dx, dkernels, dbiases, da, db


adapted_products.defvjp(_keep, _pull)


def _starts(b: Sequence[Any]) -> list[int]:
    """Where among all ranks those of each update begin."""
    return [sum(each.shape[1] for each in b[:i]) for i in range(len(b))]


# ---- the calls


def _call(kernel: Any, inputs: Any, results: Sequence[int], name: str) -> tuple[Array, ...]:
    """A kernel over blocks of tokens of `rows`; `inputs`: (rows, each sample's factors), (matrices, common factors)."""
    widest = max(each.shape[2] for each in inputs[0][0])

    def local(rows: Any, shared: Any) -> tuple[Array, ...]:
        (rows, own), (whole, common) = rows, shared
        batch, tokens = rows[0].shape[:2]
        block = token_block(tokens, widest * rows[0].dtype.itemsize)
        outs = tuple(jax.ShapeDtypeStruct((batch, tokens, width), rows[0].dtype) for width in results)
        along = [pl.BlockSpec((1, block, x.shape[2]), lambda b, t: (b, t, 0)) for x in (*rows, *outs)]
        kept = [pl.BlockSpec(w.shape, lambda b, t: (0, 0), pipeline_mode=pl.Buffered(1)) for w in whole]
        first = [pl.BlockSpec((1, *f.shape[1:]), lambda b, t: (0, 0, 0)) for f in common]
        each = [pl.BlockSpec((1, *f.shape[1:]), lambda b, t: (b, 0, 0)) for f in own]
        held = sum(w.size * w.dtype.itemsize for w in whole)
        return pl.pallas_call(
            kernel,
            grid=(batch, pl.cdiv(tokens, block)),
            in_specs=[*along[: len(rows)], *kept, *first, *each],
            out_specs=tuple(along[len(rows) :]),
            out_shape=outs,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=held + _BLOCKS
            ),
            name=name,
        )(*rows, *whole, *common, *own)

    return by_rows(local, *inputs)


def _inputs(rows: Sequence[Array], whole: Sequence[Array], factors: Sequence[Array]) -> Any:
    """What each device has its own rows of, and what is the same for all."""
    whole = tuple(w.astype(rows[0].dtype) for w in whole)
    alone = factors[0].shape[0] == 1
    return (tuple(rows), () if alone else tuple(factors)), (whole, tuple(factors) if alone else ())


def _forward(x: Any, kernels: Any, biases: Any, a: Any, b: Any) -> tuple[tuple[Array, ...], Array]:
    inputs = _inputs([x], [*kernels, *(bias[None] for bias in biases)], [a, *b])
    results = [*(w.shape[1] for w in kernels), a.shape[2]]
    *products, hidden = _call(_forward_kernel, inputs, results, "adapted_products")
    return tuple(products), hidden


def _backward(gradients: Any, kernels: Any, a: Any, b: Any) -> tuple[Array, ...]:
    inputs = _inputs(gradients, kernels, [a, *b])
    return _call(_backward_kernel, inputs, a.shape[1:], "adapted_products_backward")


# ---- the kernels


def _product(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _transposed(x: Array, y: Array) -> Array:
    """x·yᵀ"""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _place(start: int, factor: Array, ranks: int) -> Float[Array, "own all"]:
    """Ones where an update's own ranks are among all."""
    shape = (factor.shape[0], ranks)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(2))
    return (row + start == column).astype(factor.dtype)


def _forward_kernel(x: Any, *refs: Any) -> None:
    """Refs: matrices, biases, a, each b; then the results and h."""
    n = (len(refs) - 2) // 4
    kernels, biases, a, b, outs, hidden = (
        refs[:n],
        refs[n : 2 * n],
        refs[2 * n],
        refs[2 * n + 1 : -n - 1],
        refs[-n - 1 : -1],
        refs[-1],
    )
    hidden[0] = _product(x[0], a[0]).astype(hidden.dtype)
    for w, bias, start, factor, out in zip(kernels, biases, _starts(b), b, outs, strict=True):
        own = _transposed(hidden[0], _place(start, factor[0], hidden.shape[2]))
        y = _product(x[0], w[...]) + _product(own.astype(hidden.dtype), factor[0])
        out[0] = (y + bias[...].astype(jnp.float32)).astype(out.dtype)


def _backward_kernel(*refs: Any) -> None:
    """Refs: gradients of the results, matrices, a, each b; then dx and dh."""
    *inputs, dx, dhidden = refs
    n = (len(inputs) - 1) // 3
    gradients, kernels, a, b = inputs[:n], inputs[n : 2 * n], inputs[2 * n], inputs[2 * n + 1 :]
    through: Any = 0.0
    for g, start, factor in zip(gradients, _starts(b), b, strict=True):
        own = _transposed(g[0], factor[0]).astype(dhidden.dtype)
        through = through + _product(own, _place(start, factor[0], dhidden.shape[2]))
    dhidden[0] = through.astype(dhidden.dtype)
    total = _transposed(dhidden[0], a[0])
    for g, w in zip(gradients, kernels, strict=True):
        total = total + _transposed(g[0], w[...])
    dx[0] = total.astype(dx.dtype)
